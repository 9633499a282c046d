//! Data and checkpoints in a bucket of a real S3 server.

use std::time::Duration;

use serde_json::{Value, json};

use crate::sandbox::{ACCESS_KEY, Outcome, Process, SECRET_KEY, SeaweedFs, World, expect_close, tool, wait_until};

/// With a checkpoint every 10 steps: when step 35 is reported, those of steps 10 and 20 are complete.
const STEPS: u64 = 300;
const WRONG_SECRET: &str = "wrong-secret-9f3b";

/// A world whose data comes from a bucket and whose checkpoints go there.
struct Cloud {
    world: World,
    server: SeaweedFs,
}

impl Cloud {
    fn new(server: SeaweedFs) -> Self {
        let world = World::with_corpus(2000);
        server.put("corpus/part-0000.jsonl.gz", &world.read("corpus/train/part-0000.jsonl.gz"));
        let cloud = Self { world, server };
        cloud.world.write("cloud.yaml", cloud.recipe());
        cloud
    }

    /// The recipe of the world, with another place for what is read and saved.
    fn recipe(&self) -> String {
        let (source, checkpoints, options) = (SeaweedFs::url("corpus"), SeaweedFs::url("checkpoints"), self.server.options());
        format!(
            "version: 1\nextends: recipe.yaml\ndata:\n  sources: [{{url: '{source}', options: {options}}}]\n  output: from-bucket\n\
             train:\n  steps: {STEPS}\ncheckpoint:\n  url: {checkpoints}\n  options: {options}\n  every_steps: 10\n"
        )
    }

    fn start(&self, secret: &str, arguments: &[&str]) -> Process {
        let mut command = self.world.command(arguments);
        Process::start(command.env("AWS_ACCESS_KEY_ID", ACCESS_KEY).env("AWS_SECRET_ACCESS_KEY", secret), "")
    }

    fn cloze(&self, arguments: &[&str]) -> Outcome {
        self.start(SECRET_KEY, arguments).wait()
    }

    fn refused(&self, arguments: &[&str]) -> Outcome {
        let outcome = self.start(WRONG_SECRET, arguments).wait().expect_code(6);
        assert!(!outcome.stderr.contains(WRONG_SECRET), "{}", outcome.stderr);
        outcome.expect_words(&["403 Forbidden", "hint: check the ", "s3://bucket/"])
    }
}

/// The same training on files of this machine: prepared data and losses must not depend on where things are.
fn check_against_local_files(cloud: &Cloud) {
    let world = &cloud.world;
    world.done(&["data", "prepare", "recipe.yaml"]);
    assert!(world.read("from-bucket/shard-00000.arrow") == world.read("prepared/shard-00000.arrow"), "the shards differ");
    let local = world.train("local", &["--workers", "2", "--quiet", "--set", &format!("train.steps={STEPS}")]);
    expect_close(&world.run("cloud").losses(), &local.losses(), 0.0);
    world.done(&["export", "local", "--output", "exported-locally"]);
    let [exported, expected] = ["exported", "exported-locally"].map(|folder| world.read(&format!("{folder}/model.safetensors")));
    assert!(exported == expected, "the exported weights differ");
}

/// Whoever sees only the bucket is told of the run what its folder knows, but for the place.
fn check_registry(cloud: &Cloud) {
    let option = |pair: String| ["--option".to_owned(), pair];
    let options = [
        option(format!("endpoint=http://127.0.0.1:{}", cloud.server.s3_port())),
        option("allow_http=true".to_owned()),
        option("region=us-east-1".to_owned()),
    ];
    let asked = |arguments: &[&str]| {
        let all: Vec<&str> = arguments.iter().copied().chain(options.iter().flatten().map(String::as_str)).collect();
        cloud.cloze(&all).expect_code(0).stdout
    };
    let parsed = |text: String| -> Value { serde_json::from_str(&text).expect("the list is JSON") };
    let place = SeaweedFs::url("checkpoints");
    let listed =
        parsed(asked(&["runs", "--root", "s3://bucket", "--state", "finished", "--search", &format!("train.steps={STEPS}"), "--json"]));
    let [run] = listed["runs"].as_array().map(Vec::as_slice).expect("a list") else { panic!("{listed}") };
    let own = parsed(cloud.cloze(&["runs", "show", "cloud", "--json"]).expect_code(0).stdout);
    for key in ["name", "recipe_hash", "state", "step", "steps", "loss", "worker_hours", "started"] {
        assert_eq!(run[key], own[key], "{key}");
    }
    assert_eq!((run["place"].as_str(), run["checkpoints"]["newest_step"].as_u64()), (Some(place.as_str()), Some(STEPS)));
    let shown = asked(&["runs", "show", &place]);
    assert!(shown.contains("run cloud: finished") && shown.contains(&format!("train.steps: {STEPS}")), "{shown}");
    let difference = parsed(asked(&["diff", "cloud", &place, "--json"]));
    assert_eq!((difference["recipe"].as_array().map(Vec::len), &difference["metrics"][0]["delta"]), (Some(0), &json!(0.0)), "{difference}");
}

#[test]
fn a_run_lives_in_a_bucket() {
    let Some(weed) = tool("a run lives in a bucket", "weed") else { return };
    let cloud = Cloud::new(SeaweedFs::start(&weed));
    cloud.cloze(&["data", "prepare", "cloud.yaml"]).expect_code(0);

    // One worker is killed at step 35, and everything after step 80.
    let train = ["train", "cloud.yaml", "--run", "cloud", "--workers", "2", "--quiet", "--kill-worker", "1@35"];
    let process = cloud.start(SECRET_KEY, &train);
    let run = cloud.world.run("cloud");
    wait_until("the run trains", Duration::from_secs(90), || run.last_step() >= 80);
    process.kill();
    run.kill_workers();
    assert!(run.last_step() < STEPS, "the kill came too late");
    cloud.cloze(&["resume", "cloud", "--workers", "2", "--quiet"]).expect_code(0);
    let restored = run.events_named("restored");
    assert_eq!(restored.len(), 3, "{restored:?}");
    for (event, place) in restored[1..].iter().zip(["memory of worker 0", "s3://bucket/checkpoints/step-"]) {
        assert!(event["source"].as_str().is_some_and(|source| source.starts_with(place)), "{event}");
    }
    cloud.cloze(&["export", "cloud", "--output", "exported"]).expect_code(0);
    check_against_local_files(&cloud);

    check_registry(&cloud);

    // Nothing that stays on this machine holds the secret.
    for file in ["recipe.yaml", "run.json", "events.jsonl", "logs/worker-0.log", "logs/worker-1.log"] {
        let text = String::from_utf8_lossy(&cloud.world.read(&format!("cloud/{file}"))).into_owned();
        assert!(!text.contains(SECRET_KEY), "{file} holds the secret");
    }

    // A wrong secret is refused while data are read, and while checkpoints are looked for.
    cloud.refused(&["data", "prepare", "cloud.yaml", "--set", "data.output=other"]).expect_words(&["access refused"]);
    assert!(!cloud.world.path("other/manifest.json").exists());
    cloud.refused(&["train", "cloud.yaml", "--run", "refused"]);
}
