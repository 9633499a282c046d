//! What the faults happen to: a run with its controller, its bucket behind a proxy, its cache disk, and hosts where there are some.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::net::SocketAddr;
use std::process::Command;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde_json::Value;

use super::schedule::{NUM_LOCAL_WORKERS, NUM_OTHER_HOSTS};
use crate::sandbox::{ACCESS_KEY, EventTail, FaultProxy, Network, Process, Run, SECRET_KEY, SeaweedFs, SmallDisk, World, wait_until};

/// Name of the run folder.
pub const RUN: &str = "chaos";
/// Name of its recipe.
pub const RECIPE: &str = "chaos.yaml";
/// Longest wait for one event. Noticing takes seconds and starting a process about one; a loaded machine takes many times that.
const EVENT_TIMEOUT: Duration = Duration::from_secs(90);
/// Interval at which the events are read.
const POLL_INTERVAL: Duration = Duration::from_millis(2);
/// Events and lines of a log that a failed test shows.
const NUM_SHOWN: usize = 20;

/// A run and everything around it. What it consists of ends in this order: controller, proxy, server, disk, network, and the folder with
/// the workers that are left.
pub struct Stage {
    controller: Option<Process>,
    /// `cloze join` on the other hosts, by host from 1.
    joined: Vec<Option<Process>>,
    /// The run.
    pub run: Run,
    tail: EventTail,
    events: Vec<Value>,
    addresses: BTreeSet<SocketAddr>,
    /// Between the run and its bucket.
    pub proxy: FaultProxy,
    /// The bucket.
    pub server: SeaweedFs,
    /// Where the newest checkpoint is kept besides; `None` where this process may not mount one.
    pub disk: Option<SmallDisk>,
    /// The hosts; without them the whole run is on this one.
    pub network: Option<Network>,
    /// The folder of it all.
    pub world: World,
}

/// What a stage is made of.
pub struct Props {
    /// The folder, with its recipe.
    pub world: World,
    /// The bucket.
    pub server: SeaweedFs,
    /// In front of it.
    pub proxy: FaultProxy,
    /// For the cache.
    pub disk: Option<SmallDisk>,
    /// The hosts.
    pub network: Option<Network>,
}

impl Stage {
    /// A run that is not started yet.
    pub fn new(props: Props) -> Self {
        let Props { world, server, proxy, disk, network } = props;
        let run = world.run(RUN);
        let tail = EventTail::new(run.path.join("events.jsonl"));
        let (joined, addresses) = ((0..NUM_OTHER_HOSTS).map(|_| None).collect(), BTreeSet::new());
        Self { controller: None, joined, run, tail, events: Vec::new(), addresses, proxy, server, disk, network, world }
    }

    /// Starts the run, or goes on with it, with drills such as `hang:1@20`.
    pub fn start(&mut self, drills: &[String]) {
        let is_new = !self.run.path.exists();
        let workers = self.num_workers().to_string();
        let mut arguments = if is_new { vec!["train", RECIPE, "--run", RUN] } else { vec!["resume", RUN] };
        arguments.extend(["--workers", &workers, "--quiet"]);
        arguments.extend(drills.iter().flat_map(|drill| ["--drill", drill]));
        let (local, listen) = (NUM_LOCAL_WORKERS.to_string(), self.network.as_ref().map(|network| format!("{}:0", network.address(0))));
        if let Some(listen) = &listen {
            arguments.extend(["--local", &local, "--listen", listen]);
        }
        self.controller = Some(Process::start(&mut self.command(0, &arguments), ""));
        if self.network.is_some() {
            self.wait_for_control();
            (1..=NUM_OTHER_HOSTS).for_each(|host| self.join_unless_there(host));
        }
    }

    /// Starts the workers of another host where they do not run already.
    pub fn join_unless_there(&mut self, host: usize) {
        if self.joined[host - 1].as_mut().is_none_or(Process::has_ended) {
            let (run, slot) = (self.run.path.display().to_string(), Self::slot_of_host(host).to_string());
            let process = Process::start(&mut self.command(host, &["join", &run, "--slots", &slot]), "");
            self.joined[host - 1] = Some(process);
        }
    }

    /// Ends the controller with SIGKILL, which leaves its workers alone.
    pub fn kill_controller(&mut self) {
        self.controller.take().expect("the controller runs").kill();
    }

    /// Asks the run to stop, waits for that, and returns the step that was saved.
    pub fn stop(&mut self) -> u64 {
        let mark = self.mark();
        let controller = self.controller.take().expect("the controller runs");
        controller.terminate();
        controller.wait().expect_code(130);
        for process in self.joined.iter_mut().filter_map(Option::take) {
            let outcome = process.wait();
            assert!([Some(0), Some(130)].contains(&outcome.code), "`cloze join` ended with {:?}:\n{}", outcome.code, outcome.stderr);
        }
        self.wait_event("the run has stopped", mark, |event| event["event"] == "run_stopped")["step"].as_u64().expect("a step")
    }

    /// Waits for the end of the run, which must be a good one.
    pub fn finish(&mut self, timeout: Duration) {
        self.controller.take().expect("the controller runs").wait_within(timeout).expect_code(0);
        for process in self.joined.iter_mut().filter_map(Option::take) {
            process.wait().expect_code(0);
        }
        self.mark();
    }

    /// Number of workers of the run.
    pub fn num_workers(&self) -> u32 {
        NUM_LOCAL_WORKERS + if self.network.is_some() { NUM_OTHER_HOSTS as u32 } else { 0 }
    }

    /// The slot of the worker on another host.
    pub fn slot_of_host(host: usize) -> u32 {
        NUM_LOCAL_WORKERS + host as u32 - 1
    }

    /// Where something of the run listened at some time.
    pub fn addresses(&self) -> &BTreeSet<SocketAddr> {
        &self.addresses
    }

    /// The process of a worker; waits for one that is just being replaced.
    pub fn worker_process(&self, worker: u32) -> u32 {
        let mut found = None;
        wait_until("the worker has a process", EVENT_TIMEOUT, || {
            found = self.run.process_of(worker);
            found.is_some()
        });
        found.expect("it was just found")
    }

    /// Reads the events that have come; what comes from now on is behind the mark.
    pub fn mark(&mut self) -> usize {
        for event in self.tail.read() {
            let url = event["url"].as_str().filter(|_| event["event"] == "dashboard_listening");
            self.addresses.extend(url.and_then(address_in));
            self.events.push(event);
        }
        let control = self.run.control();
        self.addresses.extend(
            control.and_then(|control| control["address"].as_str().and_then(|address| address.parse::<std::net::SocketAddr>().ok())),
        );
        self.events.len()
    }

    /// The first event behind a mark that is meant; waits for it.
    #[track_caller]
    pub fn wait_event(&mut self, what: &str, mark: usize, is_meant: impl Fn(&Value) -> bool) -> Value {
        let deadline = Instant::now() + EVENT_TIMEOUT;
        let mut looked_at = mark;
        loop {
            let was_running = self.controller.as_mut().is_some_and(|controller| !controller.has_ended());
            let end = self.mark();
            if let Some(event) = self.events[looked_at..end].iter().find(|event| is_meant(event)) {
                return event.clone();
            }
            looked_at = end;
            if self.controller.is_some() && !was_running {
                let outcome = self.controller.take().expect("the controller was there").wait();
                panic!("{what}: the controller ended with {:?}\n{}\n{}", outcome.code, outcome.stderr, self.last_words());
            }
            assert!(Instant::now() < deadline, "{what}: not within {EVENT_TIMEOUT:?}\n{}", self.last_words());
            std::thread::sleep(POLL_INTERVAL);
        }
    }

    /// Waits until so many steps were reported behind a mark, and returns the first of them.
    pub fn wait_steps(&mut self, mark: usize, count: usize) -> Value {
        let is_step = |event: &Value| event["event"] == "step";
        let first = self.wait_event("the run goes on", mark, is_step);
        for _ in 1..count {
            let mark = self.mark();
            self.wait_event("the run goes on", mark, is_step);
        }
        first
    }

    /// The mark before an event that was waited for behind a mark.
    pub fn place_of(&self, mark: usize, event: &Value) -> usize {
        let place = self.events[mark..].iter().position(|found| found == event);
        mark + place.expect("the event was found behind the mark")
    }

    fn wait_for_control(&mut self) {
        wait_until("the controller says where it listens", EVENT_TIMEOUT, || self.run.control().is_some());
    }

    /// `cloze` on a host, with the keys of the bucket.
    fn command(&self, host: usize, arguments: &[&str]) -> Command {
        let mut command = match &self.network {
            Some(network) => self.world.command_on(network, host, arguments),
            None => self.world.command(arguments),
        };
        with_keys(&mut command);
        command
    }

    /// The newest events, and the ends of the logs.
    fn last_words(&self) -> String {
        let newest: Vec<String> = self.events.iter().rev().take(NUM_SHOWN).rev().map(Value::to_string).collect();
        let mut text = format!("== newest events\n{}\n", newest.join("\n"));
        for entry in fs::read_dir(self.run.path.join("logs")).into_iter().flatten().filter_map(Result::ok) {
            let log = String::from_utf8_lossy(&fs::read(entry.path()).unwrap_or_default()).into_owned();
            let lines: Vec<&str> = log.lines().collect();
            let end = lines[lines.len().saturating_sub(NUM_SHOWN)..].join("\n");
            writeln!(text, "== {}\n{end}", entry.path().display()).expect("text can be written");
        }
        text
    }
}

/// The keys of the bucket, as the environment of a program.
pub fn with_keys(command: &mut Command) {
    command.env("AWS_ACCESS_KEY_ID", ACCESS_KEY).env("AWS_SECRET_ACCESS_KEY", SECRET_KEY);
}

/// Now, as events count time.
pub fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).expect("the clock is right").as_secs_f64()
}

/// Host and port of a url.
fn address_in(url: &str) -> Option<SocketAddr> {
    url.strip_prefix("http://")?.split('/').next()?.parse().ok()
}
