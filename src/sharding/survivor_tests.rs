//! A shared state outlives its workers: real rings, one thread for each worker, shares lost between two steps and in the midst of one.

use std::ops::Range;
use std::sync::Mutex;

use cloze_recipes::recipe::{Recipe, Shard};

use super::survivors::{self, Brought, Mine, Shares};
use super::tests::{PlainPart, STEPS, WholeState, batch, empty_state, figures, merged, on_all, plain_share, recipe, rings, started, step};
use crate::collective::api::{CollectiveCause, Operation, WaitObserver};
use crate::collective::{AbortHandle, Collective, CollectiveError};
use crate::optim::schedule::Schedule;
use crate::step::{Asks, State, Trainer, train_step};

const SHARED: [Shard; 3] = [Shard::Optimizer, Shard::Gradients, Shard::Parameters];
/// Steps before something is lost.
const BEFORE: u64 = 5;

fn replicated(shard: Shard) -> Recipe {
    let mut recipe = recipe(shard);
    recipe.train.replicate_shards = true;
    recipe
}

fn schedule(recipe: &Recipe) -> Schedule {
    Schedule::new(&recipe.train.schedule, recipe.train.learning_rate, STEPS)
}

/// Takes steps; their figures.
fn take(trainer: &mut Trainer, steps: Range<u64>) -> Vec<[f64; 2]> {
    steps.map(|number| figures(step(trainer, number, Asks::default()).unwrap())).collect()
}

/// The states of all ranks after some steps, and the whole of them.
fn trained(recipe: &Recipe, world_size: usize, steps: u64) -> (Vec<State>, WholeState) {
    let results = on_all(rings(world_size), |collective| {
        let mut trainer = started(recipe, collective);
        take(&mut trainer, 0..steps);
        let share = plain_share(&trainer);
        (trainer.into_state(), share)
    });
    let (states, shares): (Vec<State>, Vec<Vec<PlainPart>>) = results.into_iter().unzip();
    (states, merged(shares))
}

/// A worker of the next generation: what it still has, and how many steps that has done.
type Survivor = Option<(State, u64)>;

/// What became of a worker: whether all shares were there, its share, the figures of the steps that it took after that.
struct Outcome {
    is_whole: bool,
    share: Vec<PlainPart>,
    figures: Vec<[f64; 2]>,
}

/// As a generation does it: levels, deals, and takes the remaining steps. `old` is how many ranks had shared the state out.
fn go_on(recipe: &Recipe, survivors: Vec<Survivor>, (old, from): (usize, u64)) -> Vec<Outcome> {
    let rings = rings(survivors.len());
    let survivors = Mutex::new(survivors);
    on_all(rings, |mut collective| {
        let rank = collective.rank();
        let mut survivor = survivors.lock().unwrap()[rank].take();
        let brought = survivor.as_mut().map_or(Brought::Nothing, |(state, steps_done)| Brought::State(state, steps_done));
        survivors::level(brought, (from, old), |steps_done| schedule(recipe).learning_rate(steps_done), collective.as_mut()).unwrap();
        let place = empty_state(recipe, collective.as_ref()).place().unwrap();
        let (kept, shares) = match survivor {
            Some((state, steps_done)) if state.place() == Some(place) => {
                assert_eq!(steps_done, from, "rank {rank}");
                (Some(state), None)
            }
            other => (None, other.map(|(state, _)| Shares::out_of(state).unwrap())),
        };
        let steps_done = kept.as_ref().map(|_| from);
        let state = kept.unwrap_or_else(|| empty_state(recipe, collective.as_ref()));
        let mut trainer = Trainer::new(recipe, state, schedule(recipe), collective).unwrap();
        let mine = Mine::of((from, old), steps_done, shares.as_ref().map(|shares| (shares, from)), trainer.collective.world_size());
        let is_whole = trainer.deal(mine, old).unwrap().is_empty();
        assert!(trainer.state_is_whole());
        trainer.optimizer.set_steps_done(from);
        let share = plain_share(&trainer);
        let figures = if is_whole { take(&mut trainer, from..STEPS) } else { Vec::new() };
        Outcome { is_whole, share: if is_whole { share } else { Vec::new() }, figures }
    })
}

/// Those ranks are lost, and others take their places.
fn without(states: Vec<State>, lost: &[usize]) -> Vec<Survivor> {
    states.into_iter().enumerate().map(|(rank, state)| (!lost.contains(&rank)).then_some((state, BEFORE))).collect()
}

#[test]
fn replicas_change_nothing_of_what_is_computed() {
    for shard in SHARED {
        for world_size in 1..=3 {
            let (_, plain) = trained(&recipe(shard), world_size, STEPS);
            assert!(trained(&replicated(shard), world_size, STEPS).1 == plain, "{shard:?}, world {world_size}");
        }
    }
}

#[test]
fn a_replica_takes_the_place_of_a_lost_share_and_the_run_ends_with_the_same_bits() {
    for shard in SHARED {
        let recipe = replicated(shard);
        let expected = on_all(rings(3), |collective| take(&mut started(&recipe, collective), 0..STEPS)).remove(0);
        for lost in 0..3 {
            let (states, whole) = trained(&recipe, 3, BEFORE);
            let outcomes = go_on(&recipe, without(states, &[lost]), (3, BEFORE));
            assert!(outcomes.iter().all(|outcome| outcome.is_whole));
            assert!(outcomes.iter().all(|outcome| outcome.figures[..] == expected[BEFORE as usize..]), "{shard:?}, rank {lost}");
            assert!(merged(outcomes.into_iter().map(|outcome| outcome.share).collect()) == whole, "{shard:?}, rank {lost}");
        }
    }
}

#[test]
fn fewer_workers_or_more_share_the_same_state_out_anew() {
    for shard in SHARED {
        // The last rank is lost, and nobody comes.
        let shrinking = replicated(shard);
        let (states, whole) = trained(&shrinking, 3, BEFORE);
        let survivors = without(states, &[2]).into_iter().take(2).collect();
        let outcomes = go_on(&shrinking, survivors, (3, BEFORE));
        assert!(merged(outcomes.into_iter().map(|outcome| outcome.share).collect()) == whole, "{shard:?}");
        // One more comes, and there are no replicas.
        let growing = recipe(shard);
        let (states, whole) = trained(&growing, 2, BEFORE);
        let members = without(states, &[]).into_iter().chain([None]).collect();
        let outcomes = go_on(&growing, members, (2, BEFORE));
        assert!(merged(outcomes.into_iter().map(|outcome| outcome.share).collect()) == whole, "{shard:?}");
    }
}

#[test]
fn a_share_that_is_lost_with_its_replica_is_missed_by_all() {
    for (recipe, lost) in [(replicated(Shard::Parameters), vec![0, 1]), (recipe(Shard::Optimizer), vec![2])] {
        let (states, _) = trained(&recipe, 3, BEFORE);
        assert!(go_on(&recipe, without(states, &lost), (3, BEFORE)).iter().all(|outcome| !outcome.is_whole));
    }
}

/// Rank 0 alone has the norm of the last step when the connections break: it takes the step, and the others follow.
#[test]
fn a_step_that_only_one_worker_has_taken_is_taken_by_all() {
    for (shard, lost) in SHARED.into_iter().flat_map(|shard| [(shard, 1), (shard, 2)]) {
        let recipe = replicated(shard);
        let (_, whole) = trained(&recipe, 3, BEFORE);
        let states = on_all(rings(3), |collective| {
            let is_first = collective.rank() == 0;
            let cut = Cut { inner: collective, sums_of_one: if is_first { u64::MAX } else { BEFORE } };
            let mut trainer = started(&recipe, Box::new(cut));
            take(&mut trainer, 0..BEFORE - 1);
            let batch = batch(BEFORE - 1, trainer.collective.as_ref());
            let outcome = train_step(&mut trainer, &batch, Asks::default(), &mut || Ok(()));
            let has_taken_it = outcome.is_ok();
            assert_eq!(has_taken_it, is_first, "{shard:?}");
            // Values that every worker has are still to come.
            let is_spread = outcome.is_ok_and(|outcome| outcome.spread.is_ok());
            assert_eq!(is_spread, is_first && shard == Shard::Parameters, "{shard:?}");
            let state = trainer.into_state();
            assert_eq!(survivors::next_is_summed(&state, BEFORE - 1), !is_first);
            (state, if has_taken_it { BEFORE } else { BEFORE - 1 })
        });
        // And one of those that have not taken it is lost; its replica is with the one that has, or with the other.
        let survivors = states.into_iter().enumerate().map(|(rank, kept)| (rank != lost).then_some(kept)).collect();
        let outcomes = go_on(&recipe, survivors, (3, BEFORE));
        assert!(outcomes.iter().all(|outcome| outcome.is_whole));
        assert!(merged(outcomes.into_iter().map(|outcome| outcome.share).collect()) == whole, "{shard:?}, rank {lost}");
    }
}

/// A group whose sums of one number, those of the norm, fail on this rank after so many that did not; the others see them done.
struct Cut {
    inner: Box<dyn Collective>,
    sums_of_one: u64,
}

impl Collective for Cut {
    fn rank(&self) -> usize {
        self.inner.rank()
    }

    fn world_size(&self) -> usize {
        self.inner.world_size()
    }

    fn set_step(&mut self, step: u64) {
        self.inner.set_step(step);
    }

    fn all_reduce_sum(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.inner.all_reduce_sum(data)?;
        self.sums_of_one -= u64::from(data.len() == 1);
        if self.sums_of_one == 0 { Err(self.error(Operation::AllReduce, CollectiveCause::Closed)) } else { Ok(()) }
    }

    fn reduce_scatter_sum(&mut self, data: &mut [f32]) -> Result<Range<usize>, CollectiveError> {
        self.inner.reduce_scatter_sum(data)
    }

    fn all_gather(&mut self, data: &mut [f32]) -> Result<(), CollectiveError> {
        self.inner.all_gather(data)
    }

    fn gather_share(&mut self, data: &mut [f32], distance: usize) -> Result<Range<usize>, CollectiveError> {
        self.inner.gather_share(data, distance)
    }

    fn broadcast(&mut self, data: &mut [u8], root: usize) -> Result<(), CollectiveError> {
        self.inner.broadcast(data, root)
    }

    fn barrier(&mut self) -> Result<(), CollectiveError> {
        self.inner.barrier()
    }

    fn abort_handle(&self) -> AbortHandle {
        self.inner.abort_handle()
    }

    fn set_wait_observer(&mut self, observer: WaitObserver) {
        self.inner.set_wait_observer(observer);
    }

    fn error(&self, operation: Operation, cause: CollectiveCause) -> CollectiveError {
        self.inner.error(operation, cause)
    }
}
