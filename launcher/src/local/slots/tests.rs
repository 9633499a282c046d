//! Slots of a run whose controller is only pretended.

use std::fs;
use std::net::TcpListener;
use std::path::Path;
use std::sync::{Arc, Mutex};

use cloze_cluster::Recorded;
use cloze_cluster::host::host_name;

use super::*;
use crate::run_folder::{ControlFile, RunInfo};
use crate::sample::{recipe, script};

/// An output that the test keeps a hold of.
#[derive(Clone, Default)]
struct Screen(Arc<Mutex<Vec<u8>>>);

impl Write for Screen {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn options(folder: &Path, commands: &str) -> (SlotsOptions, Screen) {
    let paths = RunPaths::new(folder.to_owned());
    for folder in paths.folders() {
        fs::create_dir_all(folder).unwrap();
    }
    let started = Event::RunStarted { name: "run".to_owned(), recipe_hash: String::new(), workers: 4, min_workers: None, steps: 10 };
    let line = serde_json::to_string(&Recorded { time: 1.0, event: started }).unwrap();
    fs::write(paths.events(), format!("{line}\n")).unwrap();
    fs::write(paths.recipe(), recipe().to_yaml()).unwrap();
    fs::write(paths.info(), info(recipe().hash())).unwrap();
    let screen = Screen::default();
    let options = SlotsOptions {
        worker_binary: script(folder, commands),
        paths,
        slots: vec![2, 3],
        coordinator: None,
        token: None,
        coordinator_key: None,
        join_timeout: Duration::ZERO,
        output: Box::new(screen.clone()),
    };
    (options, screen)
}

/// A `run.json` with this hash.
fn info(recipe_hash: String) -> String {
    let info = RunInfo {
        name: "run".to_owned(),
        recipe_hash,
        data_fingerprint: String::new(),
        cloze_version: String::new(),
        worker_build: String::new(),
        git_revision: None,
        command_line: Vec::new(),
        host: "h".to_owned(),
        process_id: 1,
        started: 0.0,
    };
    serde_json::to_string(&info).unwrap()
}

fn control(options: &SlotsOptions, listener: &TcpListener) {
    let address = listener.local_addr().unwrap();
    ControlFile { address, token: Secret::new("token"), tls: None, dashboard: None, process_id: 1, local_workers: None }
        .write(&options.paths)
        .unwrap();
}

fn text(screen: &Screen) -> String {
    String::from_utf8(screen.0.lock().unwrap().clone()).unwrap()
}

#[test]
fn workers_that_leave_as_they_should_end_the_join() {
    let folder = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let (options, screen) = options(folder.path(), "echo $CLOZE_TOKEN \"$@\"; case \"$*\" in *'--worker 3'*) exit 130;; esac");
    control(&options, &listener);
    let (address, log) = (listener.local_addr().unwrap(), options.paths.log(2));
    serve_slots(options).unwrap();
    let found = fs::read_to_string(log).unwrap();
    let expected = format!("token train --coordinator {address} --run {} --worker 2 --local-workers 2\n", folder.path().display());
    assert!(found.contains(&expected), "{found}");
    let text = text(&screen);
    for part in
        ["worker 2 started as process ", "worker 3 started as process ", ") ended with exit code 0\n", ") ended with exit code 130\n"]
    {
        assert_eq!(text.matches(part).count(), 1, "{part:?} in {text}");
    }
}

#[test]
fn a_worker_that_fails_is_replaced_within_the_budget() {
    let folder = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let (options, screen) = options(folder.path(), "echo no good; exit 9");
    let options = SlotsOptions { slots: vec![3], ..options };
    control(&options, &listener);
    let failure = serve_slots(options).unwrap_err().downcast::<Failure>().unwrap();
    assert_eq!(failure.kind, FailureKind::Run);
    assert!(failure.what.starts_with("worker 3 ended with exit code 9: all 2 replacements"), "{failure}");
    assert!(failure.cause.as_ref().unwrap().contains("no good"), "{failure}");
    assert_eq!(text(&screen).matches("worker 3 restarted (attempt ").count(), 2);
}

#[test]
fn the_failure_of_the_run_is_told_here_too() {
    let folder = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let (options, _screen) = options(folder.path(), "while [ ! -e \"$5/over\" ]; do sleep 0.05; done; exit 9");
    control(&options, &listener);
    let paths = options.paths.clone();
    let failed = Failure::new(FailureKind::Damaged, "a shard is damaged");
    let line = serde_json::to_string(&Recorded { time: 2.0, event: Event::RunFailed { failure: failed.clone() } }).unwrap();
    let controller = std::thread::spawn(move || {
        while paths.process(3).metadata().is_err() {
            std::thread::yield_now();
        }
        let events = fs::read_to_string(paths.events()).unwrap();
        fs::write(paths.events(), format!("{events}{line}\n")).unwrap();
        fs::write(paths.root().join("over"), "").unwrap();
    });
    let failure = serve_slots(options).unwrap_err().downcast::<Failure>().unwrap();
    controller.join().unwrap();
    assert_eq!(failure, failed);
}

#[test]
fn what_cannot_be_joined_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let failure = |options: SlotsOptions| serve_slots(options).unwrap_err().downcast::<Failure>().unwrap();
    let nobody = failure(options(folder.path(), "exit 0").0);
    assert_eq!((nobody.kind, nobody.what.as_str()), (FailureKind::Environment, "this run has no controller"));

    let (foreign, _) = options(folder.path(), "exit 0");
    let foreign = SlotsOptions { slots: vec![2, 4], ..foreign };
    control(&foreign, &listener);
    assert_eq!(failure(foreign).expected.as_deref(), Some("slots below 4"));

    let address = listener.local_addr().unwrap();
    drop(listener);
    let away = failure(options(folder.path(), "exit 0").0);
    assert_eq!((away.what.as_str(), away.place), ("the coordinator cannot be reached", Some(address.to_string())));
}

#[tokio::test]
async fn a_log_that_is_away_for_a_while_ends_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let (mut options, _screen) = options(folder.path(), "kill -STOP $$");
    control(&options, &listener);
    let (events, grace) = (options.paths.events(), Duration::from_secs(recipe().cluster.coordinator_grace_s));
    let signals = Signals::listen().unwrap();
    let mut outpost = Box::pin(Outpost::open(&mut options, &signals)).await.unwrap();
    let kept = folder.path().join("kept");
    fs::rename(&events, &kept).unwrap();
    // A folder can be opened, and not be read.
    fs::create_dir(&events).unwrap();
    let now = Instant::now();
    outpost.hear_events(now).unwrap();
    outpost.hear_events(now + grace).unwrap();
    let late = now + grace + Duration::from_millis(1);
    let failure = outpost.hear_events(late).unwrap_err().downcast::<Failure>().unwrap();
    assert_eq!(failure.kind, FailureKind::Storage);
    fs::remove_dir(&events).unwrap();
    fs::rename(&kept, &events).unwrap();
    outpost.hear_events(late).unwrap();
    fs::remove_file(&events).unwrap();
    fs::create_dir(&events).unwrap();
    outpost.hear_events(late + grace).unwrap();
    outpost.crew.end(Duration::ZERO).await;
}

#[test]
fn a_slot_of_the_controller_is_left_alone() {
    let folder = tempfile::tempdir().unwrap();
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let (options, screen) = options(folder.path(), "exit 0");
    control(&options, &listener);
    let paths = options.paths.clone();
    let mut child = std::process::Command::new("/bin/sh")
        .args(["-c", "read line", "worker", "train", "--run"])
        .arg(paths.root())
        .args(["--worker", "2"])
        .stdin(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let (process_id, start_ticks) = (child.id(), super::super::record::start_ticks(child.id()).unwrap());
    let record = ProcessRecord {
        worker: 2,
        slots: 4,
        process_id,
        start_ticks,
        host: host_name(),
        recipe_hash: "l".to_owned(),
        by_join: false,
        log_start: 0,
    };
    record.write(&paths).unwrap();
    let failure = serve_slots(options).unwrap_err().downcast::<Failure>().unwrap();
    assert_eq!(failure.kind, FailureKind::Recipe);
    assert_eq!(failure.found, Some(format!("slot 2 with process {process_id}")));
    // Nothing was started, and the controller's record is as it was.
    assert_eq!(text(&screen), "");
    assert_eq!(living(&paths).unwrap(), [record]);
    child.kill().unwrap();
    child.wait().unwrap();
}
