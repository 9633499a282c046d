//! A run can be watched and stopped from a browser, from Prometheus and from another terminal.

use std::ffi::OsString;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use serde_json::Value;

use crate::sandbox::{Process, Run, World, repository, run_command, skipped, wait_until};

/// Longest wait for a run to train.
const START_TIMEOUT: Duration = Duration::from_secs(90);
/// Longest wait for an answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// The browser that `scripts/test-tools.sh` installs.
const CHROMIUM: &str = "/usr/bin/chromium";

/// A run that trains until it is stopped, with what its `control.json` says.
struct Watched {
    process: Process,
    run: Run,
    url: String,
    token: String,
}

impl Watched {
    fn start(world: &World) -> Self {
        let endless = ["--workers", "2", "--set", "train.steps=1000000", "--set", "checkpoint.every_steps=1000000"];
        let process = world.start_training("watched", &endless);
        let run = world.run("watched");
        wait_until("the run trains", START_TIMEOUT, || run.last_step() >= 5);
        let control = run.control().expect("a live run has a control.json");
        let text = |key: &str| control[key].as_str().expect("control.json names dashboard and token").to_owned();
        let (url, token) = (text("dashboard"), text("token"));
        Self { process, run, url, token }
    }

    /// `host:port`.
    fn authority(&self) -> &str {
        self.url.trim_start_matches("http://").trim_end_matches('/')
    }

    /// Sends a request with these header lines besides `Host`; returns status and body.
    #[track_caller]
    fn ask(&self, line: &str, headers: &str) -> (u16, String) {
        self.send(&format!("{line} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n{headers}\r\n", self.authority()))
    }

    #[track_caller]
    fn send(&self, request: &str) -> (u16, String) {
        let mut stream = TcpStream::connect(self.authority()).expect("connect to the dashboard");
        stream.set_read_timeout(Some(ANSWER_TIMEOUT)).expect("bound the wait");
        stream.write_all(request.as_bytes()).expect("send a request");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("read an answer");
        let (head, body) = answer.split_once("\r\n\r\n").expect("an answer has a head");
        let status = head.split(' ').nth(1).and_then(|status| status.parse().ok()).expect("an answer has a status");
        (status, body.to_owned())
    }
}

#[test]
fn a_run_is_watched_and_stopped_over_http() {
    let world = World::prepared();
    let watched = Watched::start(&world);
    let token = format!("Authorization: Bearer {}\r\n", watched.token);

    let (status, view) = watched.ask("GET /api/view", "");
    let view: Value = serde_json::from_str(&view).expect("the view is JSON");
    assert_eq!((status, &view["state"], &view["name"]), (200, &Value::from("training"), &Value::from("watched")));
    let (status, metrics) = watched.ask("GET /metrics", "");
    assert_eq!(status, 200);
    check_metrics(&metrics);

    // Reading is free, orders are not, and nobody may ask by a foreign name.
    assert_eq!(watched.ask("POST /api/stop", "").0, 401);
    assert_eq!(watched.ask("POST /api/stop", "Authorization: Bearer wrong\r\n").0, 401);
    assert_eq!(watched.ask("GET /api/stop", &token).0, 405);
    assert_eq!(watched.send("GET /api/view HTTP/1.1\r\nHost: evil.example\r\nConnection: close\r\n\r\n").0, 403);
    assert_eq!(watched.ask("POST /api/stop", "Content-Length: 100000\r\n").0, 413);
    let control = fs::metadata(watched.run.path.join("control.json")).expect("look at control.json");
    assert_eq!(control.permissions().mode() & 0o077, 0, "others could read the token");

    let status = world.done(&["status", "watched", "--json"]).stdout;
    let status: Value = serde_json::from_str(&status).expect("the status is JSON");
    assert_eq!((&status["controller_lives"], &status["run"]["state"]), (&Value::from(true), &Value::from("training")));
    let page = world.done(&["status", &watched.url]).stdout;
    assert!(page.starts_with("run watched: training\n"), "{page}");

    let watch = Process::start(&mut world.command(&["watch", &watched.url]), "");
    wait_until("the watcher follows", ANSWER_TIMEOUT, || watched.ask("GET /metrics", "").1.contains("\ncloze_dashboard_streams 1\n"));
    assert_eq!(watched.ask("POST /api/stop", &token).0, 202);
    let Watched { process, run, .. } = watched;
    process.wait().expect_code(130);
    let step = run.last_step();
    assert_eq!(run.events_named("run_stopped")[0]["step"], step);
    assert!(run.control().is_none(), "control.json is removed with the run's end");
    // Whoever watches ends as the run does; one that comes later sees the same end.
    let lines = watch.wait().expect_code(130).stdout;
    assert!(lines.lines().next_back().is_some_and(|line| line.starts_with("stopped · ")), "{lines}");
    world.cloze(&["watch", "watched"]).expect_code(130).expect_words(&[&format!("the run was stopped after step {step}")]);
    assert!(world.done(&["status", "watched"]).stdout.starts_with("run watched: stopped\n"));
}

#[test]
fn a_browser_watches_and_stops_a_run() {
    let Some(packages) = node_packages("the dashboard in a browser") else { return };
    let world = World::prepared();
    let Watched { process, run, url, token } = Watched::start(&world);
    let screenshots = std::env::var_os("CLOZE_SCREENSHOTS").map_or_else(|| world.path("screenshots"), PathBuf::from);
    fs::create_dir_all(&screenshots).expect("make a folder for the screenshots");
    let mut command = Command::new("node");
    command.arg(repository().join("tests/browser/dashboard.mjs")).args([OsString::from(url), token.into(), screenshots.clone().into()]);
    command.env("CLOZE_NODE_PACKAGES", packages).env("CLOZE_CHROMIUM", CHROMIUM);
    let outcome = run_command(&mut command).expect_code(0);
    let measured: Value = serde_json::from_str(outcome.stdout.trim()).expect("the script prints JSON");
    assert!(measured["steps"][0].as_u64() < measured["steps"][1].as_u64(), "{measured}");
    let failure = &measured["failure"];
    for (column, expected) in [("Cause", "connection closed"), ("Worker", "1"), ("What was done", "replaced"), ("Steps lost", "0")] {
        assert_eq!(failure[column], expected, "{measured}");
    }
    let text = |column: &str| failure[column].as_str().unwrap_or_default().to_owned();
    assert!(text("Recovery").ends_with(" s") && text("Reason").ends_with("; SIGKILL"), "{measured}");
    for name in ["log-scale", "failure", "phone", "dark", "light", "confirm", "stopped"] {
        assert!(screenshots.join(name).with_extension("png").is_file(), "{name}");
    }
    process.wait().expect_code(130);
    assert_eq!(run.events_named("run_stopped").len(), 1);
    // One from the page, one with the stop.
    assert!(run.events_named("checkpoint_saved").len() >= 2);
}

/// Prometheus' own linter, where it is installed; the format itself is checked in any case.
fn check_metrics(metrics: &str) {
    for line in metrics.lines().filter(|line| !line.starts_with('#')) {
        let (series, value) = line.rsplit_once(' ').expect("a sample has a value");
        assert!(series.starts_with("cloze_"), "{line}");
        assert!(value.parse::<f64>().is_ok_and(f64::is_finite), "{line}");
    }
    assert!(metrics.lines().any(|line| line == "cloze_workers{state=\"training\"} 2"), "{metrics}");
    if !is_installed("promtool") {
        skipped("metrics by Prometheus' linter", "promtool is not installed");
        return;
    }
    let outcome = Process::start(Command::new("promtool").args(["check", "metrics"]), metrics).wait().expect_code(0);
    assert_eq!(outcome.stderr, "", "the linter has remarks");
}

/// The folder with the browser's driver; where something is missing, `None`, and a line on stderr says which test is skipped.
fn node_packages(test: &str) -> Option<PathBuf> {
    let Some(tools) = std::env::var_os("CLOZE_TEST_TOOLS").filter(|folder| !folder.is_empty()) else {
        skipped(test, "CLOZE_TEST_TOOLS is not set; `make test` sets it");
        return None;
    };
    let packages = Path::new(&tools).with_file_name("node");
    let needed = [packages.join("node_modules/playwright-core/package.json"), PathBuf::from(CHROMIUM)];
    if let Some(missing) = needed.iter().find(|path| !path.exists()) {
        skipped(test, &format!("{} is not there", missing.display()));
        return None;
    }
    if !is_installed("node") {
        skipped(test, "node is not installed");
        return None;
    }
    Some(packages)
}

fn is_installed(program: &str) -> bool {
    Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}
