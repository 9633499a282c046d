//! Reads costs from a YAML file and says everything that is wrong with them.

use std::fs;
use std::path::Path;

use cloze_recipes::failure::{Failure, FailureKind};
use serde_saphyr::{DefaultMessageFormatter, DuplicateKeyPolicy, MessageFormatter as _, NonFiniteFloatPolicy};

use super::costs::{ClassCosts, Costs};

/// Longest costs file, in bytes; the shipped ones have a few thousand.
const MAX_COSTS_BYTES: usize = 1 << 20;

/// Deepest nesting, and most values, of a costs file; both far above what the format needs.
const MAX_DEPTH_LEVELS: usize = 16;
const MAX_VALUES: usize = 4096;

/// Most GPUs of a simulated cluster. The cost of a simulation does not depend on it; a larger number is a slip of the keyboard.
const MAX_GPUS: u32 = 1 << 20;

/// Most steps of a simulated run; a million steps take about a second for each seed and arrangement.
const MAX_STEPS: u64 = 10_000_000;

/// Shares of failure classes may miss 1 by this much, for rounding in the file.
const SHARE_TOLERANCE: f64 = 1e-3;

/// Reads and checks a costs file.
///
/// Fails with kind `Input` when the file cannot be read, and with kind `Recipe` when it is no YAML of the right form, has an unknown
/// key, or has values out of range; of the last kind all are named at once.
pub fn read(path: &Path) -> Result<Costs, Failure> {
    let text = fs::read_to_string(path)
        .map_err(|error| Failure::new(FailureKind::Input, "the costs file cannot be read").at(path.display()).because(error))?;
    parse(&text, &path.display().to_string())
}

/// Reads and checks the text of a costs file; `shown` names it in failures.
pub(super) fn parse(text: &str, shown: &str) -> Result<Costs, Failure> {
    if text.len() > MAX_COSTS_BYTES {
        let failure = Failure::new(FailureKind::Recipe, "the costs file is too long").at(shown);
        return Err(failure.expected(format!("at most {MAX_COSTS_BYTES} bytes")).found(format!("{} bytes", text.len())));
    }
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! { max_depth: MAX_DEPTH_LEVELS, max_nodes: MAX_VALUES },
        duplicate_keys: DuplicateKeyPolicy::Error,
        non_finite_float_policy: NonFiniteFloatPolicy::Reject,
        reject_unsupported_tags: true,
        strict_booleans: true,
        with_snippet: false,
    };
    let costs: Costs = serde_saphyr::from_str_with_options(text, options).map_err(|error| unreadable(&error, shown))?;
    let problems = problems(&costs);
    if problems.is_empty() {
        return Ok(costs);
    }
    let what = if problems.len() == 1 { "1 problem in the costs".to_owned() } else { format!("{} problems in the costs", problems.len()) };
    Err(Failure::new(FailureKind::Recipe, format!("{what}\n  {}", problems.join("\n  "))).at(shown))
}

fn unreadable(error: &serde_saphyr::Error, shown: &str) -> Failure {
    let place = match error.location() {
        Some(location) => format!("{shown}:{}:{}", location.line(), location.column()),
        None => shown.to_owned(),
    };
    let cause = DefaultMessageFormatter.format_message(error.without_snippet()).replace(char::is_control, " ");
    Failure::new(FailureKind::Recipe, "the costs file is not understood")
        .at(place)
        .because(cause)
        .hint("docs/simulate/h200.yaml has every key with its meaning")
}

/// Everything that is out of range, each with its key, its value and what was expected.
fn problems(costs: &Costs) -> Vec<String> {
    let mut problems = Vec::new();
    check_sizes(costs, &mut problems);
    check_times(costs, &mut problems);
    check_failures(costs, &mut problems);
    problems
}

fn check_sizes(costs: &Costs, problems: &mut Vec<String>) {
    if costs.gpus_per_node == 0 || costs.gpus_per_node > MAX_GPUS {
        problems.push(format!("gpus_per_node: found {}, expected 1 to {MAX_GPUS}", costs.gpus_per_node));
        return;
    }
    if costs.gpus.is_empty() {
        problems.push("gpus: found no size, expected at least one".to_owned());
    }
    for &gpus in &costs.gpus {
        if let Some(problem) = size_problem(gpus, costs.gpus_per_node) {
            problems.push(problem);
        }
    }
    if costs.run.steps == 0 || costs.run.steps > MAX_STEPS {
        problems.push(format!("run.steps: found {}, expected 1 to {MAX_STEPS}", costs.run.steps));
    }
    if costs.checkpoint.every_steps == Some(0) {
        problems.push("checkpoint.every_steps: found 0, expected at least 1".to_owned());
    }
}

/// What is wrong with a number of GPUs, if anything.
pub(super) fn size_problem(gpus: u32, gpus_per_node: u32) -> Option<String> {
    let fits = (1..=MAX_GPUS).contains(&gpus) && gpus.is_multiple_of(gpus_per_node);
    (!fits).then(|| format!("gpus: found {gpus}, expected a multiple of {gpus_per_node} (gpus_per_node) up to {MAX_GPUS}"))
}

fn check_times(costs: &Costs, problems: &mut Vec<String>) {
    let (step, network, checkpoint, recovery) = (&costs.step, &costs.network, &costs.checkpoint, &costs.recovery);
    let above_zero = [
        ("step.compute_s", Some(step.compute_s)),
        ("network.inside.bytes_per_s", Some(network.inside.bytes_per_s)),
        ("network.between.bytes_per_s", Some(network.between.bytes_per_s)),
        ("checkpoint.every_s", checkpoint.every_s),
        ("checkpoint.node_bytes_per_s", Some(checkpoint.node_bytes_per_s)),
        ("checkpoint.store_bytes_per_s", Some(checkpoint.store_bytes_per_s)),
        ("failures.gpu_mtbf_hours", costs.failures.gpu_mtbf_hours),
        ("coordinator.mtbf_hours", costs.coordinator.as_ref().map(|coordinator| coordinator.mtbf_hours)),
    ];
    for (key, value) in above_zero {
        if let Some(value) = value.filter(|value| !value.is_finite() || *value <= 0.0) {
            problems.push(format!("{key}: found {value}, expected a number above 0"));
        }
    }
    let not_negative = [
        ("run.startup_s", costs.run.startup_s),
        ("step.jitter", step.jitter),
        ("step.gradient_bytes", step.gradient_bytes),
        ("network.inside.latency_s", network.inside.latency_s),
        ("network.between.latency_s", network.between.latency_s),
        ("checkpoint.bytes", checkpoint.bytes),
        ("checkpoint.snapshot_s", checkpoint.snapshot_s),
        ("recovery.abort_s", recovery.abort_s),
        ("recovery.regroup_s", recovery.regroup_s),
        ("recovery.regroup_s_per_gpu", recovery.regroup_s_per_gpu),
        ("recovery.process_start_s", recovery.process_start_s),
        ("recovery.node_replacement_s", recovery.node_replacement_s),
        ("recovery.requeue_s", recovery.requeue_s),
        ("coordinator.restart_s", costs.coordinator.as_ref().map_or(0.0, |coordinator| coordinator.restart_s)),
    ];
    for (key, value) in not_negative {
        if !value.is_finite() || value < 0.0 {
            problems.push(format!("{key}: found {value}, expected 0 or more"));
        }
    }
    for (key, share) in [("step.hidden_share", step.hidden_share), ("recovery.min_nodes_share", recovery.min_nodes_share)] {
        if !(0.0..=1.0).contains(&share) {
            problems.push(format!("{key}: found {share}, expected 0 to 1"));
        }
    }
}

fn check_failures(costs: &Costs, problems: &mut Vec<String>) {
    let classes = &costs.failures.classes;
    for (position, class) in classes.iter().enumerate() {
        check_class(position, class, problems);
        if classes[..position].iter().any(|earlier| earlier.name == class.name) {
            problems.push(format!("failures.classes.{position}.name: `{}` stands here a second time", class.name));
        }
    }
    let shares: f64 = classes.iter().map(|class| class.share).sum();
    if costs.failures.gpu_mtbf_hours.is_some() && (shares - 1.0).abs() > SHARE_TOLERANCE {
        problems.push(format!("failures.classes: found shares that add up to {shares}, expected 1"));
    }
}

fn check_class(position: usize, class: &ClassCosts, problems: &mut Vec<String>) {
    if !(0.0..=1.0).contains(&class.share) {
        problems.push(format!("failures.classes.{position}.share: found {}, expected 0 to 1", class.share));
    }
    for (key, seconds) in [("detected_s", class.detected_s), ("undetected_s", class.undetected_s)] {
        if !seconds.is_finite() || seconds < 0.0 {
            problems.push(format!("failures.classes.{position}.{key}: found {seconds}, expected 0 or more"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The file that is shipped as an example.
    fn shipped() -> String {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../docs/simulate/h200.yaml");
        fs::read_to_string(path).unwrap()
    }

    #[test]
    fn the_shipped_costs_are_right() {
        let costs = parse(&shipped(), "h200.yaml").unwrap();
        assert_eq!(costs.gpus, [1024, 4096, 16_384]);
        assert_eq!(costs.gpus_per_node, 8);
        assert!(costs.coordinator.is_some());
    }

    #[test]
    fn an_unknown_key_is_refused_with_its_place() {
        let text = shipped().replacen("gpus_per_node:", "gpus_per_rack:", 1);
        let failure = parse(&text, "h200.yaml").unwrap_err();
        assert_eq!((failure.kind, failure.what.as_str()), (FailureKind::Recipe, "the costs file is not understood"));
        assert!(failure.place.unwrap().starts_with("h200.yaml:"));
        assert!(failure.cause.unwrap().contains("gpus_per_rack"));
    }

    #[test]
    fn all_problems_are_named_at_once() {
        let mut costs = parse(&shipped(), "h200.yaml").unwrap();
        costs.gpus = vec![1024, 12];
        costs.run.steps = 0;
        costs.step.compute_s = 0.0;
        costs.step.hidden_share = 1.5;
        costs.recovery.requeue_s = -1.0;
        costs.failures.classes[0].share = 0.9;
        costs.failures.classes[1].name = costs.failures.classes[0].name.clone();
        costs.checkpoint.every_steps = Some(0);
        let found = problems(&costs);
        let keys: Vec<&str> = found.iter().map(|problem| problem.split(':').next().unwrap()).collect();
        let expected = [
            "gpus",
            "run.steps",
            "checkpoint.every_steps",
            "step.compute_s",
            "recovery.requeue_s",
            "step.hidden_share",
            "failures.classes.1.name",
            "failures.classes",
        ];
        assert_eq!(keys, expected, "{found:#?}");
    }

    #[test]
    fn a_missing_file_is_an_input_failure() {
        let failure = read(Path::new("/nowhere/costs.yaml")).unwrap_err();
        assert_eq!(failure.kind, FailureKind::Input);
        assert_eq!(failure.place.as_deref(), Some("/nowhere/costs.yaml"));
    }

    #[test]
    fn broken_values_do_not_pass_as_numbers() {
        for (from, to) in [("compute_s: ", "compute_s: .nan #"), ("jitter: ", "jitter: much #"), ("steps: ", "steps: -4 #")] {
            let text = shipped().replacen(from, to, 1);
            assert!(parse(&text, "h200.yaml").is_err(), "{to}");
        }
    }
}
