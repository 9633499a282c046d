//! Many runs compared: every arrangement of mechanisms at every size, over seeds.

use cloze_recipes::failure::{Failure, FailureKind};
use serde::Serialize;

use super::closed_form;
use super::costs::Costs;
use super::engine::{Case, Outcome, simulate};
use super::mechanisms::Mechanisms;
use super::model::Model;
use super::spent::Cause;

/// Most seeds of one arrangement.
const MAX_SEEDS: u32 = 10_000;

/// Quantiles of Student's distribution at 97.5 %, by degrees of freedom from 1; beyond them the normal one is close enough.
const STUDENT_97_5: [f64; 30] = [
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093,
    2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
];

/// The same quantile of the normal distribution.
const NORMAL_97_5: f64 = 1.960;

/// Which seeds are simulated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Seeds {
    /// The first one.
    pub first: u64,
    /// How many, one after another.
    pub count: u32,
}

/// A mean with its 95 % confidence.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Interval {
    /// The mean over the seeds.
    pub mean: f64,
    /// The true mean is this close with 95 % confidence; null where one seed says nothing about that.
    pub half_width: Option<f64>,
}

/// What all sizes came to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Study {
    /// First seed.
    pub seed: u64,
    /// Seeds of each arrangement.
    pub num_seeds: u32,
    /// Optimizer steps of each run.
    pub steps: u64,
    /// One entry for each size.
    pub sizes: Vec<SizeReport>,
}

/// What one size came to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SizeReport {
    /// GPUs.
    pub gpus: u32,
    /// Nodes.
    pub nodes: u32,
    /// Mean seconds of an undisturbed step.
    pub step_s: f64,
    /// Mean seconds between two failures of the cluster; null where nothing fails.
    pub mtbf_s: Option<f64>,
    /// From everything off to everything on, then all but each mechanism.
    pub arrangements: Vec<ArrangementReport>,
}

/// What one arrangement of mechanisms came to.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ArrangementReport {
    /// What is switched, for people.
    pub name: String,
    /// What is switched on.
    pub mechanisms: Mechanisms,
    /// Share of the wall time in which steps that count are computed.
    pub goodput: Interval,
    /// The same by the closed form.
    pub estimated_goodput: f64,
    /// Hours of the run.
    pub wall_hours: Interval,
    /// Mean number of failures.
    pub failures: f64,
    /// Mean number of steps that were done again.
    pub steps_lost: f64,
    /// The interval between checkpoints that Daly's formula recommends, in seconds.
    pub best_interval_s: Option<f64>,
    /// Where the time goes, on average; the shares add up to 1.
    pub causes: Vec<CauseShare>,
}

/// Share of one cause.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct CauseShare {
    /// Name of the cause.
    pub cause: &'static str,
    /// Its share of the wall time.
    pub share: f64,
}

impl ArrangementReport {
    /// Share of the wall time that went to a cause.
    pub fn share(&self, cause: Cause) -> f64 {
        self.causes.iter().filter(|entry| entry.cause == cause.name()).map(|entry| entry.share).sum()
    }
}

/// Simulates every arrangement at every size. Fails as [`simulate`] does, and with kind `Recipe` for a number of seeds out of range.
pub fn study(costs: &Costs, gpus: &[u32], seeds: Seeds) -> Result<Study, Failure> {
    if seeds.count == 0 || seeds.count > MAX_SEEDS {
        return Err(Failure::new(FailureKind::Recipe, "the number of seeds is out of range")
            .expected(format!("1 to {MAX_SEEDS}"))
            .found(seeds.count));
    }
    let sizes = gpus.iter().map(|&gpus| size(costs, gpus, seeds)).collect::<Result<_, _>>()?;
    Ok(Study { seed: seeds.first, num_seeds: seeds.count, steps: costs.run.steps, sizes })
}

fn size(costs: &Costs, gpus: u32, seeds: Seeds) -> Result<SizeReport, Failure> {
    let arrangements = Mechanisms::arrangements()
        .into_iter()
        .map(|(name, mechanisms)| arrangement(costs, name, &Case { gpus, mechanisms }, seeds))
        .collect::<Result<_, _>>()?;
    let model = Model::new(costs, gpus);
    Ok(SizeReport { gpus, nodes: model.nodes, step_s: model.mean_step_s(), mtbf_s: model.mtbf_s(), arrangements })
}

fn arrangement(costs: &Costs, name: String, case: &Case, seeds: Seeds) -> Result<ArrangementReport, Failure> {
    let outcomes = (0..u64::from(seeds.count))
        .map(|number| simulate(costs, case, seeds.first.wrapping_add(number)))
        .collect::<Result<Vec<Outcome>, Failure>>()
        .map_err(|failure| failure.at(format!("{} GPUs, {name}", case.gpus)))?;
    let of = |value: fn(&Outcome) -> f64| interval(&outcomes.iter().map(value).collect::<Vec<_>>());
    let total_s: f64 = outcomes.iter().map(|outcome| outcome.wall_s).sum();
    let causes = Cause::all().map(|cause| {
        let spent_s: f64 = outcomes.iter().map(|outcome| outcome.spent.get(cause)).sum();
        CauseShare { cause: cause.name(), share: spent_s / total_s }
    });
    let estimate = closed_form::estimate(costs, case);
    Ok(ArrangementReport {
        name,
        mechanisms: case.mechanisms,
        goodput: of(Outcome::goodput),
        estimated_goodput: estimate.goodput,
        wall_hours: of(|outcome| outcome.wall_s / 3600.0),
        failures: of(|outcome| outcome.failures as f64).mean,
        steps_lost: of(|outcome| outcome.steps_lost as f64).mean,
        best_interval_s: estimate.best_interval_s,
        causes: causes.to_vec(),
    })
}

/// Mean and confidence of values that are independent of each other.
fn interval(values: &[f64]) -> Interval {
    let count = values.len() as f64;
    let mean = values.iter().sum::<f64>() / count;
    if values.len() < 2 {
        return Interval { mean, half_width: None };
    }
    let variance = values.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1.0);
    let quantile = STUDENT_97_5.get(values.len() - 2).copied().unwrap_or(NORMAL_97_5);
    Interval { mean, half_width: Some(quantile * (variance / count).sqrt()) }
}

#[cfg(test)]
mod tests {
    use super::super::sample::costs;
    use super::*;

    #[test]
    fn confidence_is_students() {
        // Mean 3, standard deviation sqrt(2.5), 4 degrees of freedom.
        let found = interval(&[1.0, 2.0, 3.0, 4.0, 5.0]);
        assert!((found.mean - 3.0).abs() < 1e-12);
        assert!((found.half_width.unwrap() - 2.776 * (2.5_f64 / 5.0).sqrt()).abs() < 1e-9);
        assert_eq!(interval(&[7.0]).half_width, None);
        assert!(interval(&[2.0; 40]).half_width.unwrap().abs() < 1e-12);
    }

    #[test]
    fn a_study_has_every_arrangement_and_its_shares_are_whole() {
        let mut costs = costs();
        costs.run.steps = 300;
        let study = study(&costs, &[32, 64], Seeds { first: 1, count: 2 }).unwrap();
        assert_eq!(study.sizes.iter().map(|size| (size.gpus, size.nodes)).collect::<Vec<_>>(), [(32, 4), (64, 8)]);
        for size in &study.sizes {
            assert_eq!(size.arrangements.len(), Mechanisms::arrangements().len());
            for arrangement in &size.arrangements {
                let whole: f64 = arrangement.causes.iter().map(|entry| entry.share).sum();
                assert!((whole - 1.0).abs() < 1e-9, "{} at {}: {whole}", arrangement.name, size.gpus);
                assert!((0.0..1.0).contains(&arrangement.goodput.mean));
            }
        }
    }

    #[test]
    fn sizes_and_seeds_out_of_range_are_refused() {
        let failure = study(&costs(), &[12], Seeds { first: 1, count: 1 }).unwrap_err();
        assert!(failure.what.contains("found 12, expected a multiple of 8"), "{failure}");
        let failure = study(&costs(), &[64], Seeds { first: 1, count: 0 }).unwrap_err();
        assert_eq!(failure.found.as_deref(), Some("0"));
    }
}
