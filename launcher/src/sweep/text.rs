//! A sweep as text: its preview, and the table of its trials.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use cloze_recipes::study::Score;
use serde_json::Value;

use super::folder::SweepPlan;
use super::graph::{Graph, Node};
use super::lost::OutState;
use super::record::{TrialRecord, TrialState};
use super::short::ShortValues;
use crate::words::counted;

/// Characters of a hash that are shown.
const HASH_CHARS: usize = 12;

/// What a sweep would do: its trials in the order in which they start, what they share, and how they are run.
pub fn preview_text(graph: &Graph, plan: &SweepPlan) -> String {
    let (stages, trials): (Vec<_>, Vec<_>) = graph.nodes.iter().partition(|node| !node.wanted);
    let mut rows = vec![["", "hash", "data", "after", "what"].map(str::to_owned)];
    let short = |hash: &str| hash.chars().take(HASH_CHARS).collect::<String>();
    let short_values = ShortValues::of(graph.nodes.iter().flat_map(values));
    for node in stages.iter().chain(&trials) {
        let kind = if node.wanted { "trial" } else { "stage" };
        let after = node.parent.map_or_else(|| "-".to_owned(), |parent| short(&graph.nodes[parent].trial.hash));
        let what = short_values.point(values(node), node.trial.recipe.seed);
        rows.push([kind.to_owned(), short(&node.trial.hash), short(&node.trial.data_hash), after, what]);
    }
    let mut text = table(&rows);
    let _ = writeln!(
        text,
        "{}, {}, {}; at most {} at the same time{}{}",
        counted(trials.len(), "trial"),
        counted(stages.len(), "earlier stage"),
        counted(graph.num_preparations(), "data preparation"),
        plan.concurrency,
        if plan.pack > 1 { format!(", {} to an allocation", plan.pack) } else { String::new() },
        plan.early_stopping.map_or_else(String::new, |(first_step, factor)| {
            format!(", early stopping from step {first_step} by a factor of {factor}")
        }),
    );
    text
}

/// The swept keys of a trial and their values.
fn values(node: &Node) -> impl Iterator<Item = (&String, &Value)> {
    node.trial.parameters.iter().map(|(key, value)| (key, value))
}

/// The trials that the sweep asks for, and the earlier stages that are not done, as a table. Once nothing is left to do, a trial that
/// waits at its rung was stopped early. Of trials that are out `outs` says by their hashes what is known besides their records.
pub fn status_table(plan: &SweepPlan, records: &[TrialRecord], is_over: bool, outs: &BTreeMap<String, OutState>) -> String {
    let shown: Vec<&TrialRecord> = records.iter().filter(|record| record.wanted || record.state != TrialState::Done).collect();
    let mut keys: Vec<&String> = Vec::new();
    let mut seen = BTreeSet::new();
    for key in shown.iter().filter(|record| record.wanted).flat_map(|record| record.parameters.keys()) {
        if seen.insert(key) {
            keys.push(key);
        }
    }
    let metric = match (&plan.metric.task, plan.metric.score) {
        (_, Score::Loss) => "loss".to_owned(),
        (task, Score::Accuracy) => named(task.as_deref(), "accuracy"),
        (task, Score::MacroF1) => named(task.as_deref(), "macro-F1"),
    };
    let mut header = vec!["trial".to_owned()];
    header.extend(keys.iter().map(|key| (*key).clone()));
    header.extend(["seed", "state", "step"].map(str::to_owned));
    header.push(metric);
    let short = ShortValues::of(shown.iter().flat_map(|record| &record.parameters));
    let mut rows = vec![header];
    for record in shown {
        let mut row = vec![record.name.clone()];
        let value = |key: &&String| record.parameters.get(*key).filter(|_| record.wanted).map(|value| short.text(key, value));
        row.extend(keys.iter().map(|key| value(key).unwrap_or_else(|| "-".to_owned())));
        row.extend([
            record.seed.to_string(),
            match outs.get(&record.hash) {
                None | Some(OutState::Running) => state_text(record.state, is_over),
                Some(out) => out.name().to_owned(),
            },
            record.step.to_string(),
        ]);
        row.push(record.metric.map_or_else(|| "-".to_owned(), |value| number(plan.metric.score, value)));
        rows.push(row);
    }
    table(&rows)
}

fn state_text(state: TrialState, is_over: bool) -> String {
    match state {
        TrialState::StoppedEarly if !is_over => "paused, waits at its rung".to_owned(),
        state => state.name().replace('_', " "),
    }
}

fn named(task: Option<&str>, score: &str) -> String {
    task.map_or_else(|| score.to_owned(), |task| format!("{task} {score}"))
}

/// A metric as the table shows it; shares in percent.
fn number(score: Score, value: f64) -> String {
    if score == Score::Loss { format!("{value:.4}") } else { format!("{:.2}", value * 100.0) }
}

/// Rows in columns as wide as their widest cell.
fn table<R: AsRef<[String]>>(rows: &[R]) -> String {
    let num_columns = rows.iter().map(|row| row.as_ref().len()).max().unwrap_or(0);
    let width = |column: usize| rows.iter().filter_map(|row| row.as_ref().get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..num_columns).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let cells: Vec<String> = row.as_ref().iter().zip(&widths).map(|(cell, &width)| format!("{cell:<width$}")).collect();
        let _ = writeln!(text, "{}", cells.join("  ").trim_end());
    }
    text
}

#[cfg(test)]
mod tests {
    use cloze_recipes::study::{Metric, Trial};
    use serde_json::json;

    use super::super::fixtures;
    use super::super::folder::PlannedTrial;
    use super::*;
    use crate::sample::recipe;

    fn trial_of(record: &TrialRecord) -> Trial {
        let parameters = record.parameters.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
        Trial { parameters, recipe: recipe(), hash: record.hash.clone(), data_hash: "d".to_owned(), data_seed: 1, parent: None }
    }

    fn plan() -> SweepPlan {
        let parameters = json!({"train.steps": 10}).as_object().unwrap().clone();
        let trial = |hash, seed| PlannedTrial { seed, parameters: parameters.clone(), ..fixtures::trial(hash) };
        let metric = Metric { task: Some("mmlu".to_owned()), score: Score::Accuracy };
        SweepPlan { metric, ..fixtures::plan(vec![fixtures::stage("aaaa"), trial("bbbb", 1), trial("cccc", 2)]) }
    }

    #[test]
    fn long_values_do_not_make_long_rows() {
        let plan = plan();
        let tasks: Vec<String> = (0..40).map(|number| format!("^task_{number}")).collect();
        let mut records: Vec<TrialRecord> = plan.trials.iter().map(|trial| TrialRecord::new(trial, None)).collect();
        for (record, num_tasks) in records[1..].iter_mut().zip([20, 40]) {
            record.parameters = json!({"data.only": tasks[..num_tasks]}).as_object().unwrap().clone();
        }
        let text = status_table(&plan, &records, true, &BTreeMap::new());
        assert!(text.contains(r#"["^task_0","^task_1",+18]"#) && text.contains(r#"["^task_0","^task_1",+38]"#), "{text}");
        let graph = Graph {
            nodes: records[1..]
                .iter()
                .map(|record| Node { trial: trial_of(record), wanted: true, is_stage: false, parent: None })
                .collect(),
        };
        let preview = preview_text(&graph, &plan);
        assert!(preview.contains(r#"data.only=["^task_0","^task_1",+18] seed=1"#) && preview.contains(",+38]"), "{preview}");
        assert!(text.lines().chain(preview.lines()).all(|line| line.chars().count() < 120), "{text}{preview}");
    }

    #[test]
    fn the_table_shows_trials_and_open_stages() {
        let plan = plan();
        let mut records: Vec<TrialRecord> = plan.trials.iter().map(|trial| TrialRecord::new(trial, None)).collect();
        (records[1].state, records[1].step, records[1].metric) = (TrialState::StoppedEarly, 10, Some(0.256));
        let expected = "\
trial      train.steps  seed  state          step  mmlu accuracy
demo-aaaa  -            1     waiting        0     -
demo-bbbb  10           1     stopped early  10    25.60
demo-cccc  10           2     waiting        0     -
";
        let table = |records: &[TrialRecord], is_over| status_table(&plan, records, is_over, &BTreeMap::new());
        assert_eq!(table(&records, true), expected);
        assert!(table(&records, false).contains("1     paused, waits at its rung  10    25.60"));
        records[0].state = TrialState::Done;
        assert!(!table(&records, true).contains("demo-aaaa"));
        records[1].state = TrialState::Training;
        records[2].state = TrialState::Training;
        let outs = BTreeMap::from([("bbbb".to_owned(), OutState::Running), ("cccc".to_owned(), OutState::Queued)]);
        let queued = status_table(&plan, &records, false, &outs);
        let states: Vec<&str> = queued.lines().skip(1).filter_map(|line| line.split_whitespace().nth(3)).collect();
        assert_eq!(states, ["training", "queued"], "{queued}");
    }
}
