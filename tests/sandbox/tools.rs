//! The tools that some tests compare with: `scripts/test-tools.sh` installs them, and `CLOZE_TEST_TOOLS` names their folder.

use std::ffi::OsStr;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

use super::{repository, run_command};

/// A program among the test tools; where it is not there, `None`, and a line on stderr says which test is skipped.
pub fn tool(test: &str, name: &str) -> Option<PathBuf> {
    let Some(folder) = std::env::var_os("CLOZE_TEST_TOOLS").filter(|folder| !folder.is_empty()) else {
        skipped(test, "CLOZE_TEST_TOOLS is not set; `make test` sets it");
        return None;
    };
    let path = Path::new(&folder).join("bin").join(name);
    if path.is_file() {
        return Some(path);
    }
    skipped(test, &format!("{} is not there", path.display()));
    None
}

/// Says that a test is skipped. It writes to stderr itself: what goes through the macros is shown for failed tests only.
pub fn skipped(test: &str, reason: &str) {
    let line = format!("SKIPPED: {test}: {reason}\n");
    std::io::stderr().write_all(line.as_bytes()).expect("write to stderr");
}

/// Runs a script of `tests/python` and reads the last line that it prints as JSON.
#[track_caller]
pub fn python_json(python: &Path, script: &str, arguments: &[&OsStr]) -> Value {
    let mut command = Command::new(python);
    command.arg(repository().join("tests/python").join(script)).args(arguments);
    // Everything is in the given folders; nothing may be looked up elsewhere.
    command.env("HF_HUB_OFFLINE", "1").env("TRANSFORMERS_OFFLINE", "1");
    let outcome = run_command(&mut command).expect_code(0);
    serde_json::from_str(outcome.stdout.lines().next_back().unwrap_or_default()).expect("the script prints a line of JSON")
}
