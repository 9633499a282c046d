//! The check of the node of an element, before the first trial begins on it: once for all trials of the element, since they share the node.

use std::path::Path;

use cloze_recipes::failure::{Failure, FailureKind};

use super::super::batch::{Assignment, Outcome};
use super::super::folder::{StudyFolder, SweepPlan};
use crate::slurm::{BadNode, NodeCheck, check_this_node};

/// Why nothing can be tried here.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Unfit {
    /// What every trial of the element fails with.
    pub failure: Failure,
    /// The node, where it is to blame.
    pub bad_nodes: Vec<String>,
}

/// Whether trials can be tried on this node; `None` where they can. This machine alone has no others, several nodes are checked with their
/// training, and where every outcome is there nothing is left to try.
pub(super) fn unfit(program: &Path, folder: &StudyFolder, plan: &SweepPlan, assignments: &[Assignment]) -> anyhow::Result<Option<Unfit>> {
    let Some(site) = plan.site.as_ref().filter(|site| site.preflight.enabled && plan.ends_whole() && !plan.spans_nodes()) else {
        return Ok(None);
    };
    let mut first = None;
    for assignment in assignments {
        if first.is_none() && Outcome::read(folder, &assignment.trial, assignment.attempt)?.is_none() {
            first = Some(assignment);
        }
    }
    let Some(first) = first else { return Ok(None) };
    let recipe = folder.recipe_path(&first.trial);
    let (resources, limits) = (&plan.resources, &site.preflight);
    let found = check_this_node(&NodeCheck { program, recipe: &recipe, folder: folder.root(), resources, limits });
    Ok(judged(found))
}

/// What the check means for the trials. Without a verdict nobody is to blame.
fn judged(found: anyhow::Result<Option<BadNode>>) -> Option<Unfit> {
    match found {
        Ok(None) => None,
        Ok(Some(BadNode { node, reason })) => {
            let failure = Failure::new(FailureKind::Environment, "the node of the job cannot be used").at(&node).because(reason);
            Some(Unfit { failure, bad_nodes: vec![node] })
        }
        Err(error) => Some(Unfit { failure: super::as_failure(&error), bad_nodes: Vec::new() }),
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::super::batch::End;
    use super::super::super::fixtures::{plan, site, trial};
    use super::*;

    #[test]
    fn a_bad_node_is_to_blame_and_no_verdict_is_nobodys_fault() {
        assert_eq!(judged(Ok(None)), None);
        let bad = judged(Ok(Some(BadNode { node: "n3".to_owned(), reason: "a wrong product".to_owned() }))).unwrap();
        assert_eq!((bad.bad_nodes, bad.failure.kind), (vec!["n3".to_owned()], FailureKind::Environment));
        assert_eq!((bad.failure.place.as_deref(), bad.failure.cause.as_deref()), (Some("n3"), Some("a wrong product")));
        let none = judged(Err(Failure::new(FailureKind::Environment, "no verdict").into())).unwrap();
        assert_eq!((none.bad_nodes.len(), none.failure.what.as_str()), (0, "no verdict"));
    }

    /// The program says that the node is bad whenever it is asked.
    #[test]
    fn a_node_is_checked_where_there_are_others_and_something_is_left_to_do() {
        let root = tempfile::tempdir().unwrap();
        let folder = StudyFolder::new(root.path().to_owned());
        folder.make().unwrap();
        let program = root.path().join("cloze");
        let text = r#"#!/bin/sh
echo '{"ok":false,"bad_nodes":[{"node":"n1","reason":"slow"}]}'"#;
        let write = r#"printf '%s\n' "$1" > "$0" && chmod 755 "$0""#;
        assert!(std::process::Command::new("/bin/sh").args(["-c", write]).arg(&program).arg(text).status().unwrap().success());
        let assignments = ["a", "b"].map(|trial| Assignment { trial: trial.to_owned(), attempt: 1, until_step: None });
        let checked = |plan: &SweepPlan| unfit(&program, &folder, plan, &assignments).unwrap().is_some();
        let mut queued = SweepPlan { site: Some(site("mine", "kind: slurm")), ..plan(vec![trial("a"), trial("b")]) };
        assert!(checked(&queued));
        assert!(!checked(&SweepPlan { site: None, ..queued.clone() }), "this machine is all that there is");
        assert!(!checked(&SweepPlan { site: Some(site("mine", "kind: slurm\npreflight: {enabled: false}")), ..queued.clone() }));
        assert!(checked(&SweepPlan { site: Some(site("lab", "kind: ssh\nssh: {hosts: [n1, n2]}")), ..queued.clone() }));
        queued.resources.nodes = 2;
        assert!(!checked(&queued), "they are checked together, with their links");
        queued.resources.nodes = 1;
        let end = |trial: &str| Outcome {
            trial: trial.to_owned(),
            attempt: 1,
            end: End::Done,
            step: 1,
            metric: None,
            evaluation: None,
            failure: None,
            bad_nodes: Vec::new(),
            host: "n1".to_owned(),
            finished: 1.0,
        };
        end("a").write(&folder).unwrap();
        assert!(checked(&queued), "one is left");
        end("b").write(&folder).unwrap();
        fs::remove_file(&program).unwrap();
        assert!(!checked(&queued));
    }
}
