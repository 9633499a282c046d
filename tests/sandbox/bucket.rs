//! A real S3 server on this machine: `SeaweedFS`, on loopback and free ports, with everything it stores in a temporary folder.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Read as _, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::FaultProxy;

/// Name of the one bucket.
const BUCKET: &str = "bucket";
/// The key that the server knows.
pub const ACCESS_KEY: &str = "integration-key";
/// Its secret.
pub const SECRET_KEY: &str = "integration-secret-5d1c";
/// Longest time until the server takes objects; it needs about three seconds.
const START_TIMEOUT: Duration = Duration::from_secs(45);
/// Longest wait for the answer to one request.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval at which a server that is starting is asked again.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// What the server leaves in `/tmp` whatever it is told, by the ports of its parts.
const SOCKETS: [&str; 6] = ["s3", "s3-grpc", "master-grpc", "volume-grpc", "filer", "filer-grpc"];
/// Ports of the server: master, volume, filer and S3, each with one for gRPC.
const NUM_PORTS: usize = 8;
/// Most entries of one folder.
const MAX_ENTRIES: usize = 10_000;
/// The bit of a mode that marks a folder, as Go counts modes.
const DIRECTORY_MODE: u64 = 1 << 31;
/// Starts that are tried; between finding a free port and using it, another program can take it.
const START_ATTEMPTS: usize = 3;

/// A running server; it is killed when the value is dropped.
pub struct SeaweedFs {
    process: Child,
    s3_port: u16,
    filer_port: u16,
    ports: [u16; NUM_PORTS],
    _folder: TempDir,
}

impl SeaweedFs {
    /// Starts a server with an empty bucket.
    pub fn start(weed: &Path) -> Self {
        (0..START_ATTEMPTS).find_map(|_| Self::try_start(weed, true)).expect("SeaweedFS starts")
    }

    /// The same without keys: whoever reaches it may do everything.
    pub fn start_open(weed: &Path) -> Self {
        (0..START_ATTEMPTS).find_map(|_| Self::try_start(weed, false)).expect("SeaweedFS starts")
    }

    /// The options of a store in this server, as YAML.
    pub fn options(&self) -> String {
        format!("{{endpoint: 'http://127.0.0.1:{}', allow_http: 'true', region: us-east-1}}", self.s3_port)
    }

    /// What a program needs in its environment to use this server where no recipe says how.
    pub fn environment(&self) -> [(&'static str, String); 5] {
        [
            ("AWS_ENDPOINT_URL", format!("http://127.0.0.1:{}", self.s3_port)),
            ("AWS_ALLOW_HTTP", "true".to_owned()),
            ("AWS_REGION", "us-east-1".to_owned()),
            ("AWS_ACCESS_KEY_ID", ACCESS_KEY.to_owned()),
            ("AWS_SECRET_ACCESS_KEY", SECRET_KEY.to_owned()),
        ]
    }

    /// The options of a store in a server behind a proxy. A request that is not answered is given up after two seconds, so that a test need not wait for long.
    pub fn options_through(proxy: &FaultProxy) -> String {
        format!("{{endpoint: '{}', allow_http: 'true', region: us-east-1, timeout: '2 seconds'}}", proxy.endpoint())
    }

    /// The port that speaks S3.
    pub fn s3_port(&self) -> u16 {
        self.s3_port
    }

    /// The url of a key or prefix.
    pub fn url(key: &str) -> String {
        format!("s3://{BUCKET}/{key}")
    }

    /// Stores an object, by the server's own interface beside S3, which needs no signature.
    pub fn put(&self, key: &str, content: &[u8]) {
        let stored = self.repeat_until_created("PUT", &format!("/buckets/{BUCKET}/{key}"), content);
        assert!(stored, "the object {key} could not be stored");
    }

    /// The keys of all objects below a prefix, sorted, as the server itself lists them.
    pub fn keys(&self, prefix: &str) -> Vec<String> {
        let root = format!("/buckets/{BUCKET}/");
        let mut folders = vec![format!("{root}{prefix}")];
        let mut found = Vec::new();
        while let Some(folder) = folders.pop() {
            for entry in self.entries(&folder) {
                let path = entry["FullPath"].as_str().expect("an entry has a path").to_owned();
                if entry["Mode"].as_u64().is_some_and(|mode| mode & DIRECTORY_MODE != 0) {
                    folders.push(path);
                } else {
                    found.push(path.trim_start_matches(&root).to_owned());
                }
            }
        }
        found.sort();
        found
    }

    fn entries(&self, folder: &str) -> Vec<Value> {
        // An answer to HTTP/1.0 ends with its connection and comes in one piece.
        let request = format!("GET {folder}/?limit={MAX_ENTRIES} HTTP/1.0\r\nAccept: application/json\r\n\r\n");
        let ask = || -> io::Result<String> {
            let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.filer_port))?;
            stream.set_read_timeout(Some(REQUEST_TIMEOUT))?;
            stream.write_all(request.as_bytes())?;
            let mut answer = String::new();
            stream.read_to_string(&mut answer)?;
            Ok(answer)
        };
        let answer = ask().expect("list the server's objects");
        let (head, body) = answer.split_once("\r\n\r\n").expect("an answer has a head");
        if head.lines().next().is_some_and(|status| status.contains(" 404 ")) {
            return Vec::new();
        }
        let listed: Value = serde_json::from_str(body).unwrap_or_else(|error| panic!("{error}: {answer}"));
        let entries = listed["Entries"].as_array().cloned().unwrap_or_default();
        assert!(entries.len() < MAX_ENTRIES, "more entries than one answer takes");
        entries
    }

    fn try_start(weed: &Path, has_keys: bool) -> Option<Self> {
        let folder = tempfile::tempdir().expect("make a folder for the server");
        let ports = free_ports();
        let [s3_port, .., filer_port, _] = ports;
        let mut command = command(weed, folder.path(), ports);
        if has_keys {
            command.arg(format!("-s3.config={}", write_identities(folder.path()).display()));
        }
        let process = command.spawn().expect("start the server");
        let server = Self { process, s3_port, filer_port, ports, _folder: folder };
        let is_ready = server.repeat_until_created("POST", &format!("/buckets/{BUCKET}/"), b"") && server.s3_listens();
        is_ready.then_some(server)
    }

    fn s3_listens(&self) -> bool {
        holds_in_time(|| TcpStream::connect((Ipv4Addr::LOCALHOST, self.s3_port)).is_ok())
    }

    /// Sends a request until it is answered with 201; false where that takes too long.
    fn repeat_until_created(&self, method: &str, path: &str, body: &[u8]) -> bool {
        holds_in_time(|| self.request(method, path, body).ok() == Some(201))
    }

    /// One request to the filer; returns the status code.
    fn request(&self, method: &str, path: &str, body: &[u8]) -> io::Result<u16> {
        let mut stream = TcpStream::connect((Ipv4Addr::LOCALHOST, self.filer_port))?;
        stream.set_read_timeout(Some(REQUEST_TIMEOUT))?;
        let length = body.len();
        write!(stream, "{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n")?;
        stream.write_all(body)?;
        let mut status_line = String::new();
        BufReader::new(stream).read_line(&mut status_line)?;
        let code = status_line.split(' ').nth(1).and_then(|code| code.parse().ok());
        code.ok_or_else(|| io::Error::other("the answer has no status code"))
    }
}

impl Drop for SeaweedFs {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is gone after this.
        drop(self.process.kill());
        drop(self.process.wait());
        for (part, port) in SOCKETS.iter().flat_map(|part| self.ports.map(|port| (part, port))) {
            drop(fs::remove_file(format!("/tmp/seaweedfs-{part}-{port}.sock")));
        }
    }
}

/// Looks until something holds; false where that takes too long.
fn holds_in_time(mut holds: impl FnMut() -> bool) -> bool {
    let deadline = Instant::now() + START_TIMEOUT;
    loop {
        if holds() {
            return true;
        }
        if Instant::now() >= deadline {
            return false;
        }
        sleep(RETRY_INTERVAL);
    }
}

/// The server's command line: every listener stands on loopback at a port of its own, and nothing is reported to anybody.
fn command(weed: &Path, folder: &Path, ports: [u16; NUM_PORTS]) -> Command {
    let data = folder.join("data");
    fs::create_dir(&data).expect("make the server's folder");
    let log = File::create(folder.join("log")).expect("make the server's log");
    let [s3, s3_grpc, master, master_grpc, volume, volume_grpc, filer, filer_grpc] = ports;
    let mut command = Command::new(weed);
    command.arg(format!("-logdir={}", folder.display()));
    command.arg("server").arg(format!("-dir={}", data.display())).args(["-ip=127.0.0.1", "-ip.bind=127.0.0.1"]);
    command.args(["-master.telemetry=false", "-master.electionTimeout=1s", "-master.heartbeatInterval=100ms"]);
    command.args(["-master.volumeSizeLimitMB=64", "-volume.max=40", "-volume.preStopSeconds=0"]);
    command.args(["-filer", "-s3", "-s3.iam=false", "-s3.port.iceberg=0", "-s3.port.lance=0"]);
    command.args([format!("-s3.port={s3}"), format!("-s3.port.grpc={s3_grpc}")]);
    command.args([format!("-master.port={master}"), format!("-master.port.grpc={master_grpc}")]);
    command.args([format!("-volume.port={volume}"), format!("-volume.port.grpc={volume_grpc}")]);
    command.args([format!("-filer.port={filer}"), format!("-filer.port.grpc={filer_grpc}")]);
    command.stdin(Stdio::null()).stdout(log.try_clone().expect("share the server's log")).stderr(log);
    command
}

/// Writes down who may do what: the one key everything.
fn write_identities(folder: &Path) -> PathBuf {
    let credentials = json!([{ "accessKey": ACCESS_KEY, "secretKey": SECRET_KEY }]);
    let actions = ["Admin", "Read", "Write", "List", "Tagging"];
    let identities = json!({ "identities": [{ "name": "test", "credentials": credentials, "actions": actions }] });
    let config = folder.join("s3.json");
    fs::write(&config, identities.to_string()).expect("write the server's identities");
    config
}

/// Ports that are free now; all are held until all are found, so that they differ.
fn free_ports() -> [u16; NUM_PORTS] {
    let listeners: [TcpListener; NUM_PORTS] =
        std::array::from_fn(|_| TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("find a free port"));
    listeners.map(|listener| listener.local_addr().expect("read a port").port())
}
