//! Whole runs with workers that only fail.

use std::path::Path;

use cloze_cluster::Recorded;

use super::*;
use crate::local::record::{living, send, start_ticks};
use crate::run_folder::NewRun;
use crate::sample::{recipe, script};

fn folder(root: &Path) -> RunFolder {
    let recipe = recipe();
    let new = NewRun {
        name: "run",
        recipe: &recipe,
        data_fingerprint: String::new(),
        command_line: Vec::new(),
        worker_build: "build".to_owned(),
    };
    RunFolder::create(root, &new).unwrap()
}

fn plan(worker_binary: &Path) -> LaunchPlan {
    LaunchPlan {
        recipe: recipe(),
        total_steps: 10,
        workers: 1,
        local_workers: 1,
        worker_binary: worker_binary.to_owned(),
        worker_build: "build".to_owned(),
        bind: None,
        join_timeout: Duration::from_mins(1),
        resumed: false,
        dashboard: None,
        drills: Vec::new(),
        until_step: None,
        changes: Vec::new(),
    }
}

fn run(run: RunFolder, plan: LaunchPlan) -> anyhow::Result<RunEnd> {
    launch(LaunchOptions { run, plan, output: Box::new(std::io::sink()), style: TerminalStyle::default() })
}

fn events(root: &Path) -> Vec<Event> {
    let text = std::fs::read_to_string(root.join("run").join("events.jsonl")).unwrap();
    text.lines().map(|line| serde_json::from_str::<Recorded>(line).unwrap().event).collect()
}

fn failure(end: anyhow::Result<RunEnd>) -> Failure {
    match end {
        Ok(RunEnd::Failed(failure)) => failure,
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_worker_that_always_fails_is_restarted_within_the_budget() {
    let root = tempfile::tempdir().unwrap();
    // A shell that is given a worker's arguments complains that there is no script `train`.
    let failure = failure(run(folder(root.path()), plan(Path::new("/bin/sh"))));
    assert_eq!(failure.kind, FailureKind::Run);
    assert!(failure.what.starts_with("worker 0 ended with exit code "), "{failure}");
    assert!(failure.what.ends_with("all 2 replacements of this run are used (`cluster.max_restarts`)"), "{failure}");
    assert!(failure.cause.as_ref().unwrap().contains("train"), "its last words: {failure}");
    let events = events(root.path());
    let restarts: Vec<(u32, u32)> = events
        .iter()
        .filter_map(|event| match event {
            Event::WorkerRestarted { attempt, budget_left, .. } => Some((*attempt, *budget_left)),
            _ => None,
        })
        .collect();
    assert_eq!(restarts, [(1, 1), (2, 0)]);
    let exits = events.iter().filter(|event| matches!(event, Event::WorkerExited { worker: 0, tail, .. } if tail.contains("train")));
    assert_eq!(exits.count(), 3);
    assert_eq!(events.iter().filter(|event| matches!(event, Event::WorkerStarted { .. })).count(), 3);
    assert_eq!(events.last(), Some(&Event::RunFailed { failure }));
    let log = std::fs::read_to_string(root.path().join("run").join("logs").join("worker-0.log")).unwrap();
    assert_eq!(log.lines().filter(|line| line.starts_with("== worker 0, process ")).count(), 3);
    assert!(!root.path().join("run").join("control.json").exists());
}

#[test]
fn a_missing_binary_is_the_machines_fault() {
    let root = tempfile::tempdir().unwrap();
    let error = run(folder(root.path()), plan(Path::new("/nowhere/cloze-worker"))).unwrap_err();
    let failure = error.downcast::<Failure>().unwrap();
    assert_eq!((failure.kind, failure.place.as_deref()), (FailureKind::Environment, Some("/nowhere/cloze-worker")));
    assert_eq!(events(root.path()).last(), Some(&Event::RunFailed { failure }));
    assert!(!root.path().join("run").join("control.json").exists());
}

#[test]
fn impossible_plans_are_refused() {
    let sh = Path::new("/bin/sh");
    let mut elastic = plan(sh);
    elastic.recipe.cluster.min_workers = Some(2);
    let cases = [
        (LaunchPlan { drills: vec!["kill:1@5".parse().unwrap()], ..plan(sh) }, "a worker below 1"),
        (LaunchPlan { local_workers: 2, ..plan(sh) }, "at most 1, the number of all workers"),
        (LaunchPlan { workers: 2000, local_workers: 1025, ..plan(sh) }, "at most 1024 on one machine (`--local`)"),
        (
            LaunchPlan { bind: Some(SocketAddr::from(([0, 0, 0, 0], 0))), ..plan(sh) },
            "an address of this machine that its workers can reach",
        ),
        (elastic, "at least 2 workers (`cluster.min_workers`)"),
    ];
    for (plan, expected) in cases {
        let root = tempfile::tempdir().unwrap();
        let failure = run(folder(root.path()), plan).unwrap_err().downcast::<Failure>().unwrap();
        assert_eq!((failure.kind, failure.expected.as_deref()), (FailureKind::Recipe, Some(expected)));
    }
}

/// A run folder as a killed controller leaves it: one worker lives and looks for it at this address.
fn left_behind(root: &Path, address: SocketAddr, slots: u32) -> (RunFolder, std::process::Child) {
    let run = folder(root);
    let binary = script(root, "kill -STOP $$");
    let paths = run.paths();
    let mut command = std::process::Command::new(binary);
    command.args(["train", "--run"]).arg(paths.root()).args(["--worker", "0"]);
    let child = command.spawn().unwrap();
    let process_id = child.id();
    let start_ticks = start_ticks(process_id).unwrap();
    let host = cloze_cluster::host::host_name();
    let record =
        ProcessRecord { worker: 0, slots, process_id, start_ticks, host, recipe_hash: recipe().full_hash(), by_join: false, log_start: 0 };
    record.write(paths).unwrap();
    std::fs::write(paths.log(0), "").unwrap();
    ControlFile { address, token: Secret::new("token"), tls: None, dashboard: None, process_id: 1, local_workers: None }
        .write(paths)
        .unwrap();
    assert_eq!(living(paths).unwrap(), [record]);
    (run, child)
}

#[test]
fn a_living_worker_of_another_world_is_killed_first() {
    let root = tempfile::tempdir().unwrap();
    let (folder, mut child) = left_behind(root.path(), SocketAddr::from(([127, 0, 0, 1], 1)), 3);
    let reaper = std::thread::spawn(move || child.wait().unwrap());
    failure(run(folder, LaunchPlan { resumed: true, ..plan(Path::new("/bin/sh")) }));
    assert!(!reaper.join().unwrap().success());
    let warned = |event: &Event| matches!(event, Event::Warning { message } if message.contains("a run of 3 workers"));
    assert!(events(root.path()).iter().any(warned));
}

#[test]
fn a_taken_address_is_told_and_its_workers_are_killed() {
    let root = tempfile::tempdir().unwrap();
    let taken = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let (folder, mut child) = left_behind(root.path(), taken.local_addr().unwrap(), 1);
    let reaper = std::thread::spawn(move || child.wait().unwrap());
    failure(run(folder, LaunchPlan { resumed: true, ..plan(Path::new("/bin/sh")) }));
    assert!(!reaper.join().unwrap().success());
    let warnings: Vec<String> = events(root.path())
        .into_iter()
        .filter_map(|event| match event {
            Event::Warning { message } => Some(message),
            _ => None,
        })
        .collect();
    assert!(warnings.iter().any(|message| message.starts_with("the coordinator listens at another address than before")), "{warnings:?}");
    assert!(warnings.iter().any(|message| message.ends_with("is taken")), "{warnings:?}");
}

#[test]
fn a_living_worker_is_waited_for_at_its_address() {
    let root = tempfile::tempdir().unwrap();
    // A free port; the listener is closed before the run binds it.
    let address = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap();
    let (folder, mut child) = left_behind(root.path(), address, 1);
    let paths = folder.paths().clone();
    let process_id = child.id();
    // The worker never comes back: it is ended from here once the new controller listens at the old address.
    let reaper = std::thread::spawn(move || {
        while ControlFile::read(&paths).unwrap().is_none_or(|file| file.process_id != std::process::id()) {
            std::thread::yield_now();
        }
        assert_eq!(ControlFile::read(&paths).unwrap().map(|file| (file.address, file.token)), Some((address, Secret::new("token"))));
        send(process_id, rustix::process::Signal::KILL).unwrap();
        child.wait().unwrap()
    });
    let failure = failure(run(folder, LaunchPlan { resumed: true, ..plan(Path::new("/bin/sh")) }));
    assert!(!reaper.join().unwrap().success());
    assert!(failure.what.contains("all 2 replacements"), "{failure}");
    let started = events(root.path()).iter().filter(|event| matches!(event, Event::WorkerStarted { .. })).count();
    assert_eq!(started, 2, "the living worker was not started a second time, and its replacements were");
    let told = |event: &Event| matches!(event, Event::Warning { message } if message.contains(" have 30 s to come back"));
    assert!(events(root.path()).iter().any(told), "the recipe's `stop_timeout_s` is 30");
}

#[test]
fn workers_that_save_may_take_as_long_as_a_stop_to_come_back() {
    let cases = [(10, 60, 15), (15, 60, 15), (30, 60, 30), (600, 60, 60), (600, 5, 15)];
    for (stop_timeout_s, join_timeout_s, seconds) in cases {
        let mut plan = plan(Path::new("/bin/sh"));
        plan.recipe.checkpoint.stop_timeout_s = stop_timeout_s;
        plan.join_timeout = Duration::from_secs(join_timeout_s);
        assert_eq!(plan.come_back_timeout(), Duration::from_secs(seconds), "{stop_timeout_s} {join_timeout_s}");
    }
}

#[test]
fn a_damaged_journal_costs_no_worker() {
    let root = tempfile::tempdir().unwrap();
    let address = std::net::TcpListener::bind(("127.0.0.1", 0)).unwrap().local_addr().unwrap();
    let (folder, mut child) = left_behind(root.path(), address, 1);
    let paths = folder.paths().clone();
    std::fs::write(paths.journal(), "{\n").unwrap();
    let error = run(folder, LaunchPlan { resumed: true, ..plan(Path::new("/bin/sh")) }).unwrap_err();
    assert_eq!(error.downcast::<Failure>().unwrap().kind, FailureKind::Damaged);
    assert_eq!(living(&paths).unwrap().len(), 1, "the worker lives");
    assert!(ControlFile::read(&paths).unwrap().is_some_and(|file| file.address == address), "and can be taken over later");
    assert!(!paths.events().exists(), "nothing was written");
    child.kill().unwrap();
    child.wait().unwrap();
}

#[test]
fn a_run_whose_workers_may_live_on_another_host_is_left_alone() {
    let root = tempfile::tempdir().unwrap();
    let folder = folder(root.path());
    let paths = folder.paths().clone();
    let host = "another host".to_owned();
    let record = ProcessRecord {
        worker: 0,
        slots: 1,
        process_id: 1,
        start_ticks: 1,
        host,
        recipe_hash: recipe().full_hash(),
        by_join: false,
        log_start: 0,
    };
    record.write(&paths).unwrap();
    let address = SocketAddr::from(([127, 0, 0, 1], 1));
    ControlFile { address, token: Secret::new("token"), tls: None, dashboard: None, process_id: 1, local_workers: None }
        .write(&paths)
        .unwrap();
    let error = run(folder, LaunchPlan { resumed: true, ..plan(Path::new("/bin/sh")) }).unwrap_err();
    let failure = error.downcast::<Failure>().unwrap();
    assert_eq!((failure.kind, failure.what.as_str()), (FailureKind::Environment, "workers of host another host may still live"));
    assert!(!paths.events().exists(), "nothing was written");
}

#[test]
fn an_exchanged_binary_is_told_from_that_of_the_living() {
    let root = tempfile::tempdir().unwrap();
    let (_run, mut child) = left_behind(root.path(), SocketAddr::from(([127, 0, 0, 1], 9)), 1);
    let living = living(&RunPaths::find(&root.path().join("run")).unwrap()).unwrap();
    // The worker that lives is a shell; a script is none of which it could be told.
    for (binary, expected) in [("/proc/self/exe", true), ("/bin/sh", false), ("/etc/passwd", false)] {
        assert_eq!(is_exchanged(Path::new(binary), &living), expected, "{binary}");
    }
    child.kill().unwrap();
    child.wait().unwrap();
}
