//! What a run may not leave behind: processes, listeners, files that were not finished, objects of no checkpoint.

use std::collections::BTreeSet;
use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::stage::Stage;
use crate::sandbox::wait_until;

/// Longest time until the last process is gone after its controller has ended.
const EXIT_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest wait for the refusal of a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// Prefix of the checkpoints in the bucket.
pub const CHECKPOINTS: &str = "checkpoints";

/// Fails the test where something was left behind.
pub fn check(stage: &Stage) {
    wait_until("no process is left", EXIT_TIMEOUT, || stage.run.live_workers() == 0);
    assert!(!stage.addresses().is_empty(), "no address of the run was seen, so this says nothing");
    for address in stage.addresses() {
        assert!(TcpStream::connect_timeout(address, CONNECT_TIMEOUT).is_err(), "something still listens at {address}");
    }
    assert!(stage.run.control().is_none(), "control.json is still there");
    let unfinished: Vec<PathBuf> = files_below(&stage.run.path).into_iter().filter(|path| is_unfinished(path)).collect();
    assert!(unfinished.is_empty(), "{unfinished:?}");
    check_bucket(&stage.server.keys(CHECKPOINTS));
}

/// Every object belongs to a checkpoint that is complete.
fn check_bucket(keys: &[String]) {
    let folder = |key: &String| key.rsplit_once('/').map(|(folder, _)| folder.to_owned()).unwrap_or_default();
    let complete: BTreeSet<String> = keys.iter().filter(|key| key.ends_with("/manifest.json")).map(folder).collect();
    assert!(complete.len() >= 2, "two checkpoints are kept at least: {keys:?}");
    let is_named = |key: &String| key.ends_with("/run-record.json") || complete.contains(&folder(key));
    let strange: Vec<&String> = keys.iter().filter(|key| !is_named(key) || is_unfinished(Path::new(key))).collect();
    assert!(strange.is_empty(), "{strange:?}");
}

/// Whether a name is one under which a file is written before it is complete.
fn is_unfinished(path: &Path) -> bool {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    name.starts_with('.') || [".partial", ".tmp"].iter().any(|part| name.contains(part))
}

fn files_below(folder: &Path) -> Vec<PathBuf> {
    let mut folders = vec![folder.to_owned()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("list a folder") {
            let path = entry.expect("list a folder").path();
            if path.is_dir() {
                folders.push(path);
            } else {
                files.push(path);
            }
        }
    }
    files
}
