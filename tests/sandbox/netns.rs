//! Several hosts on this machine: network namespaces, each with a link and an address of its own, on one bridge.
//!
//! All names begin with the process id of the test, so that what a killed test left behind is found and removed by the next one.

use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use super::{send_signal, skipped, wait_until};

/// Every name of a namespace, bridge or link begins with this and a process id. The kernel takes names of up to 15 characters:
/// 2 for this, 7 for a process id, 2 for `x` and the number of the network, 2 for `n` and the host.
const NAME_PREFIX: &str = "cz";
/// Link of a host inside its namespace.
const LINK: &str = "eth0";
/// What a slow host's link carries, in the words of `tc`; the kernel of a test machine may lack netem, so there is no latency.
const SLOW_LINK: [&str; 7] = ["tbf", "rate", "10mbit", "burst", "32kbit", "latency", "400ms"];
/// Networks that are tried before none counts as free; there are 191 times 256 of them.
const SUBNET_ATTEMPTS: u32 = 1000;
/// Longest time until the killed processes of a host are gone.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);
/// Gives the host a name of its own, which is seen by nobody outside, and becomes the program.
const START_SCRIPT: &str = r#"echo "$0" > /proc/sys/kernel/hostname; exec "$@""#;

/// Number of the networks that this process has made.
static NUM_NETWORKS: AtomicU32 = AtomicU32::new(0);

/// Hosts that can reach each other and this machine, and nothing else; removed when the value is dropped.
pub struct Network {
    name: String,
    /// The first two parts of the addresses that come after `10.`.
    subnet: (u8, u8),
    num_hosts: usize,
}

impl Network {
    /// Makes hosts, numbered from 0. Where this process may not, `None`, and a line on stderr says which test is skipped.
    pub fn new(test: &str, num_hosts: usize) -> Option<Self> {
        if let Err(reason) = remove_leftovers().and_then(|()| check_allowed()) {
            skipped(test, &format!("hosts cannot be made of network namespaces: {reason}"));
            return None;
        }
        let number = NUM_NETWORKS.fetch_add(1, Ordering::Relaxed);
        let name = format!("{NAME_PREFIX}{}x{number}", std::process::id());
        let network = Self { name, subnet: free_subnet(number), num_hosts };
        network.build();
        Some(network)
    }

    /// Address of a host.
    pub fn address(&self, host: usize) -> IpAddr {
        let (second, third) = self.subnet;
        // The last part 1 is this machine.
        Ipv4Addr::new(10, second, third, 11 + host as u8).into()
    }

    /// Address at which the hosts reach this machine.
    pub fn bridge_address(&self) -> IpAddr {
        let (second, third) = self.subnet;
        Ipv4Addr::new(10, second, third, 1).into()
    }

    /// A program on a host. The process that is started becomes the program.
    pub fn command(&self, host: usize, program: &str) -> Command {
        let namespace = self.namespace(host);
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &namespace, "unshare", "--uts", "--", "sh", "-c", START_SCRIPT]);
        command.args([format!("host-{host}").as_str(), program]);
        command
    }

    /// Takes a host's link away: packets to and from it vanish, and no connection is closed.
    pub fn cut(&self, host: usize) {
        demand(&["link", "set", &self.link(host), "down"]);
    }

    /// Gives the link back.
    pub fn heal(&self, host: usize) {
        demand(&["link", "set", &self.link(host), "up"]);
    }

    /// Makes a host's link slow, in the direction away from it.
    pub fn slow(&self, host: usize) {
        let namespace = self.namespace(host);
        let place = ["-n", &namespace, "qdisc", "replace", "dev", LINK, "root"];
        demanded("tc", &[place.as_slice(), SLOW_LINK.as_slice()].concat());
    }

    /// Makes it as fast as before.
    pub fn restore_speed(&self, host: usize) {
        demanded("tc", &["-n", &self.namespace(host), "qdisc", "del", "dev", LINK, "root"]);
    }

    /// Ends every process of a host with SIGKILL.
    pub fn kill_all(&self, host: usize) {
        let namespace = self.namespace(host);
        wait_until("the processes of a host are gone", KILL_TIMEOUT, || {
            let processes = processes_in(&namespace);
            for process_id in &processes {
                send_signal(*process_id, "KILL");
            }
            processes.is_empty()
        });
    }

    fn build(&self) {
        let bridge = self.bridge();
        demand(&["link", "add", &bridge, "type", "bridge"]);
        demand(&["addr", "add", &format!("{}/24", self.bridge_address()), "dev", &bridge]);
        demand(&["link", "set", &bridge, "up"]);
        for host in 0..self.num_hosts {
            let (namespace, link) = (self.namespace(host), self.link(host));
            demand(&["netns", "add", &namespace]);
            demand(&["link", "add", &link, "type", "veth", "peer", "name", LINK, "netns", &namespace]);
            demand(&["link", "set", &link, "master", &bridge, "up"]);
            demand(&["-n", &namespace, "addr", "add", &format!("{}/24", self.address(host)), "dev", LINK]);
            demand(&["-n", &namespace, "link", "set", "lo", "up"]);
            demand(&["-n", &namespace, "link", "set", LINK, "up"]);
        }
    }

    fn namespace(&self, host: usize) -> String {
        format!("{}n{host}", self.name)
    }

    /// The end of a host's link on this machine; the host's number keeps it apart from the namespace of the same name.
    fn link(&self, host: usize) -> String {
        format!("{}v{host}", self.name)
    }

    fn bridge(&self) -> String {
        format!("{}b", self.name)
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        for host in 0..self.num_hosts {
            remove_namespace(&self.namespace(host));
        }
        // What does not exist, because building it failed, need not be removed.
        drop(run("ip", &["link", "del", &self.bridge()]));
    }
}

/// Removes what tests left behind that were killed.
fn remove_leftovers() -> Result<(), String> {
    let namespaces = run("ip", &["netns", "list"])?;
    for name in namespaces.lines().filter_map(|line| line.split_whitespace().next()).filter(|name| is_leftover(name)) {
        remove_namespace(name);
    }
    let links = run("ip", &["-o", "link", "show", "type", "bridge"])?;
    // `7: cz41x0b: <BROADCAST,...`
    for name in links.lines().filter_map(|line| line.split(": ").nth(1)).filter(|name| is_leftover(name)) {
        // Another test that starts now may have removed it.
        drop(run("ip", &["link", "del", name]));
    }
    Ok(())
}

/// Whether a name is one of ours, of a process that is gone.
fn is_leftover(name: &str) -> bool {
    let process_id = name.strip_prefix(NAME_PREFIX).and_then(|rest| rest.split_once('x')).map(|(process_id, _)| process_id);
    let is_number = |text: &&str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    process_id.filter(is_number).is_some_and(|process_id| !Path::new("/proc").join(process_id).exists())
}

/// The links of a namespace go with it, but only when its last process is gone.
fn remove_namespace(name: &str) {
    for process_id in processes_in(name) {
        send_signal(process_id, "KILL");
    }
    drop(run("ip", &["netns", "del", name]));
}

fn processes_in(namespace: &str) -> Vec<u32> {
    let listed = run("ip", &["netns", "pids", namespace]).unwrap_or_default();
    listed.lines().filter_map(|line| line.trim().parse().ok()).collect()
}

/// Tries on a namespace of its own what a network needs.
fn check_allowed() -> Result<(), String> {
    let name = format!("{NAME_PREFIX}{}x{}t", std::process::id(), NUM_NETWORKS.fetch_add(1, Ordering::Relaxed));
    run("ip", &["netns", "add", &name])?;
    let tried = run("ip", &["netns", "exec", &name, "unshare", "--uts", "--", "sh", "-c", START_SCRIPT, "host", "true"])
        .and_then(|_| run("tc", &["-n", &name, "qdisc", "show"]));
    remove_namespace(&name);
    tried.map(|_| ())
}

/// A network of which this machine has no address yet.
fn free_subnet(number: u32) -> (u8, u8) {
    let addresses = demanded("ip", &["-o", "-4", "addr"]);
    let candidate = |attempt: u32| {
        let place = std::process::id().wrapping_mul(7).wrapping_add(number * 101 + attempt) % (191 * 256);
        (64 + (place / 256) as u8, (place % 256) as u8)
    };
    let is_free = |(second, third): &(u8, u8)| !addresses.contains(&format!(" 10.{second}.{third}."));
    (0..SUBNET_ATTEMPTS).map(candidate).find(is_free).expect("a free network of addresses")
}

fn demand(arguments: &[&str]) {
    demanded("ip", arguments);
}

fn demanded(program: &str, arguments: &[&str]) -> String {
    run(program, arguments).unwrap_or_else(|reason| panic!("{reason}"))
}

/// Runs a program and returns what it prints, or what it says about its failure.
fn run(program: &str, arguments: &[&str]) -> Result<String, String> {
    let shown = || format!("{program} {}", arguments.join(" "));
    let Output { status, stdout, stderr } =
        Command::new(program).args(arguments).output().map_err(|error| format!("{}: {error}", shown()))?;
    if status.success() {
        return Ok(String::from_utf8_lossy(&stdout).into_owned());
    }
    Err(format!("{}: {}", shown(), String::from_utf8_lossy(&stderr).trim()))
}
