//! What must hold for every simulation.

use super::closed_form::estimate;
use super::costs::{ClassCosts, CoordinatorCosts, Costs, Loses};
use super::model::Model;
use super::sample::costs;
use super::*;

const SEEDS: std::ops::Range<u64> = 0..12;

fn all_on() -> Case {
    Case { gpus: 64, mechanisms: Mechanisms::all() }
}

fn mean_goodput(costs: &Costs, mechanisms: Mechanisms) -> f64 {
    let case = Case { gpus: 64, mechanisms };
    SEEDS.map(|seed| simulate(costs, &case, seed).unwrap().goodput()).sum::<f64>() / SEEDS.count() as f64
}

fn mean_wall_s(costs: &Costs, case: &Case) -> f64 {
    SEEDS.map(|seed| simulate(costs, case, seed).unwrap().wall_s).sum::<f64>() / SEEDS.count() as f64
}

#[test]
fn without_failures_the_wall_time_is_the_sum_of_its_parts() {
    let mut costs = costs();
    costs.failures.gpu_mtbf_hours = None;
    costs.step.jitter = 0.0;
    costs.run.steps = 1_000;
    let model = Model::new(&costs, 64);
    let step = model.step(model.nodes, 0.5);
    // Steps of s seconds, and a save when 120 s of them are done.
    let steps_per_save = (120.0 / step.total()).ceil() as u64;
    let saves = 999 / steps_per_save;
    for (mechanisms, blocked_s) in [(Mechanisms::all(), 0.5), (Mechanisms::default(), 16.5)] {
        let outcome = simulate(&costs, &Case { gpus: 64, mechanisms }, 3).unwrap();
        assert_eq!((outcome.failures, outcome.steps_lost, outcome.checkpoints), (0, 0, saves + 1));
        let expected_s = 30.0 + 1_000.0 * step.total() + saves as f64 * blocked_s + 16.5;
        assert!((outcome.wall_s - expected_s).abs() < 1e-6, "{} {expected_s}", outcome.wall_s);
        assert!((outcome.goodput() - 1_000.0 / expected_s).abs() < 1e-9);
        assert!((outcome.spent.get(Cause::Communication) - 1_000.0 * step.get(Cause::Communication)).abs() < 1e-6);
    }
}

#[test]
fn a_seed_decides_everything() {
    let costs = costs();
    let first = simulate(&costs, &all_on(), 5).unwrap();
    assert_eq!(first, simulate(&costs, &all_on(), 5).unwrap());
    assert_ne!(first.wall_s.to_bits(), simulate(&costs, &all_on(), 6).unwrap().wall_s.to_bits());
}

#[test]
fn every_second_has_a_cause_and_every_step_is_done() {
    let mut costs = costs();
    costs.coordinator = Some(CoordinatorCosts { mtbf_hours: 1.0, restart_s: 20.0 });
    for (name, mechanisms) in Mechanisms::arrangements() {
        for seed in SEEDS {
            let outcome = simulate(&costs, &Case { gpus: 64, mechanisms }, seed).unwrap();
            assert!((outcome.spent.total() - outcome.wall_s).abs() < 1e-6 * outcome.wall_s, "{name}, seed {seed}");
            let computed_s = costs.run.steps as f64 * costs.step.compute_s;
            assert!((outcome.spent.get(Cause::Compute) - computed_s).abs() < 1e-6 * computed_s, "{name}, seed {seed}");
            assert!(Cause::all().into_iter().all(|cause| outcome.spent.get(cause) >= -1e-6), "{name}, seed {seed}: {outcome:?}");
        }
    }
}

#[test]
fn more_failures_never_raise_the_goodput() {
    for mechanisms in [Mechanisms::all(), Mechanisms::default()] {
        let goodputs: Vec<f64> = [8.0, 4.0, 2.0, 1.0, 0.5]
            .into_iter()
            .map(|factor| {
                let mut costs = costs();
                costs.failures.gpu_mtbf_hours = costs.failures.gpu_mtbf_hours.map(|hours| hours * factor);
                mean_goodput(&costs, mechanisms)
            })
            .collect();
        assert!(goodputs.is_sorted_by(|left, right| left > right), "{goodputs:?}");
    }
}

#[test]
fn every_mechanism_pays() {
    let costs = costs();
    let arrangements = Mechanisms::arrangements();
    let goodputs: Vec<f64> = arrangements.iter().map(|(_, mechanisms)| mean_goodput(&costs, *mechanisms)).collect();
    // The first six add one mechanism each, the others lack one.
    assert!(goodputs[..6].is_sorted_by(|left, right| left < right), "{goodputs:?}");
    let all = goodputs[5];
    assert!(goodputs[6..].iter().all(|without| *without < all), "{goodputs:?}");
}

#[test]
fn what_is_switched_off_costs_its_own_cause() {
    let mut costs = costs();
    costs.recovery.spare_nodes = 0;
    let share = |mechanisms, cause| {
        let outcomes: Vec<Outcome> = SEEDS.map(|seed| simulate(&costs, &Case { gpus: 64, mechanisms }, seed).unwrap()).collect();
        let total_s: f64 = outcomes.iter().map(|outcome| outcome.wall_s).sum();
        outcomes.iter().map(|outcome| outcome.spent.get(cause)).sum::<f64>() / total_s
    };
    let all = Mechanisms::all();
    assert!(share(Mechanisms { fast_detection: false, ..all }, Cause::Detection) > 5.0 * share(all, Cause::Detection));
    assert!(share(Mechanisms { async_checkpoint: false, ..all }, Cause::Checkpoint) > 5.0 * share(all, Cause::Checkpoint));
    assert!(share(Mechanisms { memory_restore: false, ..all }, Cause::LostWork) > 5.0 * share(all, Cause::LostWork));
    assert!(share(Mechanisms { memory_restore: false, ..all }, Cause::Restore) > 5.0 * share(all, Cause::Restore));
    assert!(share(Mechanisms { elastic: false, ..all }, Cause::WaitingForNodes) > 0.05);
    assert!(share(all, Cause::WaitingForNodes) < 0.01);
    assert!(share(all, Cause::Shrunken) > 0.0, "without spare nodes the run is smaller for a while");
    assert!(share(Mechanisms { elastic: false, ..all }, Cause::Shrunken).abs() < f64::EPSILON);
}

#[test]
fn restoring_from_memory_loses_no_step() {
    let outcome = simulate(&costs(), &all_on(), 2).unwrap();
    assert!(outcome.failures > 0);
    assert_eq!(outcome.steps_lost, 0);
    let without = Mechanisms { memory_restore: false, ..Mechanisms::all() };
    assert!(simulate(&costs(), &Case { gpus: 64, mechanisms: without }, 2).unwrap().steps_lost > 0);
}

/// A cluster as the closed form sees it: one class of failures, no jitter, short steps.
fn textbook(mtbf_s: f64, interval_s: f64) -> Costs {
    let mut costs = costs();
    costs.run.steps = 40_000;
    costs.step.jitter = 0.0;
    costs.failures.gpu_mtbf_hours = Some(mtbf_s * 64.0 / 3600.0);
    costs.failures.classes =
        vec![ClassCosts { name: "crash".to_owned(), share: 1.0, loses: Loses::Process, detected_s: 2.0, undetected_s: 60.0 }];
    costs.checkpoint.every_s = Some(interval_s);
    costs
}

#[test]
fn the_closed_form_agrees() {
    let costs = textbook(2_000.0, 250.0);
    for mechanisms in [
        Mechanisms::default(),
        Mechanisms { fast_detection: true, restart_in_place: true, ..Mechanisms::default() },
        Mechanisms { memory_restore: false, ..Mechanisms::all() },
        Mechanisms::all(),
    ] {
        let case = Case { gpus: 64, mechanisms };
        let (simulated_s, estimated_s) = (mean_wall_s(&costs, &case), estimate(&costs, &case).wall_s);
        let ratio = simulated_s / estimated_s;
        assert!((0.95..1.05).contains(&ratio), "{mechanisms:?}: simulated {simulated_s}, estimated {estimated_s}");
    }
}

#[test]
fn dalys_interval_is_within_fifteen_per_cent_of_the_best() {
    let case = Case { gpus: 64, mechanisms: Mechanisms { fast_detection: true, restart_in_place: true, ..Mechanisms::default() } };
    let recommended_s = estimate(&textbook(2_000.0, 250.0), &case).best_interval_s.unwrap();
    let wall_s = |interval_s: f64| mean_wall_s(&textbook(2_000.0, interval_s), &case);
    let recommended = wall_s(recommended_s);
    let best = [0.25, 0.5, 0.7, 1.4, 2.0, 4.0].into_iter().map(|factor| wall_s(recommended_s * factor)).fold(recommended, f64::min);
    assert!(recommended <= 1.15 * best, "{recommended} {best}");
    assert!(wall_s(recommended_s / 8.0) > 1.1 * recommended, "far too many checkpoints");
    assert!(wall_s(recommended_s * 8.0) > 1.1 * recommended, "far too few");
}

#[test]
fn a_coordinator_that_fails_ends_a_job_only_without_a_restart_in_place() {
    let mut costs = costs();
    costs.failures.gpu_mtbf_hours = None;
    costs.coordinator = Some(CoordinatorCosts { mtbf_hours: 0.2, restart_s: 5.0 });
    let calm = simulate(&costs, &all_on(), 1).unwrap();
    assert_eq!(calm.failures, 0);
    assert!(simulate(&costs, &Case { gpus: 64, mechanisms: Mechanisms::default() }, 1).unwrap().failures > 0);
}

#[test]
fn a_failure_while_the_coordinator_is_away_is_noticed_when_it_is_back() {
    let mut costs = costs();
    let detection_s = |costs: &Costs| SEEDS.map(|seed| simulate(costs, &all_on(), seed).unwrap().spent.get(Cause::Detection)).sum::<f64>();
    let undisturbed_s = detection_s(&costs);
    costs.coordinator = Some(CoordinatorCosts { mtbf_hours: 0.1, restart_s: 200.0 });
    assert!(detection_s(&costs) > undisturbed_s);
}

#[test]
fn scheduled_failures_happen_at_their_steps() {
    let mut costs = costs();
    costs.run.steps = 100;
    costs.step.jitter = 0.0;
    costs.checkpoint.every_s = None;
    costs.checkpoint.every_steps = Some(40);
    let at = |step, from_memory| ScheduledFailure { step, class: 0, from_memory };
    let memory = simulate_schedule(&costs, &all_on(), &[at(90, true), at(50, true)]).unwrap();
    assert_eq!((memory.failures, memory.steps_lost), (2, 0));
    let mechanisms = Mechanisms { fast_detection: true, restart_in_place: true, ..Mechanisms::default() };
    let store = simulate_schedule(&costs, &Case { gpus: 64, mechanisms }, &[at(90, false), at(50, false)]).unwrap();
    assert_eq!((store.failures, store.steps_lost), (2, 20), "from 50 back to 40 and from 90 back to 80");
    let unknown = simulate_schedule(&costs, &all_on(), &[ScheduledFailure { class: 9, ..at(1, true) }]);
    assert_eq!(unknown.unwrap_err().found.as_deref(), Some("9"));
}

#[test]
fn a_run_that_never_ends_is_a_failure() {
    let mut costs = costs();
    costs.run.steps = 100_000;
    // A failure of the cluster every half second, and ten seconds to start a process.
    costs.failures.gpu_mtbf_hours = Some(32.0 / 3600.0);
    let case = Case { gpus: 64, mechanisms: Mechanisms::default() };
    let failure = simulate(&costs, &case, 1).unwrap_err();
    assert!(failure.what.contains("does not end"), "{failure}");
}
