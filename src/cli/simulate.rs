//! `cloze simulate`: what a run at another size would lose its time to, and how well the model predicts a run that is over.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use cloze_launcher::simulate::{ArrangementReport, Cause, Interval, Prediction, Seeds, SizeReport, Study};
use cloze_launcher::simulate::{observe, predict, read, read_events, study};
use cloze_recipes::failure::{Failure, FailureKind};
use comfy_table::{CellAlignment, Table, presets};
use serde_json::json;

/// Arguments of `cloze simulate`.
#[derive(Args)]
pub struct SimulateArguments {
    /// Costs file; docs/simulate/h200.yaml is an example with every key
    #[arg(required_unless_present = "check", conflicts_with = "check")]
    pub costs: Option<PathBuf>,
    /// Numbers of GPUs, separated by commas [default: those of the file]
    #[arg(long, value_delimiter = ',')]
    pub gpus: Vec<u32>,
    /// First seed
    #[arg(long, default_value_t = 1)]
    pub seed: u64,
    /// Seeds of each arrangement; more of them narrow the confidence
    #[arg(long, default_value_t = 16)]
    pub seeds: u32,
    /// Predict the wall time of this finished run folder instead, from its own events
    #[arg(long, value_name = "RUN")]
    pub check: Option<PathBuf>,
    /// Take the costs of that prediction from another run folder
    #[arg(long, value_name = "RUN", requires = "check")]
    pub costs_from: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Simulates a costs file, or predicts a finished run.
pub fn simulate(arguments: &SimulateArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    let text = match (&arguments.check, &arguments.costs) {
        (Some(run), _) => check(run, arguments.costs_from.as_deref().unwrap_or(run), arguments.json)?,
        (None, Some(costs)) => compare(costs, arguments)?,
        (None, None) => return Err(Failure::new(FailureKind::Recipe, "neither a costs file nor a run is named").into()),
    };
    writeln!(stdout, "{text}").context("print the simulation")?;
    Ok(ExitCode::SUCCESS)
}

fn compare(path: &Path, arguments: &SimulateArguments) -> Result<String> {
    let costs = read(path)?;
    let gpus = if arguments.gpus.is_empty() { &costs.gpus } else { &arguments.gpus };
    let study = study(&costs, gpus, Seeds { first: arguments.seed, count: arguments.seeds })?;
    if arguments.json {
        return serde_json::to_string_pretty(&study).context("write the study as JSON");
    }
    Ok(study.sizes.iter().map(|size| size_text(&study, size)).collect::<Vec<_>>().join("\n"))
}

fn check(run: &Path, costs: &Path, as_json: bool) -> Result<String> {
    let observed = observe(&read_events(run)?)?;
    let costs = if costs == run { observed.clone() } else { observe(&read_events(costs)?)? };
    let prediction = predict(&costs, &observed)?;
    if !as_json {
        return Ok(prediction_text(&prediction));
    }
    let causes: Vec<_> =
        spent(&prediction).into_iter().map(|(cause, seconds)| json!({"cause": cause.name(), "seconds": seconds})).collect();
    let report = json!({
        "predicted_s": prediction.predicted_s,
        "measured_s": prediction.measured_s,
        "error": prediction.error(),
        "interruptions": prediction.outcome.failures,
        "steps_lost": prediction.outcome.steps_lost,
        "causes": causes,
    });
    serde_json::to_string_pretty(&report).context("write the prediction as JSON")
}

/// The causes that took any time.
fn spent(prediction: &Prediction) -> Vec<(Cause, f64)> {
    let all = Cause::all().into_iter().map(|cause| (cause, prediction.outcome.spent.get(cause)));
    all.filter(|(_, seconds)| *seconds > 0.0).collect()
}

fn prediction_text(prediction: &Prediction) -> String {
    let causes: Vec<String> =
        spent(prediction).into_iter().map(|(cause, seconds)| format!("{} {seconds:.2} s", cause.name().replace('_', " "))).collect();
    format!(
        "predicted {:.2} s, measured {:.2} s: off by {:+.1} %\n{} interruptions, {} steps done again\n{}",
        prediction.predicted_s,
        prediction.measured_s,
        prediction.error() * 100.0,
        prediction.outcome.failures,
        prediction.outcome.steps_lost,
        causes.join(", ")
    )
}

/// One size: a line about the cluster, and a row for each arrangement.
fn size_text(study: &Study, size: &SizeReport) -> String {
    let failures = match size.mtbf_s {
        Some(seconds) => format!("a failure every {}", duration(seconds)),
        None => "no failures".to_owned(),
    };
    let mut table = Table::new();
    table.load_style(presets::UTF8_HORIZONTAL_ONLY).set_header([
        "mechanisms",
        "goodput %",
        "closed form %",
        "hours",
        "failures",
        "steps lost",
        "step",
        "checkpoint",
        "lost work",
        "detection",
        "recovery",
        "waiting",
        "startup",
    ]);
    for arrangement in &size.arrangements {
        table.add_row(row(arrangement));
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    let best = size.arrangements.first().and_then(|arrangement| arrangement.best_interval_s);
    let best =
        best.map_or_else(String::new, |seconds| format!("; with all off, Daly's interval between checkpoints is {}", duration(seconds)));
    format!(
        "{} GPUs in {} nodes: {} steps of {:.3} s, {failures}{best}; {} seeds, 95 % confidence; the last seven columns are shares of the \
         wall time in %\n{table}",
        size.gpus, size.nodes, study.steps, size.step_s, study.num_seeds
    )
}

fn row(arrangement: &ArrangementReport) -> [String; 13] {
    let share = |causes: &[Cause]| format!("{:.2}", causes.iter().map(|cause| arrangement.share(*cause)).sum::<f64>() * 100.0);
    [
        arrangement.name.clone(),
        percent(&arrangement.goodput),
        format!("{:.2}", arrangement.estimated_goodput * 100.0),
        with_confidence(arrangement.wall_hours.mean, arrangement.wall_hours.half_width),
        format!("{:.1}", arrangement.failures),
        format!("{:.0}", arrangement.steps_lost),
        share(&[Cause::Stragglers, Cause::Communication, Cause::Shrunken]),
        share(&[Cause::Checkpoint]),
        share(&[Cause::LostWork]),
        share(&[Cause::Detection]),
        share(&[Cause::Regroup, Cause::Restart, Cause::Restore]),
        share(&[Cause::WaitingForNodes]),
        share(&[Cause::Startup]),
    ]
}

fn percent(interval: &Interval) -> String {
    with_confidence(interval.mean * 100.0, interval.half_width.map(|half_width| half_width * 100.0))
}

fn with_confidence(mean: f64, half_width: Option<f64>) -> String {
    half_width.map_or_else(|| format!("{mean:.2}"), |half_width| format!("{mean:.2} ± {half_width:.2}"))
}

/// Seconds for people: the largest unit of which there is at least one.
fn duration(seconds: f64) -> String {
    if seconds >= 3600.0 {
        format!("{:.1} h", seconds / 3600.0)
    } else if seconds >= 60.0 {
        format!("{:.1} min", seconds / 60.0)
    } else {
        format!("{seconds:.1} s")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_confidence_read_well() {
        assert_eq!([12.34, 90.0, 11_160.0].map(duration), ["12.3 s", "1.5 min", "3.1 h"]);
        assert_eq!(percent(&Interval { mean: 0.912_34, half_width: Some(0.001) }), "91.23 ± 0.10");
        assert_eq!(percent(&Interval { mean: 0.5, half_width: None }), "50.00");
    }

    #[test]
    fn a_study_of_the_shipped_costs_is_a_table_and_json() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/simulate/h200.yaml");
        let mut costs = read(&path).unwrap();
        costs.run.steps = 200;
        let study = study(&costs, &[1024], Seeds { first: 1, count: 2 }).unwrap();
        let text = size_text(&study, &study.sizes[0]);
        assert!(text.starts_with("1024 GPUs in 128 nodes: 200 steps of 1.0"), "{text}");
        assert!(text.contains("a failure every 49.5 h"), "{text}");
        assert_eq!(text.lines().filter(|line| line.contains("all on but")).count(), 4, "{text}");
        let json = serde_json::to_value(&study).unwrap();
        assert_eq!(json["sizes"][0]["arrangements"][0]["mechanisms"]["elastic"], json!(false));
        assert_eq!(json["sizes"][0]["arrangements"][0]["causes"].as_array().unwrap().len(), Cause::all().len());
    }
}
