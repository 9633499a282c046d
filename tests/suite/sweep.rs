//! A sweep ends with every trial done once, whatever happens to its controller.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use serde_json::Value;

use crate::sandbox::{
    CLOZE, Process, RECIPE_TEXT, SeaweedFs, World, fake_slurm, fake_slurm_with_a_queue, run_command, send_signal, tool, wait_until,
};

/// Longest wait for something of a sweep to happen.
const PATIENCE: Duration = Duration::from_mins(2);

/// A study folder as a test sees it.
struct Study<'a> {
    world: &'a World,
    name: &'a str,
}

impl<'a> Study<'a> {
    /// Writes a recipe with a sweep into a world; its study folder has the recipe's name.
    fn new(world: &'a World, name: &'a str, around: &str) -> Self {
        let recipe = RECIPE_TEXT.replace("name: small", &format!("name: {name}")).replace("steps: 40", "steps: 20");
        world.write(&format!("{name}.yaml"), recipe + around);
        Self { world, name }
    }

    fn recipe(&self) -> String {
        format!("{}.yaml", self.name)
    }

    fn folder(&self) -> String {
        format!("studies/{}", self.name)
    }

    fn start(&self, arguments: &[&str]) -> Process {
        let recipe = self.recipe();
        Process::start(&mut self.world.command(&[["sweep", "run", &recipe].as_slice(), arguments].concat()), "")
    }

    /// Records by name.
    fn records(&self) -> BTreeMap<String, Value> {
        let folder = self.world.path(&self.folder()).join("trials");
        let Ok(entries) = fs::read_dir(folder) else { return BTreeMap::new() };
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.extension().is_some_and(|e| e == "json"));
        paths
            .map(|path| {
                let record: Value = serde_json::from_slice(&fs::read(path).expect("read a record")).expect("a record is whole");
                (record["name"].as_str().expect("a name").to_owned(), record)
            })
            .collect()
    }

    fn states(&self) -> Vec<String> {
        self.records().values().map(|record| record["state"].as_str().expect("a state").to_owned()).collect()
    }

    fn count(&self, state: &str) -> usize {
        self.states().iter().filter(|found| *found == state).count()
    }

    /// How often each run was started: once, and once more for each time it was gone on with.
    fn starts(&self, run: &str) -> usize {
        let path = self.world.path(&self.folder()).join("runs").join(run).join("events.jsonl");
        let text = fs::read_to_string(path).unwrap_or_default();
        text.lines().filter(|line| line.contains("\"run_started\"")).count()
    }

    /// How many runs have a live controller.
    fn trainings(&self) -> usize {
        let runs = fs::read_dir(self.world.path(&self.folder()).join("runs")).into_iter().flatten().filter_map(Result::ok);
        let is_held = |run: &fs::DirEntry| {
            fs::File::open(run.path().join("lock")).is_ok_and(|lock| matches!(lock.try_lock_shared(), Err(fs::TryLockError::WouldBlock)))
        };
        runs.filter(is_held).count()
    }

    fn steps(&self, run: &str) -> Vec<u64> {
        let path = self.world.path(&self.folder()).join("runs").join(run).join("events.jsonl");
        let text = fs::read_to_string(path).unwrap_or_default();
        let events = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        events.filter(|event| event["event"] == "step").filter_map(|event| event["step"].as_u64()).collect()
    }
}

/// Hashes as `#1`, `#2`, in the order in which they appear: they depend on the folder of the world.
fn without_hashes(text: &str) -> String {
    let mut names: Vec<String> = Vec::new();
    let mut lines = Vec::new();
    for line in text.lines() {
        let words = line.split_whitespace().map(|word| {
            if word.len() != 12 || !word.chars().all(|character| character.is_ascii_hexdigit()) {
                return word.to_owned();
            }
            let place = names.iter().position(|name| name == word).unwrap_or_else(|| {
                names.push(word.to_owned());
                names.len() - 1
            });
            format!("#{}", place + 1)
        });
        lines.push(words.collect::<Vec<_>>().join(" "));
    }
    lines.join("\n") + "\n"
}

#[test]
fn stages_are_done_once_and_so_is_every_trial() {
    let world = World::with_corpus(2000);
    let first = RECIPE_TEXT.replace("name: small", "name: first").replace("steps: 40", "steps: 10");
    world.write("first.yaml", first);
    let around = "\
after: {recipe: first.yaml}
sweep:
  grid: {train.learning_rate: [0.001, 0.002]}
  seeds: [1, 2]
  concurrency: 2
";
    let study = Study::new(&world, "staged", around);
    let recipe = study.recipe();
    // The size of the model is that of the earlier stage.
    let text = String::from_utf8(world.read(&recipe)).unwrap();
    let shape = text.lines().find(|line| line.contains("shape:")).unwrap().to_owned() + "\n";
    world.write(&recipe, text.replace(&shape, ""));

    let preview = world.done(&["sweep", "run", &recipe, "--preview"]).stdout;
    let expected = "\
hash data after what
stage #1 #2 - seed=42
trial #3 #2 #1 train.learning_rate=0.001 seed=1
trial #4 #2 #1 train.learning_rate=0.001 seed=2
trial #5 #2 #1 train.learning_rate=0.002 seed=1
trial #6 #2 #1 train.learning_rate=0.002 seed=2
4 trials, 1 earlier stage, 1 data preparation; at most 2 at the same time
";
    assert_eq!(without_hashes(&preview), expected);
    assert!(!world.path("studies").exists(), "a preview makes nothing");

    let outcome = world.done(&["sweep", "run", &recipe]).expect_words(&["4 of 4 done"]);
    // Each change is a line, also where nobody watches.
    for change in [" starts: ", " done at step "] {
        assert_eq!(outcome.stderr.matches(change).count(), 5, "{}", outcome.stderr);
    }
    assert_eq!(outcome.stdout.lines().count(), 5, "{}", outcome.stdout);
    assert_eq!(study.states(), vec!["done"; 5]);
    for (name, record) in study.records() {
        assert_eq!((study.starts(&name), record["attempts"].as_u64()), (1, Some(1)), "{name}");
        assert_eq!(record["wanted"].as_bool().unwrap(), record["metric"].is_number(), "{name}");
    }
    let count = |folder: &str| {
        fs::read_dir(world.path(&study.folder()).join(folder)).unwrap().filter(|e| e.as_ref().unwrap().path().is_dir()).count()
    };
    assert_eq!((count("data"), count("models"), count("runs")), (1, 1, 5));

    // Once more: nothing is left to do.
    world.done(&["sweep", "run", &recipe]).expect_words(&["4 of 4 done"]);
    // A study is no run, and says which command is meant.
    for command in ["status", "logs", "cancel", "resume"] {
        let hint = format!("`cloze sweep {} ", if command == "logs" { "status" } else { command });
        world.cloze(&[command, &study.folder()]).expect_code(4).expect_words(&["this folder holds a study", &hint]);
    }
    world.cloze(&["eval", &study.folder()]).expect_code(4).expect_words(&["this folder holds a study", "`cloze sweep report "]);
    assert!(study.records().keys().all(|name| study.starts(name) == 1));
    let cancelled = world.done(&["sweep", "cancel", &study.folder()]).expect_words(&["there is nothing to cancel: the study is over"]);
    assert!(!cancelled.stderr.contains("resume"), "{}", cancelled.stderr);
    // The same folder is not another study's.
    let folder = study.folder();
    let other = ["sweep", "run", &recipe, "--folder", &folder, "--set", "train.learning_rate=0.003", "--set", "sweep.grid=null"];
    world.cloze(&other).expect_code(8).expect_words(&["the study of another recipe"]);
    let status: Value = serde_json::from_str(&world.done(&["sweep", "status", &folder, "--json"]).stdout).unwrap();
    assert_eq!((status["trials"].as_array().unwrap().len(), status["controller"].is_null()), (5, true));
}

#[test]
fn a_sweep_goes_on_after_its_controller_was_killed() {
    let world = World::with_corpus(2000);
    let around = "\
sweep:
  seeds: [1, 2, 3]
  concurrency: 2
";
    let study = Study::new(&world, "killed", around);
    let process = study.start(&["--set", "train.steps=300", "--set", "checkpoint.every_steps=20"]);
    wait_until("two trials train", PATIENCE, || {
        study.records().iter().filter(|(name, record)| record["state"] == "training" && study.steps(name).len() > 5).count() == 2
    });
    let folder = study.folder();
    let status: Value = serde_json::from_str(&world.done(&["sweep", "status", &folder, "--json"]).stdout).unwrap();
    let steps = status["trials"].as_array().unwrap().iter().filter(|trial| trial["step"].as_u64() >= Some(5)).count();
    assert_eq!((steps, status["over"].as_bool()), (2, Some(false)), "what trains shows its newest step: {status}");
    // A second controller is refused by name.
    world.cloze(&["sweep", "resume", &folder]).expect_code(9).expect_words(&["another live controller has this sweep", "process "]);
    let holder = world.done(&["sweep", "status", &folder]).stdout;
    assert!(holder.contains("; controlled by process ") && holder.contains(", for "), "{holder}");
    process.kill();
    let orphaned = world.done(&["sweep", "status", &folder]).stdout;
    assert!(orphaned.contains(" and wrote last "), "{orphaned}");
    assert!(orphaned.contains("2 out; no controller lives here; the last one, process ") && !orphaned.contains("gone"), "{orphaned}");
    let out: Vec<String> = study.records().into_iter().filter(|(_, record)| record["state"] == "training").map(|(name, _)| name).collect();
    let before: Vec<usize> = out.iter().map(|name| study.steps(name).len()).collect();
    wait_until("what is out goes on without a controller", PATIENCE, || {
        out.iter().zip(&before).all(|(name, &before)| study.steps(name).len() > before)
    });

    world.done(&["sweep", "resume", &folder]).expect_words(&["2 trials of an earlier controller are out", "3 of 3 done"]);
    for (name, record) in study.records() {
        assert_eq!((record["state"].as_str(), record["attempts"].as_u64()), (Some("done"), Some(1)), "{name}");
        let steps = study.steps(&name);
        assert_eq!((study.starts(&name), steps.len(), steps.last()), (1, 300, Some(&300)), "{name}");
    }
}

/// The first claim of a study's jobs, and where it lies.
fn claim_of(world: &World, study: &Study<'_>) -> (std::path::PathBuf, Value) {
    let path = world.path(&format!("{}/jobs/batch-000001.claim", study.folder()));
    let claim = serde_json::from_slice(&fs::read(&path).expect("read a claim")).expect("a claim is whole");
    (path, claim)
}

#[test]
fn a_trial_that_another_machine_works_on_is_not_begun_again() {
    let world = World::with_corpus(2000);
    let study = Study::new(&world, "far", "sweep: {seeds: [1], concurrency: 1}\n");
    let process = study.start(&["--set", "train.steps=300", "--set", "checkpoint.every_steps=1000"]);
    wait_until("a trial trains", PATIENCE, || study.records().keys().any(|name| study.steps(name).len() > 5));
    process.kill();
    // As another machine sees it where locks do not reach so far.
    let (name, record) = study.records().into_iter().next().unwrap();
    let (path, mut claim) = claim_of(&world, &study);
    claim["taken"]["boot"] = "another".into();
    claim["taken"]["machine"] = "far".into();
    fs::write(&path, claim.to_string()).unwrap();
    let folder = study.folder();
    for lock in [format!("{folder}/jobs/{}.lock", record["hash"].as_str().unwrap()), format!("{folder}/runs/{name}/lock")] {
        fs::remove_file(world.path(&lock)).unwrap();
    }
    world.done(&["sweep", "resume", &folder]).expect_words(&["of far, which nobody here can ask; it keeps its trial", "1 of 1 done"]);
    assert_eq!(study.records()[&name]["attempts"], 1);
    assert_eq!((study.starts(&name), study.steps(&name)), (1, (1..=300).collect::<Vec<u64>>()), "each step once");
}

#[test]
fn a_trial_ends_where_another_host_may_have_its_study() {
    let world = World::with_corpus(2000);
    let study = Study::new(&world, "tied", "sweep: {seeds: [1], concurrency: 1}\n");
    let process = study.start(&["--set", "train.steps=100000", "--set", "checkpoint.every_steps=100000", "--journal", "journal"]);
    wait_until("a trial trains", PATIENCE, || study.records().keys().any(|name| study.steps(name).len() > 5));
    process.kill();
    // In the same folder nobody waits for the end of the lease, and the trial goes on.
    let next = Process::start(&mut world.command(&["sweep", "resume", &study.folder()]), "");
    let lease = |number: u32| world.path(&format!("journal/leases/{number:012}.json"));
    wait_until("the next controller has the lease", PATIENCE, || lease(2).is_file());
    next.kill();
    let name = study.records().into_keys().next().unwrap();
    let (_, claim) = claim_of(&world, &study);
    let worker = world.read(&format!("{}/runs/{name}/processes/worker-0.json", study.folder()));
    let worker: Value = serde_json::from_slice(&worker).unwrap();
    // One that has ended and that nobody has taken note of has no command line.
    let lives = |process: &Value| fs::read(format!("/proc/{}/cmdline", process["process_id"])).is_ok_and(|line| !line.is_empty());
    assert!(lives(&claim["taken"]) && lives(&worker), "they go on without a controller");
    fs::write(lease(3), r#"{"holder": "process 1 of far", "renewed": 1.0}"#).unwrap();
    wait_until("what works on the trial is ended", PATIENCE, || !lives(&claim["taken"]) && !lives(&worker));
    assert!(study.steps(&name).len() < 100_000 && study.starts(&name) == 1);
}

#[test]
fn what_a_trial_has_started_ends_with_its_process() {
    let world = World::with_corpus(2000);
    let study = Study::new(&world, "cut", "sweep: {seeds: [1, 2, 3], concurrency: 2}\n");
    let process = study.start(&["--set", "train.steps=300", "--set", "checkpoint.every_steps=1000"]);
    wait_until("two trials train", PATIENCE, || {
        study.records().iter().filter(|(name, record)| record["state"] == "training" && study.steps(name).len() > 5).count() == 2
    });
    let (cut, record) = study.records().into_iter().find(|(_, record)| record["state"] == "training").unwrap();
    let lock = world.read(&format!("{}/jobs/{}.lock", study.folder(), record["hash"].as_str().unwrap()));
    let lock = String::from_utf8(lock).unwrap();
    assert!(send_signal(lock.split_once(' ').unwrap().0.parse().unwrap(), "KILL"));
    let mut most = 0;
    wait_until("all trials are done", PATIENCE, || {
        most = most.max(study.trainings());
        study.count("done") == 3
    });
    process.wait().expect_code(0).expect_words(&["tried again in 2 s at the earliest", "3 of 3 done"]);
    assert_eq!(most, 2, "what a killed process had started trained on in nobody's place");
    for (name, record) in study.records() {
        let times = if name == cut { 2 } else { 1 };
        assert_eq!((study.starts(&name), record["attempts"].as_u64()), (times, Some(times as u64)), "{name}");
        assert_eq!(study.steps(&name), (1..=300).collect::<Vec<u64>>(), "{name}: each step once");
    }
}

#[test]
fn a_sweep_that_is_stopped_saves_and_goes_on_elsewhere() {
    let world = World::with_corpus(2000);
    let study = Study::new(&world, "stopped", "sweep: {seeds: [1, 2, 3], concurrency: 2, metric: {score: loss}}\n");
    let server = tool("a sweep's journal lies in a bucket", "weed").map(|weed| SeaweedFs::start(&weed));
    let journal = server.as_ref().map_or_else(|| "journal".to_owned(), |_| SeaweedFs::url("journal"));
    let environment: Vec<_> = server.iter().flat_map(SeaweedFs::environment).collect();
    let start = |arguments: &[&str]| Process::start(world.command(arguments).envs(environment.clone()), "");
    let recipe = study.recipe();
    let process =
        start(&["sweep", "run", &recipe, "--set", "train.steps=150", "--set", "checkpoint.every_steps=1000", "--journal", &journal]);
    wait_until("two trials train", PATIENCE, || {
        study.records().iter().filter(|(name, record)| record["state"] == "training" && study.steps(name).len() > 5).count() == 2
    });
    // From another machine, which does not see the folder's lock.
    start(&["sweep", "resume", "moved", "--journal", &journal])
        .wait()
        .expect_code(9)
        .expect_words(&["another controller has this sweep", "process "]);
    process.terminate();
    let outcome = process.wait().expect_code(130).expect_words(&["what is out saves and leaves", "cloze sweep resume"]);
    assert!(outcome.stderr.matches(" saved at step ").count() == 2, "{}", outcome.stderr);
    assert_eq!(study.count("waiting"), 3);
    let saved: Vec<u64> = study.records().values().filter_map(|record| record["step"].as_u64()).filter(|&step| step > 0).collect();
    assert_eq!(saved.len(), 2, "{saved:?}");

    // The folder is lost; the journal still has the study.
    fs::remove_dir_all(world.path(&study.folder())).unwrap();
    start(&["sweep", "resume", "moved", "--journal", &journal]).wait().expect_code(0).expect_words(&["3 of 3 done"]);
    if let Some(server) = &server {
        let keys = server.keys("journal");
        assert_eq!(keys.iter().filter(|key| key.contains("/trials/")).count(), 3, "{keys:?}");
        assert!(!keys.iter().any(|key| key.contains("/leases/")), "the lease was not given back: {keys:?}");
    }
    let status: Value = serde_json::from_str(&world.done(&["sweep", "status", "moved", "--json"]).stdout).unwrap();
    let trials = status["trials"].as_array().unwrap();
    assert!(trials.iter().all(|trial| trial["state"] == "done" && trial["metric"].as_f64().is_some_and(|loss| loss > 0.0)), "{status}");
    assert!(world.path("moved/runs").read_dir().unwrap().count() == 3);
}

#[test]
fn early_stopping_lets_the_best_go_on_from_where_they_were() {
    let world = World::with_corpus(2000);
    let around = "\
sweep:
  grid: {train.learning_rate: [0.0001, 0.002, 0.00001]}
  concurrency: 3
  metric: {score: loss}
  early_stopping: {first_step: 7, factor: 3}
";
    let study = Study::new(&world, "halved", around);
    world.done(&["sweep", "run", &study.recipe()]).expect_words(&["1 of 3 done, 2 stopped early", "waits at its rung at step 7"]);
    let records = study.records();
    let of = |rate: f64| records.values().find(|record| record["parameters"]["train.learning_rate"] == rate).unwrap();
    // The highest rate is the fastest at first, and the only one that trains to the end.
    let best = of(0.002);
    assert_eq!((best["state"].as_str(), best["step"].as_u64()), (Some("done"), Some(20)));
    for rate in [0.0001, 0.00001] {
        assert_eq!((of(rate)["state"].as_str(), of(rate)["step"].as_u64()), (Some("stopped_early"), Some(7)), "{rate}");
        assert_eq!(study.steps(of(rate)["name"].as_str().unwrap()), (1..=7).collect::<Vec<u64>>());
    }
    // It computes what it would have computed without the pause.
    let name = best["name"].as_str().unwrap();
    assert_eq!((study.starts(name), study.steps(name)), (2, (1..=20).collect()));
    let run = world.run(&format!("{}/runs/{name}", study.folder()));
    let recipe = format!("{}/trials/{}.yaml", study.folder(), best["hash"].as_str().unwrap());
    world.done(&["train", &recipe, "--run", "whole", "--quiet"]);
    assert_eq!(run.loss_bits(), world.run("whole").loss_bits());
    assert!(run.checkpoint_tensors(20) == world.run("whole").checkpoint_tensors(20), "the state at the end differs");
}

#[test]
fn a_failed_trial_is_named_and_tried_again_when_asked() {
    let world = World::with_corpus(2000);
    let around = "sweep: {list: [{model.tokenizer: corpus/tokenizer.json}, {model.tokenizer: other.json}], concurrency: 1}\n";
    let study = Study::new(&world, "failing", around);
    let recipe = study.recipe();
    // A file that is not there is found before anything is made.
    world.cloze(&["sweep", "run", &recipe]).expect_code(4).expect_words(&["1 file that the trials read is missing", "other.json"]);
    assert!(!world.path(&study.folder()).exists());
    world.write("other.json", "{}");
    world.cloze(&["sweep", "run", &recipe]).expect_code(9).expect_words(&["1 of 2 trials failed", "cloze sweep retry"]);
    let records = study.records();
    let failed = records.values().find(|record| record["state"] == "failed").unwrap();
    // A file that is no tokenizer does not become one by itself: no second attempt.
    assert_eq!(failed["attempts"].as_u64(), Some(1), "{failed}");
    let name = failed["name"].as_str().unwrap().to_owned();
    let folder = study.folder();
    world.cloze(&["sweep", "retry", &folder, "nobody"]).expect_code(3).expect_words(&["no such trial"]);
    let done = records.values().find(|record| record["state"] == "done").unwrap()["name"].as_str().unwrap().to_owned();
    let refused = world.cloze(&["sweep", "retry", &folder, &done]).expect_code(3);
    refused.expect_words(&["only a trial that has failed is tried again", &format!("{done}, which is done")]);
    let report = world.done(&["report", &folder]).stdout;
    assert!(report.contains("Of 2 trials: 1 failed; `cloze sweep status "), "{report}");
    fs::copy(world.path("corpus/tokenizer.json"), world.path("other.json")).unwrap();
    world.done(&["sweep", "retry", &folder, &name]).expect_words(&["1 trial is tried again", "2 of 2 done"]);
    assert_eq!(study.records()[&name]["attempts"], 2);
    // A damaged record is named.
    let path = format!("{folder}/trials/{}.json", failed["hash"].as_str().unwrap());
    world.write(&path, "{");
    world.cloze(&["sweep", "resume", &folder]).expect_code(7).expect_words(&["the record of a trial cannot be read", &path]);
}

#[test]
fn what_cannot_begin_starts_nothing() {
    let world = World::with_corpus(500);
    let study = Study::new(&world, "odd", "sweep: {list: [{train.steps: 20}, {train.steps: 20}]}\n");
    let recipe = study.recipe();
    world.cloze(&["sweep", "run", &recipe]).expect_code(3).expect_words(&["twice"]);
    let alone = Study::new(&world, "alone", "");
    let recipe = alone.recipe();
    world.write("cluster.yaml", "version: 1\nname: here\nkind: slurm\nslurm: {partition: main}\n");
    let mut command = world.command(&["sweep", "run", &recipe, "--cluster", "cluster.yaml"]);
    command.env("PATH", "/nowhere");
    run_command(&mut command).expect_code(5).expect_words(&["sbatch"]);
    assert!(!world.path(&alone.folder()).exists(), "a study folder was made for nothing");
    fs::create_dir_all(world.path("full")).unwrap();
    world.write("full/thesis.tex", "x");
    world.cloze(&["sweep", "run", &recipe, "--folder", "full"]).expect_code(3).expect_words(&["not empty", "thesis.tex"]);
    // Nor into the folder of a run, which stays as it was.
    world.done(&["data", "prepare", "alone.yaml"]);
    world.done(&["train", "alone.yaml", "--run", "one", "--quiet", "--set", "train.steps=2"]);
    let names = || -> Vec<_> { fs::read_dir(world.path("one")).unwrap().map(|entry| entry.unwrap().file_name()).collect() };
    let before = names();
    world.cloze(&["sweep", "run", &recipe, "--folder", "one"]).expect_code(3).expect_words(&["the study folder is the folder of a run"]);
    world.cloze(&["sweep", "resume", "one"]).expect_code(4).expect_words(&["this folder holds a run, and no study", "`cloze resume "]);
    let from_journal = ["sweep", "resume", "one", "--journal", "journal"];
    world.cloze(&from_journal).expect_code(3).expect_words(&["the study folder is the folder of a run"]);
    assert_eq!(names(), before);
    world.done(&["status", "one"]);
    world.cloze(&["sweep", "status", "full"]).expect_code(4).expect_words(&["this folder holds no study"]);
    world.cloze(&["reproduce", "no/table", "--recipes", "."]).expect_code(3).expect_words(&["there is no such table"]);
}

#[test]
fn points_whose_data_turns_out_to_be_the_same_are_named() {
    let world = World::with_corpus(500);
    // No task has the second name.
    let around = "sweep: {grid: {data.only: [['.'], ['.', '^nothing$']]}, concurrency: 2, metric: {score: loss}}\n";
    let study = Study::new(&world, "same", around);
    let warning = "warning: these have the same data, sample for sample, so that it makes no difference between them: \
        data.only=[\".\"]; data.only=[\".\",\"^nothing$\"]\n";
    for command in [["sweep", "run", &study.recipe()], ["sweep", "report", &study.folder()]] {
        let told = world.done(&command).stderr;
        assert_eq!(told.matches(warning).count(), 1, "{told}");
    }
    assert_eq!(study.states(), ["done", "done"]);
}

#[test]
fn a_cluster_file_is_checked_before_a_study_is_made_and_can_be_changed() {
    let world = World::with_corpus(500);
    let study = Study::new(&world, "queued", "");
    let path = fake_slurm(&world);
    let recipe = study.recipe();
    let folder = study.folder();
    for (file, name, slurm) in [("main", "a", "partition: main"), ("nowhere", "a", "partition: nowhere"), ("lab", "b", "account: lab")] {
        world.write(&format!("{file}.yaml"), format!("version: 1\nname: {name}\nkind: slurm\nslurm: {{{slurm}}}\n"));
    }
    let cloze = |arguments: &[&str]| run_command(world.command(arguments).env("PATH", &path));
    let no_partition = ["the cluster has no such partition", "nowhere"];
    cloze(&["sweep", "run", &recipe, "--cluster", "nowhere.yaml"]).expect_code(3).expect_words(&no_partition);
    assert!(!world.path(&folder).exists(), "a study folder was made for nothing");
    cloze(&["sweep", "run", &recipe, "--cluster", "main.yaml"]).expect_code(5).expect_words(&["Invalid account"]);
    assert_eq!(study.states(), ["waiting"]);

    // The file that is named counts, and not the one of before.
    let plan = || -> Value { serde_json::from_slice(&world.read(&format!("{folder}/sweep.json"))).unwrap() };
    cloze(&["sweep", "resume", &folder, "--cluster", "nowhere.yaml"]).expect_code(3).expect_words(&no_partition);
    assert_eq!(plan()["site"]["kind"]["slurm"]["partition"], "main");
    cloze(&["sweep", "resume", &folder, "--cluster", "lab.yaml"]).expect_code(5).expect_words(&["Invalid account"]);
    assert_eq!(plan()["site"]["kind"]["slurm"]["account"], "lab");
    let script = String::from_utf8(world.read(&format!("{folder}/jobs/batch-000002.sh"))).unwrap();
    assert!(script.contains("#SBATCH --account=lab\n"), "{script}");
    cloze(&["sweep", "retry", &folder, "--cluster", "nowhere.yaml"]).expect_code(3).expect_words(&no_partition);
    cloze(&["sweep", "retry", &folder, "--cluster", "main.yaml"]).expect_code(5).expect_words(&["Invalid account"]);
    assert_eq!(plan()["site"]["kind"]["slurm"]["partition"], "main");
    let study: Value = serde_json::from_slice(&world.read(&format!("{folder}/study.json"))).unwrap();
    assert_eq!(study["cluster"], "fake");
}

#[test]
fn another_cluster_file_is_checked_as_that_of_a_new_study() {
    let world = World::with_corpus(500);
    let around = "\
resources: {nodes: 1, workers_per_node: 1, memory_per_node_mib: 600, time_limit_minutes: 2}
sweep: {seeds: [1, 2], pack: 400}
";
    let study = Study::new(&world, "tight", around);
    let path = fake_slurm(&world);
    // Here nothing is wrong but the tokenizer, so that there is a study that has not run.
    world.write("other.json", "{}");
    world.cloze(&["sweep", "run", &study.recipe(), "--set", "model.tokenizer=other.json"]).expect_code(9);
    fs::copy(world.path("corpus/tokenizer.json"), world.path("other.json")).unwrap();
    for (file, slurm) in [("brief", "partition: main, warning_s: 60"), ("warned", "partition: main")] {
        world.write(&format!("{file}.yaml"), format!("version: 1\nname: a\nkind: slurm\nslurm: {{{slurm}}}\n"));
    }
    let folder = study.folder();
    let plan = world.read(&format!("{folder}/sweep.json"));
    // (file, words): four hundred trials share a node there, and a job is warned of its end before it has begun.
    let files = [("brief", "2 of 2 trials and earlier stages need more memory than there is"), ("warned", "found 2, expected at least 3")];
    for command in ["resume", "retry"] {
        for (file, words) in files {
            let refused = run_command(world.command(&["sweep", command, &folder, "--cluster", &format!("{file}.yaml")]).env("PATH", &path));
            refused.expect_code(3).expect_words(&[words]);
        }
    }
    assert_eq!(world.read(&format!("{folder}/sweep.json")), plan, "the study has moved");
}

#[test]
fn a_study_whose_cluster_is_lost_is_cancelled_and_goes_on_elsewhere() {
    let world = World::with_corpus(2000);
    let study = Study::new(&world, "left", "");
    let path = fake_slurm_with_a_queue(&world);
    let (recipe, folder) = (study.recipe(), study.folder());
    world.write("lab.yaml", "version: 1\nname: lab\nkind: slurm\n");
    world.write("desk.yaml", "version: 1\nname: desk\nkind: local\n");
    let controller = Process::start(world.command(&["sweep", "run", &recipe, "--cluster", "lab.yaml"]).env("PATH", &path), "");
    wait_until("the trial is in the queue", PATIENCE, || study.count("training") == 1);
    controller.kill();

    // Where there is no SLURM nothing is changed without a word of the user.
    let elsewhere = |arguments: &[&str]| run_command(world.command(arguments).env("PATH", "/nowhere"));
    let refused = elsewhere(&["sweep", "cancel", &folder]).expect_code(5);
    refused.expect_words(&[
        "sbatch",
        "a host of the cluster `lab`, where 1 trial is out",
        "nothing was cancelled or changed",
        "--mark-only",
    ]);
    elsewhere(&["sweep", "resume", &folder, "--cluster", "desk.yaml"]).expect_code(9).expect_words(&["trials are out elsewhere"]);
    assert_eq!(study.count("training"), 1);

    let name = {
        let info: Value = serde_json::from_slice(&world.read(&format!("{folder}/study.json"))).unwrap();
        format!("cloze-left-{}-{}-000001", &info["hash"].as_str().unwrap()[..10], info["key"].as_str().unwrap())
    };
    let cancelled = elsewhere(&["sweep", "cancel", &folder, "--mark-only"]).expect_code(0);
    cancelled.expect_words(&[
        "saved at step 0",
        &format!("warning: job {name} may still be in the queue of the cluster `lab`"),
        "cancelled",
    ]);
    assert_eq!(study.states(), ["waiting"]);
    // Nothing is out any more, so nobody has to be asked.
    elsewhere(&["sweep", "cancel", &folder]).expect_code(0).expect_words(&["nothing to cancel: no trial is out", "cloze sweep resume "]);
    // Its job begins after all, and does nothing.
    let begun = elsewhere(&["sweep", "work", &folder, "--batch", "1", "--element", "0"]).expect_code(0);
    begun.expect_words(&["nothing to do"]);
    assert!(study.records().keys().all(|name| study.starts(name) == 0));
    world.done(&["sweep", "resume", &folder, "--cluster", "desk.yaml"]).expect_words(&["1 of 1 done"]);
    assert!(study.records().iter().all(|(name, record)| study.starts(name) == 1 && record["attempts"] == 2));
    world.cloze(&["sweep", "cancel", &folder, "--mark-only"]).expect_code(3).expect_words(&["in no cluster"]);
}

impl Drop for Study<'_> {
    /// Processes that work on trials outlive their controller, but never the world in which they run.
    fn drop(&mut self) {
        let folder = self.world.path("").display().to_string();
        let processes = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
        for entry in processes {
            let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let command = String::from_utf8_lossy(&command).into_owned();
            let is_ours = command.starts_with(CLOZE) && command.contains(folder.trim_end_matches('/'));
            if let (true, Ok(process_id)) = (is_ours, entry.file_name().to_string_lossy().parse()) {
                send_signal(process_id, "KILL");
            }
        }
    }
}
