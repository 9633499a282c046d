//! What runs on a node: it answers one request after another, and lets other agents measure the bandwidth to it.

use std::fs;
use std::io::{BufRead, Read as _, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context as _, bail};
use cloze_cluster::host::host_name;

use super::link::{self, LinkKey};
use super::protocol::{Answer, DeviceMeasurement, MAX_LINE_BYTES, Ready, Request, Setup};

/// What an agent needs of the rest of the program.
pub struct AgentTools<'a> {
    /// Checks the devices of this node.
    pub check_devices: &'a dyn Fn(&Setup) -> anyhow::Result<Vec<DeviceMeasurement>>,
    /// Writes a small object to the place of the checkpoints, and deletes it.
    pub try_store: &'a dyn Fn(&Setup) -> anyhow::Result<()>,
}

/// Answers requests until the input ends.
pub fn run_agent(tools: &AgentTools<'_>, input: &mut impl BufRead, output: &mut impl Write) -> anyhow::Result<()> {
    let mut setup = None;
    while let Some(request) = read_request(input)? {
        let answer = answer(tools, &mut setup, request).unwrap_or_else(|error| Answer::Failed(format!("{error:#}")));
        let mut line = serde_json::to_vec(&answer).context("encode an answer")?;
        line.push(b'\n');
        output.write_all(&line).and_then(|()| output.flush()).context("send an answer")?;
    }
    Ok(())
}

fn read_request(input: &mut impl BufRead) -> anyhow::Result<Option<Request>> {
    let mut line = Vec::new();
    input.take(MAX_LINE_BYTES as u64).read_until(b'\n', &mut line).context("read a request")?;
    if line.is_empty() {
        return Ok(None);
    }
    serde_json::from_slice(&line).context("read a request").map(Some)
}

fn answer(tools: &AgentTools<'_>, known: &mut Option<Setup>, request: Request) -> anyhow::Result<Answer> {
    let setup = match request {
        Request::Setup(setup) => return Ok(Answer::Ready(open(known.insert(*setup))?)),
        Request::Clock => return Ok(Answer::Clock(now_us())),
        Request::Devices | Request::Store | Request::Measure(_) => known.as_ref().context("nothing was set up")?,
    };
    match request {
        Request::Devices => (tools.check_devices)(setup).map(Answer::Devices),
        Request::Store => {
            let started = Instant::now();
            (tools.try_store)(setup)?;
            Ok(Answer::Store(started.elapsed().as_secs_f64()))
        }
        Request::Measure(peer) => {
            let (up, down) = link::measure(&peer, &LinkKey::new(&setup.secret))?;
            Ok(Answer::Measure { up, down })
        }
        Request::Setup(_) | Request::Clock => bail!("answered before"),
    }
}

/// Starts to listen for other agents.
fn open(setup: &Setup) -> anyhow::Result<Ready> {
    let listener = listen().context("listen for other nodes")?;
    let port = listener.local_addr().context("read the port")?.port();
    link::serve(listener, setup.node.clone(), LinkKey::new(&setup.secret)).context("start the listener")?;
    Ok(Ready { host: host_name(), machine: machine_id(), addresses: own_addresses(), port })
}

/// On all addresses, of both families where the host has both.
fn listen() -> std::io::Result<TcpListener> {
    TcpListener::bind(SocketAddr::from((Ipv6Addr::UNSPECIFIED, 0)))
        .or_else(|_| TcpListener::bind(SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0))))
}

fn now_us() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as i64)
}

/// The kernel's identity since its start: the same for all that run under it, whatever they are called.
fn machine_id() -> String {
    fs::read_to_string("/proc/sys/kernel/random/boot_id").map_or_else(|_| host_name(), |text| text.trim().to_owned())
}

/// Addresses of this host that others may reach it at.
fn own_addresses() -> Vec<IpAddr> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let mut addresses = ipv4_addresses(&read("/proc/net/fib_trie"));
    addresses.extend(ipv6_addresses(&read("/proc/net/if_inet6")));
    addresses
}

/// From the kernel's routing trie, where the line after an own address says `host LOCAL`.
fn ipv4_addresses(trie: &str) -> Vec<IpAddr> {
    let mut addresses: Vec<IpAddr> = Vec::new();
    let mut last = None;
    for line in trie.lines() {
        if let Some(address) = line.trim().strip_prefix("|-- ") {
            last = address.parse::<Ipv4Addr>().ok();
        } else if line.contains("host LOCAL")
            && let Some(address) = last.filter(|address| !address.is_loopback())
            && !addresses.contains(&address.into())
        {
            addresses.push(address.into());
        }
    }
    addresses
}

/// From the kernel's list of interfaces: 32 digits, index, prefix, scope, flags, name. Scope 00 is global.
fn ipv6_addresses(list: &str) -> Vec<IpAddr> {
    let read = |line: &str| {
        let mut words = line.split_whitespace();
        let (digits, scope) = (words.next()?, words.nth(2)?);
        let bits = u128::from_str_radix(digits, 16).ok()?;
        (scope == "00").then(|| Ipv6Addr::from_bits(bits).into())
    };
    list.lines().filter_map(read).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use cloze_cluster::Secret;

    use super::super::protocol::Peer;
    use super::*;

    fn setup() -> Setup {
        Setup {
            secret: Secret::new("secret"),
            node: "a".into(),
            worker_binary: "cloze-worker".into(),
            device: "cpu".into(),
            num_devices: 1,
            bfloat16: false,
            place: "/place".into(),
            options: BTreeMap::new(),
            task_timeout_s: 1,
        }
    }

    fn talk(requests: &[Request]) -> Vec<Answer> {
        let check_devices = |setup: &Setup| {
            anyhow::ensure!(setup.node == "a");
            Ok(vec![DeviceMeasurement { device: "cpu".into(), error: None, seconds: Some(1.0), gflops: Some(2.0) }])
        };
        let try_store = |setup: &Setup| anyhow::bail!("{} is full", setup.place);
        let tools = AgentTools { check_devices: &check_devices, try_store: &try_store };
        let input: String = requests.iter().map(|request| serde_json::to_string(request).unwrap() + "\n").collect();
        let mut output = Vec::new();
        run_agent(&tools, &mut input.as_bytes(), &mut output).unwrap();
        String::from_utf8(output).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    #[test]
    fn every_request_has_an_answer() {
        let answers = talk(&[Request::Devices, Request::Setup(Box::new(setup())), Request::Clock, Request::Devices, Request::Store]);
        let [Answer::Failed(early), Answer::Ready(ready), Answer::Clock(clock), Answer::Devices(devices), Answer::Failed(store)] =
            &answers[..]
        else {
            panic!("{answers:?}")
        };
        assert_eq!((early.as_str(), store.as_str()), ("nothing was set up", "/place is full"));
        assert!(*clock > 1_700_000_000_000_000 && devices.len() == 1 && ready.port > 0 && !ready.machine.is_empty());
        // It listens on, and knows its own name.
        let peer = Peer { node: "a".into(), hosts: vec!["127.0.0.1".into()], port: ready.port, window_ms: 10 };
        link::measure(&peer, &LinkKey::new(&Secret::new("secret"))).unwrap();
    }

    #[test]
    fn addresses_are_read_as_the_kernel_writes_them() {
        let trie = "Local:
  +-- 0.0.0.0/0 3 0 5
     +-- 127.0.0.0/8 2 0 2
        |-- 127.0.0.1
           /32 host LOCAL
     +-- 10.1.2.0/24 2 0 2
        |-- 10.1.2.0
           /24 link UNICAST
        |-- 10.1.2.11
           /32 host LOCAL
        |-- 10.1.2.255
           /32 link BROADCAST
";
        assert_eq!(ipv4_addresses(trie), ["10.1.2.11".parse::<IpAddr>().unwrap()]);
        let list = "fe800000000000000000000000000001 02 40 20 80     eth0
20010db8000000000000000000000007 02 40 00 80     eth0
00000000000000000000000000000001 01 80 10 80       lo
";
        assert_eq!(ipv6_addresses(list), ["2001:db8::7".parse::<IpAddr>().unwrap()]);
    }
}
