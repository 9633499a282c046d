//! Verdicts on what was found before a run: as it should be, worth a look, or wrong.

use std::fmt;

use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::{Device, Precision, Shard, TrainRecipe};
use serde::Serialize;

use super::facts::{MachineFacts, PlanFacts};
use super::run_plan::{MemoryUse, RunPlan, memory_use};

/// Share of a GPU's memory above which a plan leaves little for what is no tensor: the driver's context, the buffers of the
/// communication, and gaps between tensors.
const TIGHT_MEMORY_SHARE: f64 = 0.9;

/// Clocks that differ by more are worth a word. A store tells whole seconds.
const CLOCK_SKEW_WARNING_S: f64 = 5.0;

/// Clocks that differ by more do not go: Amazon's S3 refuses signatures that are 15 minutes old.
const CLOCK_SKEW_MAX_S: f64 = 900.0;

/// How a check ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum CheckLevel {
    /// As it should be.
    Ok,
    /// Worth a look.
    Warn,
    /// The run would not start, or not go on.
    Fail,
}

impl fmt::Display for CheckLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Ok => "OK",
            Self::Warn => "WARN",
            Self::Fail => "FAIL",
        })
    }
}

/// One check.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// How it ended.
    pub level: CheckLevel,
    /// What was looked at.
    pub name: String,
    /// What was found.
    pub found: String,
    /// What can be done about it.
    pub hint: Option<String>,
    /// The kind of failure that a run would end with.
    pub kind: Option<FailureKind>,
}

impl Check {
    /// As it should be.
    pub fn ok(name: &str, found: impl fmt::Display) -> Self {
        Self { level: CheckLevel::Ok, name: name.to_owned(), found: found.to_string(), hint: None, kind: None }
    }

    /// Worth a look.
    pub fn warn(name: &str, found: impl fmt::Display, hint: impl fmt::Display) -> Self {
        Self { level: CheckLevel::Warn, hint: Some(hint.to_string()), ..Self::ok(name, found) }
    }

    /// Wrong; the failure becomes one line.
    pub fn fail(name: &str, failure: &Failure) -> Self {
        let parts = [("at", &failure.place), ("expected", &failure.expected), ("found", &failure.found), ("cause:", &failure.cause)];
        let parts = parts.iter().filter_map(|(word, value)| value.as_ref().map(|value| format!("{word} {value}")));
        let found = std::iter::once(failure.what.clone()).chain(parts).collect::<Vec<_>>().join("; ");
        Self { level: CheckLevel::Fail, hint: failure.hint.clone(), kind: Some(failure.kind), ..Self::ok(name, one_line(&found)) }
    }

    /// The verdict on an error of any kind.
    pub fn error(name: &str, error: &anyhow::Error) -> Self {
        match error.downcast_ref::<Failure>() {
            Some(failure) => Self::fail(name, failure),
            None => Self::fail(name, &Failure::new(FailureKind::Environment, format!("{error:#}"))),
        }
    }
}

fn one_line(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Whether a worker's memory holds the run, and what would help where it does not.
pub fn check_memory(facts: &PlanFacts, memory: &MemoryUse) -> Check {
    let name = "memory";
    let holder = if memory.on_gpu { "GPU" } else { "worker" };
    let needed = mebibytes(memory.total_bytes);
    let Some(available) = memory.available_bytes else {
        let key = if memory.on_gpu { "`gpu_memory_mib` in the cluster file" } else { "`resources.memory_per_node_mib`" };
        return Check::warn(name, format!("{needed} MiB a {holder}; what there is is not known"), format!("state {key}"));
    };
    let found = format!("{needed} of {} MiB of a {holder}", available >> 20);
    if memory.total_bytes > available {
        let largest = memory.parts.iter().max_by_key(|part| part.bytes);
        let largest = largest.map_or_else(String::new, |part| format!("; most of it is {} with {} MiB", part.name, mebibytes(part.bytes)));
        let failure = Failure::new(FailureKind::Recipe, format!("the recipe does not fit: {found}{largest}"));
        return Check::fail(name, &failure.hint(help(facts, available)));
    }
    if memory.total_bytes as f64 > TIGHT_MEMORY_SHARE * available as f64 {
        return Check::warn(name, format!("{found}, which is tight"), help(facts, (TIGHT_MEMORY_SHARE * available as f64) as u64));
    }
    Check::ok(name, found)
}

/// Settings that need less memory, and whether each alone is enough.
fn help(facts: &PlanFacts, available: u64) -> String {
    let train = &facts.recipe.train;
    let needs = |train: &TrainRecipe| memory_use(facts, train).total_bytes;
    let mut options: Vec<(String, u64)> = Vec::new();
    if facts.workers > 1 {
        let levels = [(Shard::Optimizer, "optimizer"), (Shard::Gradients, "gradients"), (Shard::Parameters, "parameters")];
        for (shard, word) in levels.into_iter().filter(|(shard, _)| *shard > train.shard) {
            options.push((format!("train.shard={word}"), needs(&TrainRecipe { shard, ..train.clone() })));
        }
    }
    if train.replicate_shards {
        options.push(("train.replicate_shards=false".to_owned(), needs(&TrainRecipe { replicate_shards: false, ..train.clone() })));
    }
    let smallest = facts.recipe.data.max_length;
    let halves = std::iter::successors(Some(train.micro_batch_tokens / 2), |tokens| Some(tokens / 2));
    for micro_batch_tokens in halves.take_while(|tokens| *tokens >= smallest && *tokens > 0) {
        let bytes = needs(&TrainRecipe { micro_batch_tokens, ..train.clone() });
        options.push((format!("train.micro_batch_tokens={micro_batch_tokens}"), bytes));
        if bytes <= available {
            break;
        }
    }
    if train.device == Device::Cuda && train.precision == Precision::Float32 {
        options.push(("train.precision=bfloat16".to_owned(), needs(&TrainRecipe { precision: Precision::Bfloat16, ..train.clone() })));
    }
    let before = needs(train);
    options.retain(|(_, bytes)| *bytes < before);
    let enough: Vec<&(String, u64)> = options.iter().filter(|(_, bytes)| *bytes <= available).collect();
    let shown = |list: &[&(String, u64)]| {
        list.iter().map(|(setting, bytes)| format!("`{setting}` ({} MiB)", mebibytes(*bytes))).collect::<Vec<_>>().join(", or ")
    };
    match (enough.is_empty(), options.is_empty()) {
        (false, _) => format!("this would fit: {}", shown(&enough)),
        (true, false) => format!("none of these alone is enough: {}", shown(&options.iter().collect::<Vec<_>>())),
        (true, true) => "take a smaller model, or more workers with `train.shard`".to_owned(),
    }
}

/// Whether the run ends within the jobs that it may use up.
pub fn check_time(plan: &RunPlan, machine: &MachineFacts) -> Check {
    let name = "time limit";
    let Some(time) = &plan.time else {
        let hint = "measure tokens a second of one worker with `cloze bench RECIPE`, and state `tokens_per_second` in the cluster file or \
                    `--tokens-per-second`";
        return Check::warn(name, "the expected time is not known", hint);
    };
    let expected = duration(time.seconds);
    let (Some(limit), Some(jobs)) = (machine.time_limit_minutes, time.jobs) else {
        return Check::ok(name, format!("{expected} expected, and no limit"));
    };
    let found = format!("{expected} expected, {} a job", duration(f64::from(limit) * 60.0));
    match machine.max_jobs {
        Some(max_jobs) if jobs > u64::from(max_jobs) => {
            let what = format!("the run needs {jobs} jobs and may use up {max_jobs}: {found}");
            Check::fail(
                name,
                &Failure::new(FailureKind::Recipe, what).hint("raise the time limit, `slurm.max_jobs` or the number of nodes"),
            )
        }
        _ if jobs > 1 => Check::ok(name, format!("{found}: {jobs} jobs, one after another")),
        _ => Check::ok(name, found),
    }
}

/// Whether two clocks agree; `skew_s` is how far the other one is ahead.
pub fn check_clock(whose: &str, skew_s: f64) -> Check {
    let name = "clock";
    let direction = if skew_s >= 0.0 { "ahead of" } else { "behind" };
    let found = format!("that of {whose} is {:.1} s {direction} this machine's", skew_s.abs());
    if skew_s.abs() > CLOCK_SKEW_MAX_S {
        let failure =
            Failure::new(FailureKind::Environment, found).hint("set the clocks by a time server; stores refuse requests of such a clock");
        return Check::fail(name, &failure);
    }
    if skew_s.abs() > CLOCK_SKEW_WARNING_S {
        return Check::warn(name, found, "set the clocks by a time server; times in logs will not fit together");
    }
    Check::ok(name, format!("that of {whose} agrees with this machine's"))
}

/// Rounded up, so that what needs memory never shows as zero.
fn mebibytes(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// A duration in its two largest units.
pub fn duration(seconds: f64) -> String {
    let seconds = seconds.max(0.0).round() as u64;
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds} s"),
        (0, 0, minutes) => format!("{minutes} min {} s", seconds % 60),
        (0, hours, minutes) => format!("{hours} h {minutes} min"),
        (days, hours, _) => format!("{days} d {hours} h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::run_plan::TimePlan;
    use crate::plan::sample::facts;

    fn memory_level(available_mib: Option<u64>) -> Check {
        let mut facts = facts();
        facts.machine.worker_memory_mib = available_mib;
        let plan = RunPlan::new(&facts, Some(1));
        check_memory(&facts, &plan.memory)
    }

    #[test]
    fn memory_fits_is_tight_or_does_not_fit() {
        let needed = mebibytes(RunPlan::new(&facts(), None).memory.total_bytes);
        let cases = [
            (Some(2 * needed), CheckLevel::Ok, None),
            (Some(needed + needed / 20), CheckLevel::Warn, None),
            (Some(needed - 1), CheckLevel::Fail, Some(FailureKind::Recipe)),
            (None, CheckLevel::Warn, None),
        ];
        for (available, level, kind) in cases {
            let check = memory_level(available);
            assert_eq!((check.level, check.kind), (level, kind), "{check:?}");
        }
    }

    #[test]
    fn what_would_help_is_named_with_what_it_needs() {
        let needed = mebibytes(RunPlan::new(&facts(), None).memory.total_bytes);
        let check = memory_level(Some(needed - 10));
        let hint = check.hint.unwrap();
        assert!(hint.starts_with("this would fit: `train.shard=optimizer` ("), "{hint}");
        assert!(hint.contains("`train.micro_batch_tokens=4096` ("), "{hint}");
        assert!(check.found.contains("most of it is "), "{}", check.found);
        let hint = memory_level(Some(1)).hint.unwrap();
        assert!(hint.starts_with("none of these alone is enough: "), "{hint}");
    }

    #[test]
    fn a_run_that_needs_too_many_jobs_fails() {
        let time = |jobs| Some(TimePlan { worker_tokens_per_second: 1.0, seconds: 7200.0, jobs });
        let machine = |limit, max_jobs| MachineFacts { time_limit_minutes: limit, max_jobs, ..MachineFacts::default() };
        let cases = [
            (None, machine(None, None), CheckLevel::Warn, "not known"),
            (time(None), machine(None, None), CheckLevel::Ok, "2 h 0 min expected, and no limit"),
            (time(Some(1)), machine(Some(180), Some(1)), CheckLevel::Ok, "2 h 0 min expected, 3 h 0 min a job"),
            (time(Some(3)), machine(Some(60), Some(3)), CheckLevel::Ok, "3 jobs, one after another"),
            (time(Some(3)), machine(Some(60), Some(2)), CheckLevel::Fail, "needs 3 jobs and may use up 2"),
        ];
        for (time, machine, level, words) in cases {
            let check = check_time(&RunPlan { time, ..RunPlan::new(&facts(), None) }, &machine);
            assert!(check.level == level && check.found.contains(words), "{check:?}");
        }
    }

    #[test]
    fn clocks_agree_differ_or_are_useless() {
        for (skew_s, level) in [(0.4, CheckLevel::Ok), (-4.0, CheckLevel::Ok), (-6.0, CheckLevel::Warn), (1000.0, CheckLevel::Fail)] {
            assert_eq!(check_clock("the bucket", skew_s).level, level, "{skew_s}");
        }
        assert!(check_clock("the bucket", -6.0).found.contains("6.0 s behind"));
    }

    #[test]
    fn durations_are_short() {
        let cases = [(0.4, "0 s"), (59.6, "1 min 0 s"), (3599.0, "59 min 59 s"), (7260.0, "2 h 1 min"), (90_000.0, "1 d 1 h")];
        for (seconds, text) in cases {
            assert_eq!(duration(seconds), text);
        }
    }

    #[test]
    fn a_failure_becomes_one_line() {
        let failure = Failure::new(FailureKind::Storage, "write failed").at("s3://b").because("a\n  b").hint("try");
        let check = Check::fail("bucket", &failure);
        assert_eq!(check.found, "write failed; at s3://b; cause: a b");
        assert_eq!((check.kind, check.hint.as_deref()), (Some(FailureKind::Storage), Some("try")));
    }
}
