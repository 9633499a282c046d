//! What a sweep says while it runs: a line for each change, and on a terminal one line below them that is rewritten.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::Write;

use cloze_recipes::failure::FailureKind;
use cloze_recipes::study::{Metric, Score};

use super::decide::Reason;
use super::lost::OutState;
use super::record::{TrialRecord, TrialState};
use super::short::ShortValues;

/// Where a sweep says how it is.
pub struct Talk {
    output: Box<dyn Write>,
    /// A terminal: the last line is rewritten.
    interactive: bool,
    quiet: bool,
    shown: String,
    /// How the values of swept keys are shown.
    values: ShortValues,
}

impl Talk {
    /// Says it there.
    pub fn new(output: Box<dyn Write>, interactive: bool, quiet: bool) -> Self {
        Self { output, interactive, quiet, shown: String::new(), values: ShortValues::default() }
    }

    /// Learns the values of all trials, so that long ones are shortened and can still be told apart.
    pub fn learn(&mut self, records: &[TrialRecord]) {
        self.values = ShortValues::of(records.iter().flat_map(|record| &record.parameters));
    }

    /// Says something in a line of its own. That nobody can read it is no reason to stop.
    pub fn line(&mut self, text: &str) {
        if self.quiet {
            return;
        }
        let start = if self.interactive && !self.shown.is_empty() { "\r\x1b[2K" } else { "" };
        drop(writeln!(self.output, "{start}{text}"));
        self.shown.clear();
    }

    /// Shows how the whole sweep is.
    pub fn status(&mut self, records: &[TrialRecord], reason: Reason) {
        if !self.interactive || self.quiet {
            return;
        }
        let text = format!("{}: {reason}", counts(records, reason.is_over()));
        if text != self.shown {
            drop(write!(self.output, "\r\x1b[2K{text}"));
            drop(self.output.flush());
            self.shown = text;
        }
    }

    /// Takes the last line away.
    pub fn clear(&mut self) {
        if self.interactive && !self.shown.is_empty() {
            drop(write!(self.output, "\r\x1b[2K"));
            drop(self.output.flush());
            self.shown.clear();
        }
    }

    /// A trial was handed out; `verb` says how, as in `starts on n1`.
    pub fn started(&mut self, record: &TrialRecord, until_step: Option<u64>, verb: &str) {
        let rung = until_step.map_or_else(String::new, |step| format!(", to step {step}"));
        let attempt = if record.fruitless_attempts > 0 { format!(", attempt {}", record.attempts) } else { String::new() };
        let point = self.values.point(record.parameters.iter(), record.seed);
        self.line(&format!("{} {verb}{rung}{attempt}: {point}", record.name));
    }

    /// A trial has ended well.
    pub fn ended(&mut self, records: &[TrialRecord], trial: usize, metric: &Metric) {
        let record = &records[trial];
        let value = record.metric.map_or_else(String::new, |value| format!(", {}", metric_text(metric, value)));
        let verb = if record.state == TrialState::Done { "done" } else { "waits at its rung" };
        self.line(&format!("{} {verb} at step {}{value} ({})", record.name, record.step, counts(records, false)));
    }

    /// A trial has left because somebody asked.
    pub fn saved(&mut self, record: &TrialRecord) {
        self.line(&format!("{} saved at step {}", record.name, record.step));
    }

    /// A trial has failed, and is tried again after so many seconds, or not.
    pub fn failed(&mut self, record: &TrialRecord, retry_s: Option<f64>) {
        let what = record.failure.as_ref().map_or("", |failure| failure.what.as_str());
        let is_stopped = record.failure.as_ref().is_some_and(|failure| failure.kind == FailureKind::Interrupted);
        match retry_s {
            // By a time limit, or for a job that is more urgent.
            Some(_) if is_stopped => self.line(&format!("{} was stopped at step {} and goes on from there", record.name, record.step)),
            Some(wait_s) => self.line(&format!("{} failed: {what}; tried again in {:.0} s at the earliest", record.name, wait_s.max(0.0))),
            None => self.line(&format!("{} failed: {what}", record.name)),
        }
    }
}

/// How many trials of the sweep are how far. Once nothing is left to do, a trial that waits at its rung was stopped early.
pub fn counts(records: &[TrialRecord], is_over: bool) -> String {
    counts_with_outs(records, is_over, &BTreeMap::new())
}

/// The same where more is known of trials that are out, by their hashes.
pub fn counts_with_outs(records: &[TrialRecord], is_over: bool, outs: &BTreeMap<String, OutState>) -> String {
    let count = |state| records.iter().filter(|record| record.wanted && record.state == state).count();
    let total = records.iter().filter(|record| record.wanted).count();
    let mut text = format!("{} of {total} done", count(TrialState::Done));
    let paused = if is_over { "stopped early" } else { "paused at a rung" };
    let known: Vec<&OutState> = records.iter().filter(|record| record.wanted).filter_map(|record| outs.get(&record.hash)).collect();
    let of = |name: &str| known.iter().filter(|out| out.name() == name).count();
    let others = [
        (of("running"), "running"),
        (count(TrialState::Training).saturating_sub(known.len()), "out"),
        (of("queued"), "queued"),
        (of("queued again"), "queued again"),
        (of("ended"), "ended"),
        (of("gone"), "gone"),
        (count(TrialState::StoppedEarly), paused),
        (count(TrialState::Failed), "failed"),
    ];
    for (number, name) in others {
        if number > 0 {
            // Writing to a string cannot fail.
            let _ = write!(text, ", {number} {name}");
        }
    }
    text
}

/// A metric with its name; shares in percent.
pub fn metric_text(metric: &Metric, value: f64) -> String {
    let task = metric.task.as_deref().map_or_else(String::new, |task| format!("{task} "));
    match metric.score {
        Score::Loss => format!("loss {value:.4}"),
        Score::Accuracy => format!("{task}accuracy {:.2} %", value * 100.0),
        Score::MacroF1 => format!("{task}macro-F1 {:.2} %", value * 100.0),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::super::fixtures::trial;
    use super::*;

    #[test]
    fn only_what_runs_is_counted_as_running() {
        let out = |hash: &str| TrialRecord { state: TrialState::Training, ..TrialRecord::new(&trial(hash), None) };
        let records = ["a", "b", "c", "d"].map(out);
        assert_eq!(counts(&records, false), "0 of 4 done, 4 out");
        let outs = [("a", OutState::Running), ("b", OutState::QueuedAgain), ("c", OutState::Queued)];
        let outs = outs.map(|(hash, out)| (hash.to_owned(), out)).into();
        assert_eq!(counts_with_outs(&records, false, &outs), "0 of 4 done, 1 running, 1 out, 1 queued, 1 queued again");
    }

    #[test]
    fn a_start_is_told_in_a_line_that_can_be_read() {
        let tasks: Vec<String> = (0..40).map(|number| format!("^task_{number}")).collect();
        let record = |hash: &str, num_tasks: usize| {
            let parameters = json!({"data.only": tasks[..num_tasks]}).as_object().unwrap().clone();
            TrialRecord { parameters, ..TrialRecord::new(&trial(hash), None) }
        };
        let records = [record("a", 20), record("b", 40)];
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut talk = Talk::new(Box::new(file.reopen().unwrap()), false, false);
        talk.learn(&records);
        records.iter().for_each(|record| talk.started(record, None, "starts"));
        let expected = "\
demo-a starts: data.only=[\"^task_0\",\"^task_1\",+18] seed=1
demo-b starts: data.only=[\"^task_0\",\"^task_1\",+38] seed=1
";
        assert_eq!(std::fs::read_to_string(file.path()).unwrap(), expected);
    }
}
