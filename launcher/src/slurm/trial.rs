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
use super::verdict::are_to_avoid;
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
    let is_theirs = are_to_avoid(&bad_nodes, machines.nodes.len());
    Ok(TrialNodesEnd { end, bad_nodes: if is_theirs { bad_nodes } else { Vec::new() } })
}
