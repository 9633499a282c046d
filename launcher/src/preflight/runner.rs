//! Starts an agent on every node and asks for one measurement after another, all nodes at the same time where they do not disturb each other.

use std::collections::BTreeMap;
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use cloze_recipes::site::Preflight;
use serde::Serialize;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, AsyncWriteExt as _, BufReader};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};
use tokio::sync::{Mutex, Semaphore};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, timeout, timeout_at};

use super::decision::{BadNode, decide, median, warnings};
use super::link::MAX_WINDOW_MS;
use super::protocol::{Answer, MAX_LINE_BYTES, Measurements, NodeMeasurement, PairMeasurement, Peer, Ready, Request, Setup};
use super::schedule::rounds;
use crate::hosts::RemoteHost;
use crate::words::counted;

/// Agents that are started at the same time; a remote shell's server refuses many more.
const MAX_STARTS: usize = 64;
/// Share of the time that starting the agents may take.
const START_SHARE: f64 = 0.4;
/// Share of the time after which devices and place must have been checked, so that some is left for the links of those that have.
const NODES_SHARE: f64 = 0.75;
/// How long each direction of a link is measured, and what a pair needs beside that.
const WINDOW_MS: u64 = 500;
const PAIR_OVERHEAD_MS: u64 = 300;
/// Longest time for one pair. Connecting may try several addresses.
const PAIR_TIMEOUT: Duration = Duration::from_secs(20);
/// Agents that are asked for their clock at the same time: all answers come to one thread, whose own delay must stay far below the skew that
/// matters, which is 30 s.
const MAX_QUESTIONS: usize = 256;
/// Longest wait for an agent's clock. One that hangs must not use up the time of those that wait for their turn.
const CLOCK_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest wait for an agent that was let go.
const END_TIMEOUT: Duration = Duration::from_secs(3);
/// Last bytes of an agent's standard error that are kept.
const STDERR_BYTES: usize = 2000;

/// One node of the list.
#[derive(Clone, Debug)]
pub struct NodeOptions {
    /// How a command gets there.
    pub host: RemoteHost,
    /// Address at which the other nodes reach it; `None` tries its names and all its addresses.
    pub address: Option<String>,
}

/// What is to be checked.
pub struct PreflightOptions<'a> {
    /// The nodes.
    pub nodes: Vec<NodeOptions>,
    /// The words that start an agent on a node.
    pub agent: Vec<String>,
    /// What every agent is told, but for its own name.
    pub setup: Setup,
    /// When a node is bad, and how long everything may take.
    pub limits: Preflight,
    /// Told what is being done.
    pub progress: &'a mut dyn FnMut(&str),
}

/// The outcome.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct PreflightReport {
    /// No node is bad.
    pub ok: bool,
    /// Nodes that must not be used.
    pub bad_nodes: Vec<BadNode>,
    /// What is odd and no node's fault, as far as anybody can tell.
    pub warnings: Vec<String>,
    /// What was measured of the nodes, in their order.
    pub nodes: Vec<NodeMeasurement>,
    /// What was measured between those pairs that were.
    pub pairs: Vec<PairMeasurement>,
}

/// Checks all nodes. Blocks, within the limits' time and the few seconds that ending the agents takes. A node that does not do as it
/// must is part of the report; an error is a failure of this program.
pub fn run_preflight(options: PreflightOptions<'_>) -> anyhow::Result<PreflightReport> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start the runtime of the pre-flight")?;
    let limits = options.limits;
    let measured = runtime.block_on(Box::pin(Check::run(options)))?;
    let (bad_nodes, warnings) = (decide(&measured, &limits), warnings(&measured));
    let Measurements { nodes, pairs } = measured;
    Ok(PreflightReport { ok: bad_nodes.is_empty(), bad_nodes, warnings, nodes, pairs })
}

/// The state of a check.
struct Check {
    nodes: Vec<Node>,
    deadline: Instant,
}

/// A node, and the agent on it while it answers.
#[derive(Clone)]
struct Node {
    address: Option<String>,
    ready: Option<Ready>,
    agent: Arc<Mutex<Option<Agent>>>,
    measured: NodeMeasurement,
}

impl Check {
    async fn run(options: PreflightOptions<'_>) -> anyhow::Result<Measurements> {
        let PreflightOptions { nodes, agent, setup, limits, progress } = options;
        let total = Duration::from_secs(limits.timeout_s.into());
        let started = Instant::now();
        progress(&format!("starting {}", counted(nodes.len(), "agent")));
        let nodes = start_all(nodes, agent, &setup, started + total.mul_f64(START_SHARE)).await?;
        let mut check = Self { nodes, deadline: started + total };
        check.compare_clocks().await?;
        progress("checking devices and the place of the checkpoints");
        check.ask_nodes(started + total.mul_f64(NODES_SHARE)).await?;
        let pairs = check.measure_pairs(progress).await?;
        let mut measured = Vec::new();
        for node in check.nodes {
            if let Some(agent) = node.agent.lock().await.take() {
                agent.end().await;
            }
            measured.push(node.measured);
        }
        Ok(Measurements { nodes: measured, pairs })
    }

    /// How far each clock is ahead of their median: of each, the difference to this one in the middle of question and answer. The first
    /// node's may be the one that is wrong. Many are asked at the same time: by the last of a thousand that are asked one after another, this clock may have been set.
    async fn compare_clocks(&mut self) -> anyhow::Result<()> {
        let questions = Arc::new(Semaphore::new(MAX_QUESTIONS));
        let mut tasks: Vec<JoinHandle<Option<anyhow::Result<f64>>>> = Vec::new();
        for node in &self.nodes {
            let (node, questions, deadline) = (node.clone(), Arc::clone(&questions), self.deadline);
            tasks.push(tokio::spawn(async move {
                let _turn = questions.acquire().await;
                // Without time left a clock says nothing, and that is not the node's fault.
                let is_asked = node.ready.is_some() && Instant::now() < deadline;
                if is_asked { Some(clock_offset_s(&node, deadline.min(Instant::now() + CLOCK_TIMEOUT)).await) } else { None }
            }));
        }
        let mut offsets = Vec::new();
        for (task, node) in tasks.into_iter().zip(&mut self.nodes) {
            let offset = task.await.context("compare the clock of a node")?;
            if let Some(Err(error)) = &offset {
                // Whoever does not answer is asked no more.
                node.measured.error = Some(format!("it does not tell its time: {error:#}"));
                node.ready = None;
            }
            offsets.push(offset.and_then(Result::ok));
        }
        let usual = median(offsets.iter().flatten().copied().collect());
        for (node, offset) in self.nodes.iter_mut().zip(offsets) {
            node.measured.clock_skew_s = offset.zip(usual).map(|(offset, usual)| offset - usual);
        }
        Ok(())
    }

    /// Devices and place of every node; nodes of one machine come one after another, so that they do not slow each other down.
    async fn ask_nodes(&mut self, deadline: Instant) -> anyhow::Result<()> {
        let mut machines: BTreeMap<String, Vec<(usize, Node)>> = BTreeMap::new();
        for (place, node) in self.nodes.iter().enumerate() {
            if let Some(ready) = &node.ready {
                machines.entry(ready.machine.clone()).or_default().push((place, node.clone()));
            }
        }
        let mut tasks = JoinSet::new();
        for nodes in machines.into_values() {
            tasks.spawn(async move {
                let mut done = Vec::new();
                for (place, mut node) in nodes {
                    ask_node(&mut node, deadline).await;
                    done.push((place, node));
                }
                done
            });
        }
        while let Some(done) = tasks.join_next().await {
            for (place, node) in done.context("check the devices of a node")? {
                self.nodes[place] = node;
            }
        }
        Ok(())
    }

    /// As many rounds of the tournament as there is time for, and then those links once more that did not work: an address that is being
    /// taken away, or a machine that stood still, is no reason to exclude a node.
    async fn measure_pairs(&self, progress: &mut dyn FnMut(&str)) -> anyhow::Result<Vec<PairMeasurement>> {
        let reached: Vec<&Node> = self.nodes.iter().filter(|node| node.ready.is_some()).collect();
        let rounds = rounds(reached.len());
        let mut pairs = self.measure_rounds(&reached, &rounds, progress).await?;
        let mut answers = Vec::new();
        for node in &reached {
            answers.push(node.agent.lock().await.is_some());
        }
        // One whose agent is gone would not do better.
        let can_again = |&(a, b): &(usize, usize)| answers[a] && answers[b];
        let is_broken = |seats: &(usize, usize)| can_again(seats) && pairs.get(seats).is_some_and(|pair| pair.error.is_some());
        let broken: Vec<Vec<(usize, usize)>> = rounds
            .iter()
            .map(|round| round.iter().copied().filter(is_broken).collect::<Vec<_>>())
            .filter(|round| !round.is_empty())
            .collect();
        if !broken.is_empty() {
            let num_broken = broken.iter().map(Vec::len).sum();
            progress(&format!("measuring {} again that did not work", counted(num_broken, "link")));
        }
        for (seats, second) in self.measure_rounds(&reached, &broken, progress).await? {
            let Some(first) = pairs.get_mut(&seats).filter(|_| second.error.is_none()) else { continue };
            let first_error = first.error.take();
            *first = PairMeasurement { first_error, ..second };
        }
        let mut pairs: Vec<PairMeasurement> = pairs.into_values().collect();
        pairs.sort_by(|left, right| (&left.a, &left.b).cmp(&(&right.a, &right.b)));
        Ok(pairs)
    }

    /// The pairs of these rounds by their seats, as far as there is time.
    async fn measure_rounds(
        &self,
        reached: &[&Node],
        rounds: &[Vec<(usize, usize)>],
        progress: &mut dyn FnMut(&str),
    ) -> anyhow::Result<BTreeMap<(usize, usize), PairMeasurement>> {
        let mut pairs = BTreeMap::new();
        for (number, round) in rounds.iter().enumerate() {
            if Instant::now() + Duration::from_millis(2 * WINDOW_MS + PAIR_OVERHEAD_MS) > self.deadline {
                progress(&format!("the time is over after {number} of {} rounds of links", rounds.len()));
                break;
            }
            progress(&format!("measuring links, round {} of {}", number + 1, rounds.len()));
            let mut tasks = JoinSet::new();
            for &(a, b) in round {
                let pair = measure_pair(reached[a].clone(), reached[b].clone(), self.deadline);
                tasks.spawn(async move { ((a, b), pair.await) });
            }
            while let Some(pair) = tasks.join_next().await {
                let (seats, pair) = pair.context("measure a pair of nodes")?;
                pairs.insert(seats, pair);
            }
        }
        Ok(pairs)
    }
}

async fn start_all(nodes: Vec<NodeOptions>, words: Vec<String>, setup: &Setup, deadline: Instant) -> anyhow::Result<Vec<Node>> {
    let starts = Arc::new(Semaphore::new(MAX_STARTS));
    let mut tasks: Vec<JoinHandle<Node>> = Vec::new();
    for NodeOptions { host, address } in nodes {
        let setup = Setup { node: host.name.clone(), ..setup.clone() };
        let (words, starts) = (words.clone(), Arc::clone(&starts));
        tasks.push(tokio::spawn(async move {
            let _turn = starts.acquire().await;
            let mut measured = NodeMeasurement { node: host.name.clone(), ..NodeMeasurement::default() };
            let (agent, ready) = match start(&host, &words, setup, deadline).await {
                Ok((agent, ready)) => (Some(agent), Some(ready)),
                Err(error) => {
                    measured.error = Some(format!("nothing can be started there: {error:#}"));
                    (None, None)
                }
            };
            measured.host = ready.as_ref().map(|ready| ready.host.clone());
            Node { address, ready, agent: Arc::new(Mutex::new(agent)), measured }
        }));
    }
    let mut started = Vec::new();
    for task in tasks {
        started.push(task.await.context("start an agent")?);
    }
    Ok(started)
}

async fn start(host: &RemoteHost, words: &[String], setup: Setup, deadline: Instant) -> anyhow::Result<(Agent, Ready)> {
    let mut agent = Agent::spawn(host, words)?;
    let answer = match timeout_at(deadline, agent.ask(&Request::Setup(Box::new(setup)))).await {
        Ok(answer) => answer,
        Err(_) => Err(anyhow::anyhow!("no answer in time")),
    };
    match answer {
        Ok(Answer::Ready(ready)) => Ok((agent, ready)),
        Ok(other) => bail!("an answer to another question came: {other:?}"),
        Err(error) => Err(error.context(agent.last_words().await)),
    }
}

async fn clock_offset_s(node: &Node, deadline: Instant) -> anyhow::Result<f64> {
    let (before, asked) = (now_us(), Instant::now());
    let answer = ask(node, &Request::Clock, deadline).await;
    let round_trip_us = asked.elapsed().as_micros() as i64;
    match answer? {
        Answer::Clock(theirs) => Ok((theirs - before - round_trip_us / 2) as f64 / 1e6),
        other => bail!("an answer to another question came: {other:?}"),
    }
}

async fn ask_node(node: &mut Node, deadline: Instant) {
    match ask(node, &Request::Devices, deadline).await {
        Ok(Answer::Devices(devices)) => node.measured.devices = devices,
        Err(error) => {
            // Whoever does not answer is asked no more, and its links say nothing.
            node.measured.device_error = Some(format!("{error:#}"));
            node.ready = None;
            return;
        }
        other => node.measured.device_error = Some(reason(other)),
    }
    match ask(node, &Request::Store, deadline).await {
        Ok(Answer::Store(seconds)) => node.measured.store_s = Some(seconds),
        other => node.measured.store_error = Some(reason(other)),
    }
}

async fn measure_pair(a: Node, b: Node, deadline: Instant) -> PairMeasurement {
    let mut pair = PairMeasurement { a: a.measured.node.clone(), b: b.measured.node, ..PairMeasurement::default() };
    let Some(ready) = b.ready else {
        pair.error = Some("not reached".to_owned());
        return pair;
    };
    let mut hosts: Vec<String> = match b.address {
        Some(address) => vec![address],
        None => ready.addresses.iter().map(ToString::to_string).chain([pair.b.clone(), ready.host.clone()]).collect(),
    };
    // Nodes that are only pretended to be several have no other way to each other.
    if a.ready.as_ref().is_some_and(|own| own.machine == ready.machine) {
        hosts.push("127.0.0.1".to_owned());
    }
    hosts.dedup();
    let peer = Peer { node: pair.b.clone(), hosts, port: ready.port, window_ms: WINDOW_MS.min(MAX_WINDOW_MS) };
    match ask(&a, &Request::Measure(peer), deadline.min(Instant::now() + PAIR_TIMEOUT)).await {
        Ok(Answer::Measure { up, down }) => pair.mbit_per_s = Some(up.min(down)),
        other => pair.error = Some(reason(other)),
    }
    pair
}

fn reason(answer: anyhow::Result<Answer>) -> String {
    match answer {
        Ok(Answer::Failed(reason)) => reason,
        Ok(other) => format!("an answer to another question came: {other:?}"),
        Err(error) => format!("{error:#}"),
    }
}

/// Asks the agent of a node. One that does not answer in time is asked no more, since its next answer would be to this question.
async fn ask(node: &Node, request: &Request, deadline: Instant) -> anyhow::Result<Answer> {
    let mut place = node.agent.lock().await;
    let agent = place.as_mut().context("its agent is gone")?;
    let answer = match timeout_at(deadline, agent.ask(request)).await {
        Ok(answer) => answer,
        Err(_) => Err(anyhow::anyhow!("no answer in time")),
    };
    match answer {
        Ok(answer) => Ok(answer),
        Err(error) => {
            let words = agent.last_words().await;
            *place = None;
            Err(error.context(words))
        }
    }
}

fn now_us() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as i64)
}

/// The process that carries an agent's words. It is killed when this is dropped; the agent itself ends when its input does.
struct Agent {
    child: Child,
    stdin: Option<ChildStdin>,
    stdout: BufReader<ChildStdout>,
    stderr: JoinHandle<String>,
}

impl Agent {
    fn spawn(host: &RemoteHost, words: &[String]) -> anyhow::Result<Self> {
        let mut command = Command::from(host.command(words));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
        let program = command.as_std().get_program().to_string_lossy().into_owned();
        let mut child = command.spawn().with_context(|| format!("start {program}"))?;
        let stdin = child.stdin.take();
        let stdout = child.stdout.take().context("take an agent's output")?;
        let mut stderr = child.stderr.take().context("take an agent's errors")?;
        let stderr = tokio::spawn(async move {
            let (mut kept, mut piece) = (Vec::new(), [0; 4096]);
            while let Ok(read @ 1..) = stderr.read(&mut piece).await {
                kept.extend_from_slice(&piece[..read]);
                let surplus = kept.len().saturating_sub(STDERR_BYTES);
                kept.drain(..surplus);
            }
            String::from_utf8_lossy(&kept).trim().to_owned()
        });
        Ok(Self { child, stdin, stdout: BufReader::new(stdout), stderr })
    }

    async fn ask(&mut self, request: &Request) -> anyhow::Result<Answer> {
        let mut line = serde_json::to_vec(request).context("encode a request")?;
        line.push(b'\n');
        let stdin = self.stdin.as_mut().context("write to the agent")?;
        // A process that has ended tells why itself.
        if stdin.write_all(&line).await.is_err() || stdin.flush().await.is_err() {
            bail!("{}", self.end_words().await);
        }
        let mut answer = Vec::new();
        let mut bounded = (&mut self.stdout).take(MAX_LINE_BYTES as u64);
        bounded.read_until(b'\n', &mut answer).await.context("read an answer")?;
        if answer.is_empty() {
            bail!("{}", self.end_words().await);
        }
        let shown = || format!("what came is no answer: {}", String::from_utf8_lossy(&answer[..answer.len().min(200)]).trim());
        serde_json::from_slice(&answer).with_context(shown)
    }

    async fn end_words(&mut self) -> String {
        let status = timeout(END_TIMEOUT, self.child.wait()).await;
        status
            .ok()
            .and_then(Result::ok)
            .map_or_else(|| "it closed its output".to_owned(), |status| format!("it ended with {}", shown(status)))
    }

    /// What it wrote to its standard error, for the reason of a failure. It is of no use after this.
    async fn last_words(&mut self) -> String {
        self.stdin = None;
        // One that still lives would keep its standard error open.
        if timeout(END_TIMEOUT, self.child.wait()).await.is_err() {
            drop(self.child.start_kill());
        }
        match timeout(END_TIMEOUT, &mut self.stderr).await {
            Ok(Ok(text)) if !text.is_empty() => text.lines().collect::<Vec<_>>().join(" | "),
            _ => "it said nothing".to_owned(),
        }
    }

    /// Lets the agent go.
    async fn end(mut self) {
        self.stdin = None;
        if timeout(END_TIMEOUT, self.child.wait()).await.is_err() {
            tracing::debug!("an agent did not leave by itself");
        }
    }
}

fn shown(status: ExitStatus) -> String {
    status.code().map_or_else(|| status.to_string(), |code| format!("exit code {code}"))
}

#[cfg(test)]
mod tests {
    use cloze_cluster::Secret;

    use super::*;
    use crate::hosts::CommandForm;

    /// An agent that tells its time once this many have been asked for it; `$1` is its name.
    const AGENT: &str = r#"read setup; echo '{"ready":{"host":"h","machine":"m","addresses":[],"port":1}}'
read ask; touch "$2/$1"
while [ "$(ls "$2" | wc -l)" -lt "$3" ]; do sleep 0.05; done
echo '{"clock":0}'; read end"#;

    fn setup() -> Setup {
        Setup {
            secret: Secret::random().unwrap(),
            node: String::new(),
            worker_binary: "/worker".into(),
            device: "cpu".to_owned(),
            num_devices: 1,
            bfloat16: false,
            place: "/place".to_owned(),
            options: BTreeMap::new(),
            task_timeout_s: 1,
        }
    }

    fn on_runtime<T>(work: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(work)
    }

    /// A check whose agents run this script; `$1` is the node's name, `$2` and on are the words.
    async fn check(script: &str, names: &[&str], words: &[&str]) -> Check {
        let shell = ["/bin/sh", "-c", script, "agent"].map(str::to_owned).to_vec();
        // The words after the prefix are the same for all, so each is told its name as the last word of its prefix.
        let node = |name: &&str| {
            let prefix = shell.iter().cloned().chain([(*name).to_owned()]).collect();
            NodeOptions { host: RemoteHost { name: (*name).to_owned(), prefix, form: CommandForm::Words }, address: None }
        };
        let deadline = Instant::now() + Duration::from_mins(1);
        let words = words.iter().copied().map(str::to_owned).collect();
        Check { nodes: start_all(names.iter().map(node).collect(), words, &setup(), deadline).await.unwrap(), deadline }
    }

    /// Compares the clocks of nodes by these names, each of which answers when so many of all have been asked.
    fn compared(names: &[&str], num_asked: usize) -> Vec<NodeMeasurement> {
        let folder = tempfile::tempdir().unwrap();
        on_runtime(async {
            let mut check = check(AGENT, names, &[folder.path().to_str().unwrap(), &num_asked.to_string()]).await;
            check.compare_clocks().await.unwrap();
            check.nodes.into_iter().map(|node| node.measured).collect()
        })
    }

    #[test]
    fn a_link_that_does_not_work_is_measured_again() {
        // The first node's link to b breaks once, its link to c each time.
        let script = r#"read setup; echo '{"ready":{"host":"h","machine":"m","addresses":[],"port":1}}'
while read ask; do case $1$ask in
    a*'"b"'*) if [ "$tried" ]; then echo '{"measure":{"up":3,"down":2}}'; else tried=1; echo '{"failed":"no route"}'; fi ;;
    a*) echo '{"failed":"refused"}' ;;
    *) echo '{"measure":{"up":1,"down":1}}' ;;
esac; done"#;
        let mut words = Vec::new();
        let pairs = on_runtime(async {
            let check = check(script, &["a", "b", "c"], &[]).await;
            check.measure_pairs(&mut |line| words.push(line.to_owned())).await.unwrap()
        });
        let pair = |a: &str, b: &str, mbit_per_s, error: Option<&str>, first_error: Option<&str>| PairMeasurement {
            a: a.to_owned(),
            b: b.to_owned(),
            mbit_per_s,
            error: error.map(str::to_owned),
            first_error: first_error.map(str::to_owned),
        };
        let expected = [
            pair("a", "b", Some(2.0), None, Some("no route")),
            pair("a", "c", None, Some("refused"), None),
            pair("b", "c", Some(1.0), None, None),
        ];
        assert_eq!(pairs, expected);
        assert!(words.iter().any(|line| line == "measuring 2 links again that did not work"), "{words:?}");
    }

    #[test]
    fn one_agent_is_no_plural() {
        let limits = Preflight { enabled: true, min_bandwidth_share: 0.5, max_slowdown: 2.0, timeout_s: 20 };
        for (names, expected) in [(["a"].as_slice(), "starting 1 agent"), (["a", "b"].as_slice(), "starting 2 agents")] {
            let node = |name: &&str| {
                let prefix = ["/bin/sh", "-c", "exit 1"].map(str::to_owned).to_vec();
                NodeOptions { host: RemoteHost { name: (*name).to_owned(), prefix, form: CommandForm::Words }, address: None }
            };
            let mut lines = Vec::new();
            let nodes = names.iter().map(node).collect();
            let progress = &mut |line: &str| lines.push(line.to_owned());
            run_preflight(PreflightOptions { nodes, agent: Vec::new(), setup: setup(), limits, progress }).unwrap();
            assert_eq!(lines.first().map(String::as_str), Some(expected));
        }
    }

    #[test]
    fn clocks_are_asked_at_the_same_time_and_a_silent_one_is_named() {
        // None of them answers before all have been asked.
        let names = ["a", "b", "c", "d", "e", "f"];
        let nodes = compared(&names, names.len());
        let skews: Vec<f64> = nodes.iter().map(|node| node.clock_skew_s.unwrap()).collect();
        assert!(skews.contains(&0.0) && skews.iter().all(|skew| skew.abs() < CLOCK_TIMEOUT.as_secs_f64()), "{skews:?}");
        // One more than there are is waited for in vain.
        let silent = compared(&["a"], 2);
        assert_eq!(silent[0].clock_skew_s, None);
        assert!(silent[0].error.as_ref().unwrap().contains("it does not tell its time"), "{:?}", silent[0].error);
    }
}
