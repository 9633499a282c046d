//! Checkpoints in Azure's and in Google's protocol.

use serde_json::json;

use crate::sandbox::{Azurite, SeaweedFs, World, tool};

const STEPS: u64 = 20;

/// The same training with its checkpoints in a cloud and in a folder, by two workers, with a resume half-way; the exports must not differ.
struct Cloud {
    world: World,
    environment: (&'static str, String),
}

impl Cloud {
    fn new(url: &str, options: &str, environment: (&'static str, String)) -> Self {
        let world = World::prepared();
        let checkpoint = format!("checkpoint: {{url: '{url}', options: {options}, every_steps: 5}}");
        world.write("cloud.yaml", format!("version: 1\nextends: recipe.yaml\ntrain: {{steps: {STEPS}}}\n{checkpoint}\n"));
        Self { world, environment }
    }

    fn done(&self, arguments: &[&str]) -> String {
        let (name, value) = &self.environment;
        crate::sandbox::run_command(self.world.command(arguments).env(name, value)).expect_code(0).stdout
    }

    fn train_and_compare(&self, url: &str) {
        self.done(&["train", "cloud.yaml", "--run", "cloud", "--workers", "2", "--quiet"]);
        self.done(&["resume", "cloud", "--workers", "2", "--quiet"]);
        self.done(&["export", "cloud", "--output", "exported"]);
        assert!(self.done(&["checkpoints", "verify", "cloud"]).contains("good"));
        let run = self.world.run("cloud");
        let restored = run.events_named("restored");
        assert_eq!(restored.len(), 2, "{restored:?}");
        assert_eq!(restored[1]["step"], STEPS);
        assert!(restored[1]["source"].as_str().is_some_and(|source| source.starts_with(url)), "{restored:?}");
        self.world.train("local", &["--workers", "2", "--quiet", "--set", &format!("train.steps={STEPS}")]);
        self.world.done(&["export", "local", "--output", "expected"]);
        let [exported, expected] = ["exported", "expected"].map(|folder| self.world.read(&format!("{folder}/model.safetensors")));
        assert!(exported == expected, "the exported weights differ");
    }
}

#[test]
fn a_bucket_without_credentials_is_found_before_there_is_a_run() {
    let world = World::prepared();
    let url = "az://runs/first";
    let place = format!("checkpoint.url={url}");
    let mut command = world.command(&["train", crate::sandbox::RECIPE, "--run", "run", "--set", &place]);
    let outcome = crate::sandbox::run_command(command.env_remove("AZURE_STORAGE_ACCOUNT_NAME")).expect_code(6);
    outcome.expect_words(&["bucket settings are not usable", url]);
    assert!(!world.path("run").exists(), "the run folder was made");
}

#[test]
fn checkpoints_lie_in_an_azure_container() {
    let Some(server) = Azurite::start("checkpoints in an Azure container") else { return };
    let url = Azurite::url("runs/first");
    Cloud::new(&url, "{use_emulator: 'true'}", server.environment()).train_and_compare(&url);
}

/// `SeaweedFS` answers Google's protocol as far as data go, and ignores its conditions: that is found out and said.
#[test]
fn a_store_that_ignores_conditions_is_found_out() {
    let Some(weed) = tool("checkpoints in Google's protocol", "weed") else { return };
    let server = SeaweedFs::start_open(&weed);
    let url = "gs://bucket/runs/first";
    // An account that asks nobody for tokens.
    let account = tempfile::NamedTempFile::new().expect("make a file");
    let endpoint = format!("http://127.0.0.1:{}", server.s3_port());
    let text =
        json!({ "private_key": "none", "private_key_id": "none", "client_email": "", "disable_oauth": true, "gcs_base_url": endpoint });
    std::fs::write(account.path(), text.to_string()).expect("write the account");
    let environment = ("GOOGLE_SERVICE_ACCOUNT", account.path().display().to_string());
    let options = format!("{{base_url: '{endpoint}', allow_http: 'true'}}");
    let cloud = Cloud::new(url, &options, environment);
    cloud.train_and_compare(url);
    let log = String::from_utf8_lossy(&cloud.world.read("cloud/logs/worker-0.log")).into_owned();
    assert!(log.contains("conditional writes cannot be relied on") && log.contains("gs://bucket/runs/first"), "{log}");
}
