//! A sweep on hosts that SSH reaches: every trial is done once, whatever happens to its processes, its hosts and its controller.

use std::collections::BTreeMap;
use std::fs;
use std::process::Command;
use std::time::Duration;

use serde_json::Value;

use crate::sandbox::{CLOZE, Outcome, Process, RECIPE_TEXT, SshHosts, World, run_command, send_signal, wait_until};

/// Longest wait for something of a sweep to happen.
const PATIENCE: Duration = Duration::from_mins(2);
/// Steps of a trial: enough that it lives while things happen to it.
const STEPS: u64 = 500;

/// A study on hosts, as a test sees it.
struct Study<'a> {
    world: &'a World,
    ssh: &'a SshHosts,
}

impl<'a> Study<'a> {
    /// Writes a recipe with three trials, of which one for each host runs at a time, and a cluster file with these hosts.
    fn new(world: &'a World, ssh: &'a SshHosts, hosts: &str) -> Self {
        let recipe = RECIPE_TEXT.replace("name: small", "name: spread").replace("steps: 40", &format!("steps: {STEPS}"));
        let recipe = recipe.replace("every_steps: 5", "every_steps: 25");
        world.write("spread.yaml", recipe + "sweep: {seeds: [1, 2, 3], concurrency: 2}\n");
        let shell = ssh.remote_shell().replace(' ', ", ");
        let text = "preflight: {enabled: false}\nenvironment: {FROM_SITE: 'two words'}\nsetup: ['test \"$FROM_SITE\" = \"two words\"']\n";
        let site = format!("version: 1\nname: lab\nkind: ssh\nssh: {{hosts: [{hosts}], command: [{shell}], lost_after_s: 30}}\n{text}");
        world.write("lab.yaml", site);
        Self { world, ssh }
    }

    fn command(&self, arguments: &[&str]) -> Command {
        self.world.command_by(self.ssh.command(CLOZE), arguments)
    }

    fn start(&self, arguments: &[&str]) -> Process {
        Process::start(&mut self.command(arguments), "")
    }

    #[track_caller]
    fn done(&self, arguments: &[&str]) -> Outcome {
        run_command(&mut self.command(arguments)).expect_code(0)
    }

    /// Records by name.
    fn records(&self) -> BTreeMap<String, Value> {
        let Ok(entries) = fs::read_dir(self.world.path("studies/spread/trials")) else { return BTreeMap::new() };
        let paths = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.extension().is_some_and(|e| e == "json"));
        let records = paths.map(|path| serde_json::from_slice(&fs::read(path).expect("read a record")).expect("a record is whole"));
        records.map(|record: Value| (record["name"].as_str().expect("a name").to_owned(), record)).collect()
    }

    fn claim(&self, record: &Value) -> Value {
        let batch = record["place"]["batch"].as_u64().unwrap_or(0);
        let path = self.world.path(&format!("studies/spread/jobs/batch-{batch:06}.claim"));
        fs::read(path).ok().and_then(|text| serde_json::from_slice(&text).ok()).unwrap_or_default()
    }

    /// The trials that have done so many steps and go on, by the host that has them.
    fn training(&self, steps: usize) -> BTreeMap<String, String> {
        let records = self.records();
        let out = records.iter().filter(|(name, record)| record["state"] == "training" && self.steps(name).len() > steps);
        out.filter_map(|(name, record)| Some((self.claim(record)["taken"]["host"].as_str()?.to_owned(), name.clone()))).collect()
    }

    fn events(&self, run: &str) -> Vec<Value> {
        let text = fs::read_to_string(self.world.path(&format!("studies/spread/runs/{run}/events.jsonl"))).unwrap_or_default();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    fn steps(&self, run: &str) -> Vec<u64> {
        self.events(run).iter().filter(|event| event["event"] == "step").filter_map(|event| event["step"].as_u64()).collect()
    }

    /// Whether every trial is done, and the attempts that it took.
    fn attempts(&self) -> BTreeMap<String, u64> {
        let records = self.records();
        assert!(records.values().all(|record| record["state"] == "done"), "{records:?}");
        records.into_iter().map(|(name, record)| (name, record["attempts"].as_u64().expect("attempts"))).collect()
    }
}

#[test]
fn a_sweep_over_ssh_does_every_trial_once() {
    let Some(ssh) = SshHosts::start("a sweep over SSH", 2) else { return };
    let world = World::with_corpus(2000);
    let study = Study::new(&world, &ssh, "n1, n2");
    let preview = study.done(&["sweep", "run", "spread.yaml", "--cluster", "lab.yaml", "--preview"]).stdout;
    assert!(preview.contains("on 2 hosts, at most 2 at the same time, at most 1 on each"), "{preview}");
    let wide = ["sweep", "run", "spread.yaml", "--cluster", "lab.yaml", "--set", "resources.nodes=2"];
    run_command(&mut study.command(&wide)).expect_code(3).expect_words(&["resources.nodes", "has one of them"]);
    assert!(!world.path("studies").exists(), "a study folder was made for nothing");

    let controller = study.start(&["sweep", "run", "spread.yaml", "--cluster", "lab.yaml"]);
    wait_until("each host trains a trial", PATIENCE, || study.training(5).len() == 2);
    // A connection that breaks ends nothing, and neither does the death of the controller.
    ssh.break_connections("n1");
    controller.kill();
    let status = study.done(&["sweep", "status", "studies/spread"]).stdout;
    assert!(status.contains("2 out; no controller lives here") && !status.contains("gone"), "{status}");
    // What works on one of the trials dies meanwhile, and leaves its programs behind.
    let out = study.training(0);
    let (killed, kept) = (out["n1"].clone(), out["n2"].clone());
    let work = u32::try_from(study.claim(&study.records()[&killed])["taken"]["process_id"].as_u64().expect("a process")).expect("an id");
    let is_work = |process_id: &u32| {
        let line = fs::read(format!("/proc/{process_id}/cmdline")).unwrap_or_default();
        String::from_utf8_lossy(&line).contains("\0work\0")
    };
    let on_host: Vec<u32> = ssh.fleet().processes_on("n1").into_iter().filter(is_work).collect();
    assert_eq!(on_host.len(), 1, "process {work} of the host works");
    send_signal(on_host[0], "KILL");
    let resumed = study.done(&["sweep", "resume", "studies/spread"]);
    let ended = format!("{killed} failed: what worked on the trial ended without a word; tried again");
    resumed.expect_words(&["2 trials of an earlier controller are out", "3 of 3 done", &ended]);

    let attempts = study.attempts();
    for (name, attempts) in attempts {
        assert_eq!(attempts, if name == killed { 2 } else { 1 }, "{name}");
        let steps = study.steps(&name);
        if name == kept {
            assert_eq!((steps.len() as u64, steps.last()), (STEPS, Some(&STEPS)), "{name}: a step was done twice");
        }
        assert_eq!(steps.last(), Some(&STEPS), "{name}");
    }
}

#[test]
fn the_trials_of_a_host_that_is_gone_go_to_the_others() {
    let Some(ssh) = SshHosts::start("a sweep whose host is gone", 2) else { return };
    let world = World::with_corpus(2000);
    // This machine is one of them, and another one was never there.
    let study = Study::new(&world, &ssh, "localhost, n1, n7");
    let controller = study.start(&["sweep", "run", "spread.yaml", "--cluster", "lab.yaml"]);
    wait_until("each host trains a trial", PATIENCE, || study.training(5).len() == 2);
    let lost = study.training(0)["n1"].clone();
    ssh.fleet().cut("n1");
    ssh.fleet().kill_on("n1", |name| name.starts_with("cloze"));
    let outcome = controller.wait().expect_code(0).expect_words(&["warning: host n7", "3 of 3 done"]);
    outcome.expect_words(&["warning: host n1 is left out until it answers", "has given no sign of life for"]);
    for (name, attempts) in study.attempts() {
        assert_eq!((attempts, study.steps(&name).last()), (if name == lost { 2 } else { 1 }, Some(&STEPS)), "{name}");
    }
}

#[test]
fn a_sweep_over_ssh_is_cancelled_and_goes_on_at_another_site() {
    let Some(ssh) = SshHosts::start("a sweep over SSH that is cancelled", 1) else { return };
    let world = World::with_corpus(2000);
    let study = Study::new(&world, &ssh, "login, n1");
    let controller = study.start(&["sweep", "run", "spread.yaml", "--cluster", "lab.yaml"]);
    wait_until("each host trains a trial", PATIENCE, || study.training(5).len() == 2);
    world.write("desk.yaml", "version: 1\nname: desk\nkind: local\n");
    // One host is told by the remote shell; the other one cannot be, and finds the wish on the disk.
    ssh.fleet().cut("n1");
    controller.terminate();
    let left = controller.wait().expect_code(130).expect_words(&["what is out saves and leaves", "cloze sweep resume"]);
    assert_eq!(left.stderr.matches(" saved at step ").count(), 2, "{}", left.stderr);
    assert!(study.records().values().all(|record| record["state"] == "waiting"));
    study.done(&["sweep", "resume", "studies/spread", "--cluster", "desk.yaml"]).expect_words(&["3 of 3 done"]);
    for (name, attempts) in study.attempts() {
        let steps = study.steps(&name);
        assert_eq!((attempts <= 2, steps.len() as u64, steps.last()), (true, STEPS, Some(&STEPS)), "{name}: a step was done twice");
    }
}
