//! The check of a job's nodes, or of one by itself, before step 0: another program's, which prints its verdict as JSON.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::Context as _;
use cloze_cluster::host::host_name;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::site::Preflight;
use cloze_recipes::study::Resources;
use serde::Deserialize;

use super::machines::NODE_VARIABLE;

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

/// A trial that is to run on one node, for the check of that node.
pub struct NodeCheck<'a> {
    /// The `cloze` program.
    pub program: &'a Path,
    /// Its recipe.
    pub recipe: &'a Path,
    /// Folder in which its checkpoints lie, in `runs/`, unless it names another place.
    pub folder: &'a Path,
    /// Machines of the trial.
    pub resources: &'a Resources,
    /// When a node is bad.
    pub limits: &'a Preflight,
}

/// Checks the node of this process by itself: its devices, and whether checkpoints can be stored from here. Returns the node, if it must not
/// be used. An error is no verdict.
pub fn check_this_node(check: &NodeCheck<'_>) -> anyhow::Result<Option<BadNode>> {
    let named = std::env::var(NODE_VARIABLE).ok().filter(|name| !name.is_empty());
    let words = words_for_this_node(check, &named.unwrap_or_else(host_name));
    Ok(check_nodes(&words, Some(check.folder))?.bad_nodes.pop())
}

fn words_for_this_node(check: &NodeCheck<'_>, node: &str) -> Vec<String> {
    let NodeCheck { program, recipe, resources, limits, .. } = check;
    let mut words = vec![program.display().to_string(), "preflight".to_owned(), recipe.display().to_string()];
    words.push(format!("--nodes={node}"));
    words.push(format!("--devices={}", resources.gpus_per_node.max(1)));
    words.push(format!("--max-slowdown={}", limits.max_slowdown));
    words.push(format!("--timeout={}", limits.timeout_s));
    words
}

/// Runs the check, in this folder where one is named; its table goes to this process's standard error. It keeps within its own time.
pub fn check_nodes(words: &[String], folder: Option<&Path>) -> anyhow::Result<Verdict> {
    let mut words = words.iter();
    let mut command = Command::new(words.next().map(PathBuf::from).unwrap_or_default());
    if let Some(folder) = folder {
        command.current_dir(folder);
    }
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
        let verdict =
            check_nodes(&shell(r#"echo '{"ok":false,"bad_nodes":[{"node":"n2","reason":"slow"}],"pairs":[]}'; exit 5"#), None).unwrap();
        assert_eq!((verdict.ok, verdict.bad_nodes[0].node.as_str()), (false, "n2"));
        assert!(check_nodes(&shell(r#"echo '{"ok":true,"bad_nodes":[]}'"#), None).unwrap().ok);
    }

    #[test]
    fn no_verdict_is_no_good_one() {
        for text in ["exit 5", "echo nonsense", "true"] {
            let failure: Failure = check_nodes(&shell(text), None).unwrap_err().downcast().unwrap();
            assert_eq!(failure.kind, FailureKind::Environment, "{text}");
        }
    }

    #[test]
    fn a_node_by_itself_is_checked_without_a_way_to_others() {
        let resources = Resources { gpus_per_node: 4, ..crate::sample::resources() };
        let limits = Preflight { enabled: true, min_bandwidth_share: 0.3, max_slowdown: 2.5, timeout_s: 60 };
        let paths = ["/bin/cloze", "/studies/s/trials/h.yaml", "/studies/s"].map(Path::new);
        let check = NodeCheck { program: paths[0], recipe: paths[1], folder: paths[2], resources: &resources, limits: &limits };
        let words = words_for_this_node(&check, "n2").join(" ");
        assert_eq!(words, "/bin/cloze preflight /studies/s/trials/h.yaml --nodes=n2 --devices=4 --max-slowdown=2.5 --timeout=60");
    }
}
