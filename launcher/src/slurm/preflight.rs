//! The check of a job's nodes before step 0: another program's, which prints its verdict as JSON.

use std::io::Read as _;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::Context as _;
use cloze_recipes::failure::{Failure, FailureKind};
use serde::Deserialize;

/// Longest verdict, in bytes; a pair of nodes takes some hundred, and a thousand nodes are measured in some thousands of pairs.
const MAX_VERDICT_BYTES: u64 = 16 << 20;

/// A verdict. What was measured is for people; it is in the log.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct Verdict {
    /// No node is bad.
    pub ok: bool,
    /// Nodes that must not be used.
    pub bad_nodes: Vec<BadNode>,
}

/// A node that must not be used.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
pub struct BadNode {
    /// Its name.
    pub node: String,
    /// What is wrong.
    pub reason: String,
}

/// Runs the check; its table goes to this process's standard error. It keeps within its own time.
pub fn check_nodes(words: &[String]) -> anyhow::Result<Verdict> {
    let mut words = words.iter();
    let mut command = Command::new(words.next().map(PathBuf::from).unwrap_or_default());
    let mut child = command.args(words).stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("start `cloze preflight`")?;
    let mut text = String::new();
    let read = match child.stdout.take() {
        Some(output) => output.take(MAX_VERDICT_BYTES).read_to_string(&mut text).map(drop),
        None => Ok(()),
    };
    let status = child.wait().context("wait for `cloze preflight`")?;
    read.context("read the verdict of `cloze preflight`")?;
    verdict(&text).map_err(|cause| {
        Failure::new(FailureKind::Environment, "`cloze preflight` gave no verdict")
            .found(status)
            .because(cause)
            .hint("the lines above are its own; `preflight: {enabled: false}` in the cluster file does without")
            .into()
    })
}

/// The verdict is the last line.
fn verdict(text: &str) -> Result<Verdict, String> {
    let line = text.lines().rev().find(|line| !line.trim().is_empty()).ok_or("no output")?;
    serde_json::from_str(line).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(text: &str) -> Vec<String> {
        ["/bin/sh", "-c", text].map(str::to_owned).to_vec()
    }

    #[test]
    fn a_verdict_counts_whatever_the_exit_code() {
        let verdict = check_nodes(&shell(r#"echo '{"ok":false,"bad_nodes":[{"node":"n2","reason":"slow"}],"pairs":[]}'; exit 5"#)).unwrap();
        assert_eq!((verdict.ok, verdict.bad_nodes[0].node.as_str()), (false, "n2"));
        assert!(check_nodes(&shell(r#"echo '{"ok":true,"bad_nodes":[]}'"#)).unwrap().ok);
    }

    #[test]
    fn no_verdict_is_no_good_one() {
        for text in ["exit 5", "echo nonsense", "true"] {
            let failure: Failure = check_nodes(&shell(text)).unwrap_err().downcast().unwrap();
            assert_eq!(failure.kind, FailureKind::Environment, "{text}");
        }
    }
}
