//! A run of a sweep over the nodes of the element around this process. What follows at its end is decided by the sweep's controller, so
//! there is no successor here and nothing is put back.

use std::sync::Arc;

use cloze_cluster::RunEnd;
use cloze_recipes::site::Site;
use cloze_recipes::study::Resources;

use super::allocation::AllocationOptions;
use super::attempt::{Attempt, Attempted};
use super::client::Slurm;
use super::machines::Machines;
use super::poll::patiently;
use super::snapshot::Programs;
use super::submission::Submission;
use super::verdict::are_to_blame;
use super::watch::Warnings;

/// What a sweep says of the run of one of its trials.
pub struct TrialNodes {
    /// The cluster.
    pub site: Site,
    /// The machines of a trial.
    pub resources: Resources,
    /// The programs.
    pub programs: Programs,
    /// Step at which the run is left, with its state saved; `None` goes on to the end.
    pub until_step: Option<u64>,
}

/// How it has ended.
pub struct TrialNodesEnd {
    /// The run.
    pub end: RunEnd,
    /// Nodes that another attempt does better without.
    pub bad_nodes: Vec<String>,
}

/// Runs one attempt over all nodes of the job around this process. Blocks. An error is one before the attempt has begun.
pub fn run_over_nodes(options: &AllocationOptions<'_>, trial: TrialNodes) -> anyhow::Result<TrialNodesEnd> {
    let warnings = Warnings::listen()?;
    // A job that loses a node is put back as a whole: the elements of an array have one script, whatever their recipes say.
    let submission = Submission::new(trial.site, trial.resources, trial.programs, false)?;
    let slurm = Arc::new(Slurm::find(submission.slurm()?)?);
    let machines = patiently(|| Ok(Machines::of_this_job(&slurm)?))?;
    let attempt = Attempt {
        options,
        submission: &submission,
        slurm: &slurm,
        machines: &machines,
        warnings: &warnings,
        until_step: trial.until_step,
        is_quiet: true,
    };
    let Attempted { end, bad_nodes } = attempt.go();
    let bad_nodes = blamed(&end, bad_nodes, machines.nodes.len());
    Ok(TrialNodesEnd { end, bad_nodes })
}

/// Those of so many nodes that have brought this end about.
fn blamed(end: &RunEnd, bad_nodes: Vec<String>, num_nodes: usize) -> Vec<String> {
    match end {
        RunEnd::Failed(failure) if are_to_blame(failure.kind, &bad_nodes, num_nodes) => bad_nodes,
        RunEnd::Failed(_) | RunEnd::Stopped { .. } | RunEnd::Finished { .. } => Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use cloze_recipes::failure::{Failure, FailureKind};

    use super::*;

    #[test]
    fn a_recipe_that_is_wrong_is_no_nodes_fault() {
        let cases = [
            (FailureKind::Environment, 2, true),
            (FailureKind::Run, 2, true),
            (FailureKind::Run, 1, true),
            (FailureKind::Recipe, 2, false),
            (FailureKind::Storage, 2, false),
            (FailureKind::Interrupted, 2, false),
        ];
        for (kind, num_nodes, is_blamed) in cases {
            let end = RunEnd::Failed(Failure::new(kind, "failed"));
            assert_eq!(blamed(&end, vec!["n3".to_owned()], num_nodes).len(), usize::from(is_blamed), "{kind:?}");
        }
    }
}
