//! Machines of a test: a login host and some nodes, each with a name, an address and a link, on this machine.
//!
//! They are namespaces for networks, host names, mounts and processes, and all that runs there lives and dies with the test: the first
//! process (`fleet/init.sh`) waits for the end of a pipe from the test process, so it also notices when that is killed. Nothing of the
//! machine is touched: names are resolved by a file of their own, and no port is taken outside.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::net::Ipv4Addr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::{run_command, send_signal, skipped, wait_until};

/// Name of the host from which commands are given.
pub const LOGIN: &str = "login";
/// The first process, in bash.
const INIT: &str = include_str!("fleet/init.sh");
/// What the fleet has of its own. Propagation is private, so that no mount is seen outside.
const NAMESPACES: [&str; 9] =
    ["--mount", "--propagation", "private", "--uts", "--net", "--pid", "--fork", "--kill-child=KILL", "--mount-proc"];
/// Folder of the fleets' folders: sockets below it must have paths of at most 107 bytes.
const PARENT_FOLDER: &str = "/tmp";
/// Makes names resolve for a command that stays in the process namespace of the test; `$0` is the file.
const ENTER_SCRIPT: &str = r#"mount --bind "$0" /etc/hosts && exec "$@""#;
/// Longest time until the hosts are made; it takes 0.2 s.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest time until everything is gone; it takes 0.1 s.
const STOP_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest time until killed processes are gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);
/// Interval at which the end of the fleet is looked for.
const POLL_INTERVAL: Duration = Duration::from_millis(5);
/// Bytes of each log that a failed test shows.
const MOST_LOG_BYTES: usize = 3000;

/// Hosts and all that runs on them; everything is gone when the value is dropped, or when this process ends in any way.
pub struct Fleet {
    folder: PathBuf,
    /// `unshare`, which waits for the first process and is in all namespaces but the one of processes.
    keeper: Child,
    commands: Option<ChildStdin>,
    nodes: BTreeMap<String, Node>,
}

/// A node as the kernel sees it.
struct Node {
    /// The process that holds its namespaces.
    anchor: u32,
    /// Its network namespace, as in `net:[4026532345]`.
    network: PathBuf,
}

impl Fleet {
    /// Makes a login host and nodes `n1`, `n2`, ... Where this process may not, `None`, and a line on stderr says which test is skipped.
    pub fn start(test: &str, num_nodes: usize) -> Option<Self> {
        let probe = Command::new("unshare").args(NAMESPACES).args(["--", "ip", "link", "show"]).output();
        let reason = match probe {
            Ok(output) if output.status.success() => None,
            Ok(output) => Some(String::from_utf8_lossy(&output.stderr).trim().to_owned()),
            Err(error) => Some(error.to_string()),
        };
        if let Some(reason) = reason {
            skipped(test, &format!("machines cannot be made of namespaces: {reason}"));
            return None;
        }
        Some(Self::make(num_nodes))
    }

    /// A folder of this fleet, short and without blanks; it goes with the fleet.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Names of all nodes.
    pub fn nodes(&self) -> impl Iterator<Item = &str> {
        self.nodes.keys().map(String::as_str)
    }

    /// Address of the login host.
    pub fn login_address() -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, 1)
    }

    /// Address of the node of a number, from 1.
    pub fn node_address(number: usize) -> Ipv4Addr {
        Ipv4Addr::new(10, 77, 0, 10 + number as u8)
    }

    /// Starts a line of shell on the login host, detached.
    pub fn begin(&self, line: &str) {
        let mut commands = self.commands.as_ref().expect("the fleet runs");
        writeln!(commands, "{line}").expect("tell the fleet's first process what to start");
    }

    /// The same on a node.
    pub fn begin_on(&self, node: &str, line: &str) {
        assert!(self.nodes.contains_key(node), "there is no node {node}");
        self.begin(&format!("on {node} {line}"));
    }

    /// A program on the login host. The process that is started becomes the program, and keeps its id.
    pub fn command(&self, program: &str) -> Command {
        self.enter(self.keeper.id(), program)
    }

    /// The same on a node.
    pub fn command_on(&self, node: &str, program: &str) -> Command {
        self.enter(self.nodes[node].anchor, program)
    }

    /// Processes of a node, by the id that they have here; those that ended and were not waited for do not count.
    pub fn processes_on(&self, node: &str) -> Vec<u32> {
        let Node { anchor, network } = &self.nodes[node];
        let is_there = |process_id: &u32| fs::read_link(format!("/proc/{process_id}/ns/net")).is_ok_and(|found| found == *network);
        process_ids().filter(|process_id| process_id != anchor).filter(is_there).collect()
    }

    /// Ends those processes of a node that a test chooses by name, with SIGKILL.
    #[track_caller]
    pub fn kill_on(&self, node: &str, chosen: impl Fn(&str) -> bool) {
        wait_until("killed processes of a node are gone", KILL_TIMEOUT, || {
            let mut left = self.processes_on(node);
            left.retain(|process_id| chosen(name_of(*process_id).as_str()));
            for process_id in &left {
                send_signal(*process_id, "KILL");
            }
            left.is_empty()
        });
    }

    /// Sends a signal to all processes of a node.
    pub fn signal_on(&self, node: &str, signal: &str) {
        for process_id in self.processes_on(node) {
            // It may end by itself between the look and the signal.
            send_signal(process_id, signal);
        }
    }

    /// Takes a node's link away: packets to and from it vanish, and no connection is closed.
    pub fn cut(&self, node: &str) {
        self.set_link(node, "down");
    }

    /// Gives the link back.
    pub fn heal(&self, node: &str) {
        self.set_link(node, "up");
    }

    /// The ends of all logs in the folder, for the message of a failed test.
    pub fn logs(&self) -> String {
        let shown = |path: PathBuf| {
            let bytes = fs::read(&path).unwrap_or_default();
            let end = &bytes[bytes.len().saturating_sub(MOST_LOG_BYTES)..];
            format!("== {}\n{}\n", path.display(), String::from_utf8_lossy(end))
        };
        let entries = fs::read_dir(self.folder.join("log")).into_iter().flatten().filter_map(Result::ok);
        entries.map(|entry| shown(entry.path())).collect()
    }

    fn make(num_nodes: usize) -> Self {
        let folder = tempfile::Builder::new().prefix("cloze-").tempdir_in(PARENT_FOLDER).expect("make a folder for the fleet").keep();
        fs::create_dir(folder.join("log")).expect("make a folder for logs");
        let hosts: Vec<(String, Ipv4Addr)> = (1..=num_nodes).map(|number| (format!("n{number}"), Self::node_address(number))).collect();
        write_hosts(&folder, &hosts);
        let log = || Stdio::from(File::create(folder.join("log/fleet.log")).expect("make the fleet's log"));
        let mut command = Command::new("unshare");
        command.args(NAMESPACES).args(["--", "bash", "-c", INIT, "init.sh"]).arg(&folder);
        command.arg(LOGIN).arg(Self::login_address().to_string());
        command.args(hosts.iter().flat_map(|(name, address)| [name.clone(), address.to_string()]));
        // A Ctrl-C on the terminal is for the test process; the end of the pipe follows.
        command.process_group(0).stdin(Stdio::piped()).stdout(Stdio::null()).stderr(log());
        let mut keeper = command.spawn().expect("start the fleet");
        let commands = keeper.stdin.take();
        let mut fleet = Self { folder, keeper, commands, nodes: BTreeMap::new() };
        let deadline = Instant::now() + START_TIMEOUT;
        while !fleet.folder.join("ready").exists() {
            assert!(Instant::now() < deadline, "the fleet is not made within {START_TIMEOUT:?}\n{}", fleet.logs());
            sleep(POLL_INTERVAL);
        }
        fleet.nodes = hosts.into_iter().map(|(name, _)| (name.clone(), find_node(&name, &fleet.folder))).collect();
        fleet
    }

    fn enter(&self, process_id: u32, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.args(["--target", &process_id.to_string(), "--net", "--uts", "--"]);
        command.args(["unshare", "--mount", "--propagation", "private", "--", "sh", "-c", ENTER_SCRIPT]);
        command.arg(self.folder.join("hosts")).arg(program);
        command
    }

    fn set_link(&self, node: &str, state: &str) {
        assert!(self.nodes.contains_key(node), "there is no node {node}");
        let mut command = self.command("ip");
        run_command(command.args(["link", "set", &format!("to-{node}"), state])).expect_code(0);
    }
}

impl Drop for Fleet {
    fn drop(&mut self) {
        // The first process sees the end of the pipe, kills all others, removes the folder and leaves.
        drop(self.commands.take());
        let deadline = Instant::now() + STOP_TIMEOUT;
        while matches!(self.keeper.try_wait(), Ok(None)) && Instant::now() < deadline {
            sleep(POLL_INTERVAL);
        }
        // Where it hangs, this ends everything, but leaves the folder.
        drop(self.keeper.kill());
        drop(self.keeper.wait());
        drop(fs::remove_dir_all(&self.folder));
    }
}

/// Names that resolve on all hosts.
fn write_hosts(folder: &Path, nodes: &[(String, Ipv4Addr)]) {
    let nodes: String = nodes.iter().map(|(name, address)| format!("{address} {name}\n")).collect();
    let text = format!("127.0.0.1 localhost\n::1 localhost\n{} {LOGIN}\n{nodes}", Fleet::login_address());
    fs::write(folder.join("hosts"), text).expect("write the names of the hosts");
}

/// Finds a node by the name that its first process gave the holder of its namespaces.
fn find_node(name: &str, folder: &Path) -> Node {
    let shown = format!("{name}@{}", folder.display());
    let is_anchor = |process_id: &u32| {
        let command = fs::read(format!("/proc/{process_id}/cmdline")).unwrap_or_default();
        command.split(|byte| *byte == 0).next() == Some(shown.as_bytes())
    };
    let anchor = process_ids().find(is_anchor).expect("a node has a process");
    let network = fs::read_link(format!("/proc/{anchor}/ns/net")).expect("find a node's network");
    Node { anchor, network }
}

fn process_ids() -> impl Iterator<Item = u32> {
    let entries = fs::read_dir("/proc").expect("list the processes").filter_map(Result::ok);
    entries.filter_map(|entry| entry.file_name().to_string_lossy().parse().ok())
}

/// The short name of a process; empty where it is gone.
fn name_of(process_id: u32) -> String {
    fs::read_to_string(format!("/proc/{process_id}/comm")).unwrap_or_default().trim().to_owned()
}
