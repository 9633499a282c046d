//! A server that speaks Azure's blob protocol on this machine: Azurite, on loopback and a free port, in a temporary folder.

use std::ffi::OsStr;
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use super::{python_json, skipped, tool, wait_until};

/// Name of the one container.
const CONTAINER: &str = "container";
/// Longest time until the server listens; it needs about two seconds.
const START_TIMEOUT: Duration = Duration::from_secs(45);

/// A running server; it is killed when the value is dropped.
pub struct Azurite {
    process: Child,
    port: u16,
    _folder: TempDir,
}

impl Azurite {
    /// Starts a server with an empty container; says that the test is skipped where there is none.
    pub fn start(test: &str) -> Option<Self> {
        let python = tool(test, "python")?;
        let program = program(test)?;
        let folder = tempfile::tempdir().expect("make a folder for the server");
        let port = free_port();
        let mut command = Command::new(program);
        command.args(["--blobHost", "127.0.0.1", "--blobPort", &port.to_string(), "--location"]).arg(folder.path());
        command.args(["--silent", "--skipApiVersionCheck", "--disableTelemetry"]);
        let process = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("start the server");
        let server = Self { process, port, _folder: folder };
        wait_until("Azurite listens", START_TIMEOUT, || TcpStream::connect((Ipv4Addr::LOCALHOST, port)).is_ok());
        let made = python_json(&python, "azure_container.py", &[OsStr::new(&port.to_string()), OsStr::new(CONTAINER)]);
        assert_eq!(made["status"], 201, "the container could not be made");
        Some(server)
    }

    /// The variable by which clients find an emulator, and its value.
    pub fn environment(&self) -> (&'static str, String) {
        ("AZURITE_BLOB_STORAGE_URL", format!("http://127.0.0.1:{}", self.port))
    }

    /// The url of a key or prefix.
    pub fn url(key: &str) -> String {
        format!("az://{CONTAINER}/{key}")
    }
}

impl Drop for Azurite {
    fn drop(&mut self) {
        // It may have ended by itself; either way it is gone after this.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

/// The server's program, beside the folder of the Python tools.
fn program(test: &str) -> Option<PathBuf> {
    let tools = std::env::var_os("CLOZE_TEST_TOOLS")?;
    let path = Path::new(&tools).with_file_name("node").join("node_modules/.bin/azurite-blob");
    if path.exists() {
        return Some(path);
    }
    skipped(test, &format!("{} is not there", path.display()));
    None
}

fn free_port() -> u16 {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("find a free port");
    listener.local_addr().expect("read a port").port()
}
