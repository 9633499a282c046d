//! What every [`Collective`] must do; each transport runs this suite.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use super::api::{Collective, CollectiveCause, CollectiveError, Operation};
use super::layout::{share_before, share_of};

const WORLD_SIZES: [usize; 4] = [1, 2, 3, 5];
/// Timeout of groups in which nobody is late: far longer than a test takes on a busy machine.
const AMPLE: Duration = Duration::from_mins(1);
/// Timeout of groups in which somebody is late; the group must have formed within it.
const SHORT_MS: u64 = 1000;
const OPERATIONS: [Operation; 6] = [
    Operation::AllReduce,
    Operation::ReduceScatter,
    Operation::AllGather,
    Operation::GatherShare,
    Operation::Broadcast,
    Operation::Barrier,
];

/// Checks a transport; `make` forms a new group of the given size and timeout and returns its members by rank.
pub fn conformance(make: impl Fn(usize, Duration) -> Vec<Box<dyn Collective>>) {
    for world_size in WORLD_SIZES {
        on_all(&mut make(world_size, AMPLE), sums_are_right);
        on_all(&mut make(world_size, AMPLE), shares_are_right);
        on_all(&mut make(world_size, AMPLE), broadcasts_reach_everyone);
        on_all(&mut make(world_size, AMPLE), waits_are_observed);
        a_root_outside_the_world_is_refused(&mut make(world_size, AMPLE));
        a_share_from_beyond_the_world_is_refused(&mut make(world_size, AMPLE));
        nobody_passes_a_barrier_early(&mut make(world_size, AMPLE));
        let first = bits_of_sums(&mut make(world_size, AMPLE));
        assert_eq!(first, bits_of_sums(&mut make(world_size, AMPLE)), "a second run differs");
    }
    for world_size in [2, 3] {
        a_dead_peer_is_an_error(make(world_size, AMPLE));
        for operation in OPERATIONS {
            an_abort_unblocks(make(world_size, AMPLE), operation);
        }
    }
    every_operation_has_a_deadline(&make);
    a_world_of_one_can_be_aborted(&mut make(1, AMPLE));
}

/// Runs `body` on all members at once, each in a thread of its own, and returns the results by rank.
pub fn on_all<T: Send>(group: &mut [Box<dyn Collective>], body: impl Fn(&mut dyn Collective) -> T + Sync) -> Vec<T> {
    let body = &body;
    thread::scope(|scope| {
        let threads: Vec<_> = group.iter_mut().map(|member| scope.spawn(move || body(member.as_mut()))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

/// Values of one rank that do not add up exactly, so that the order of the additions shows.
pub fn sample(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|index| ((index * 31 + rank * 17) as f32 * 0.137).sin() * 10f32.powi((index % 7) as i32 - 3)).collect()
}

/// Values of one rank that add up exactly in any order, because they are small whole numbers.
pub fn whole_numbers(rank: usize, len: usize) -> Vec<f32> {
    (0..len).map(|index| ((index * 7 + rank * 13) % 101) as f32 - 50.0).collect()
}

/// The sums of the [`whole_numbers`] of all ranks.
pub fn sums_of_whole_numbers(world_size: usize, len: usize) -> Vec<f32> {
    let inputs: Vec<Vec<f32>> = (0..world_size).map(|rank| whole_numbers(rank, len)).collect();
    (0..len).map(|index| inputs.iter().map(|input| input[index]).sum()).collect()
}

/// Lengths around every boundary that a transport may have.
pub fn lengths(world_size: usize) -> [usize; 8] {
    [0, 1, 2, world_size - 1, world_size, 7, 1000, 100_003]
}

/// Fails unless `data` has exactly the values `expected` inside `range`.
#[track_caller]
pub fn assert_same(data: &[f32], expected: &[f32], range: Range<usize>) {
    for index in range {
        let (value, wanted) = (data[index], expected[index]);
        assert_eq!(value.to_bits(), wanted.to_bits(), "index {index} of {}: {value} instead of {wanted}", data.len());
    }
}

/// One member's part in the check of all-reduce.
pub fn sums_are_right(member: &mut dyn Collective) {
    let (rank, world_size) = (member.rank(), member.world_size());
    for len in lengths(world_size) {
        let mut data = whole_numbers(rank, len);
        member.all_reduce_sum(&mut data).unwrap();
        assert_same(&data, &sums_of_whole_numbers(world_size, len), 0..len);
    }
}

/// One member's part in the check of reduce-scatter, all-gather and the gathering of one share.
pub fn shares_are_right(member: &mut dyn Collective) {
    let (rank, world_size) = (member.rank(), member.world_size());
    for len in lengths(world_size) {
        let expected = sums_of_whole_numbers(world_size, len);
        let mut data = whole_numbers(rank, len);
        let share = member.reduce_scatter_sum(&mut data).unwrap();
        assert_eq!(share, share_of(len, world_size, rank));
        assert_same(&data, &expected, share.clone());

        // Nothing but the own share may be used.
        let mut gathered = vec![f32::NAN; len];
        gathered[share.clone()].copy_from_slice(&data[share.clone()]);
        member.all_gather(&mut gathered).unwrap();
        assert_same(&gathered, &expected, 0..len);

        for distance in 0..world_size {
            let mut passed = vec![f32::NAN; len];
            passed[share.clone()].copy_from_slice(&data[share.clone()]);
            let other = member.gather_share(&mut passed, distance).unwrap();
            assert_eq!(other, share_before(len, world_size, rank, distance));
            assert_same(&passed, &expected, other);
            assert_same(&passed, &expected, share.clone());
        }
    }
}

/// One member's part in the check of broadcasts.
pub fn broadcasts_reach_everyone(member: &mut dyn Collective) {
    let (rank, world_size) = (member.rank(), member.world_size());
    for (root, len) in (0..world_size).flat_map(|root| [0, 1, 7, 300_001].map(|len| (root, len))) {
        let bytes = |rank: usize| (0..len).map(|index| (index * 3 + rank) as u8).collect::<Vec<_>>();
        let mut data = bytes(rank);
        member.broadcast(&mut data, root).unwrap();
        assert!(data == bytes(root), "root {root}, length {len}, rank {rank}");
    }
}

/// One member's part in the check that each operation tells its observer twice: when it begins and when it has ended.
pub fn waits_are_observed(member: &mut dyn Collective) {
    let seen = Arc::new(Mutex::new(Vec::new()));
    let observed = Arc::clone(&seen);
    member.set_wait_observer(Arc::new(move |is_waiting| observed.lock().unwrap().push(is_waiting)));
    for operation in OPERATIONS {
        perform(member, operation, 100_003).unwrap();
    }
    assert_eq!(*seen.lock().unwrap(), [true, false].repeat(OPERATIONS.len()));
}

/// Runs one operation; the last rank is the root of a broadcast, so that rank 0 waits in each of them.
fn perform(member: &mut dyn Collective, operation: Operation, len: usize) -> Result<(), CollectiveError> {
    let mut data = vec![1.0; len];
    let root = member.world_size() - 1;
    match operation {
        Operation::Connect => Ok(()),
        Operation::AllReduce => member.all_reduce_sum(&mut data),
        Operation::ReduceScatter => member.reduce_scatter_sum(&mut data).map(|_| ()),
        Operation::AllGather => member.all_gather(&mut data),
        Operation::GatherShare => member.gather_share(&mut data, root.min(1)).map(|_| ()),
        Operation::Broadcast => member.broadcast(&mut vec![0; len], root),
        Operation::Barrier => member.barrier(),
    }
}

/// The bits of all sums, once for the whole group, after a check that all ranks have the same.
fn bits_of_sums(group: &mut [Box<dyn Collective>]) -> Vec<u32> {
    let world_size = group.len();
    let mut sums = on_all(group, |member| {
        let mut bits = Vec::new();
        for len in lengths(world_size) {
            let mut data = sample(member.rank(), len);
            member.all_reduce_sum(&mut data).unwrap();
            bits.extend(data.into_iter().map(f32::to_bits));
            let mut data = sample(member.rank(), len);
            member.reduce_scatter_sum(&mut data).unwrap();
            member.all_gather(&mut data).unwrap();
            bits.extend(data.into_iter().map(f32::to_bits));
        }
        bits
    });
    let first = sums.swap_remove(0);
    assert!(sums.into_iter().all(|other| other == first), "the ranks differ in a world of {world_size}");
    first
}

fn a_root_outside_the_world_is_refused(group: &mut [Box<dyn Collective>]) {
    let world_size = group.len();
    let results = on_all(group, |member| member.broadcast(&mut [0], world_size));
    assert!(results.iter().all(Result::is_err));
}

fn a_share_from_beyond_the_world_is_refused(group: &mut [Box<dyn Collective>]) {
    let world_size = group.len();
    let results = on_all(group, |member| member.gather_share(&mut [0.0], world_size));
    assert!(results.iter().all(Result::is_err));
}

fn nobody_passes_a_barrier_early(group: &mut [Box<dyn Collective>]) {
    let world_size = group.len();
    let arrived = AtomicUsize::new(0);
    on_all(group, |member| {
        for round in 1..=10 {
            arrived.fetch_add(1, Ordering::SeqCst);
            member.barrier().unwrap();
            assert!(arrived.load(Ordering::SeqCst) >= round * world_size);
            member.barrier().unwrap();
        }
    });
}

fn a_dead_peer_is_an_error(mut group: Vec<Box<dyn Collective>>) {
    on_all(&mut group, |member| member.barrier().unwrap());
    drop(group.pop());
    let errors = on_all(&mut group, |member| {
        let mut data = vec![1.0; 100_003];
        loop {
            if let Err(error) = member.all_reduce_sum(&mut data) {
                return error;
            }
        }
    });
    for (rank, error) in errors.into_iter().enumerate() {
        assert_eq!(error.rank, rank);
        assert!(error.peer.is_some_and(|peer| peer != rank), "{error}");
        assert!(!matches!(error.cause, CollectiveCause::TimedOut { .. }), "the timeout was waited for: {error}");
    }
}

/// Rank 0 waits alone; the abort comes when it says that it waits.
fn an_abort_unblocks(mut group: Vec<Box<dyn Collective>>, operation: Operation) {
    let mut waiting = group.swap_remove(0);
    let handle = waiting.abort_handle();
    let (sender, news) = channel();
    let observed = Mutex::new(sender);
    waiting.set_wait_observer(Arc::new(move |is_waiting| observed.lock().unwrap().send(is_waiting).unwrap()));
    let error = thread::scope(|scope| {
        let blocked = scope.spawn(move || perform(waiting.as_mut(), operation, 100_003).unwrap_err());
        assert!(news.recv().unwrap());
        handle.abort("worker 1 is lost");
        assert!(!news.recv().unwrap(), "the wait has an end");
        blocked.join().unwrap()
    });
    assert_eq!(error.operation, operation);
    assert_eq!(error.cause, CollectiveCause::Aborted("worker 1 is lost".to_owned()), "{error}");
}

/// Rank 0 waits alone in each operation while the others live and stay silent.
fn every_operation_has_a_deadline(make: &impl Fn(usize, Duration) -> Vec<Box<dyn Collective>>) {
    let timeout = Duration::from_millis(SHORT_MS);
    let mut groups = OPERATIONS.map(|operation| (operation, make(3, timeout)));
    thread::scope(|scope| {
        for (operation, group) in &mut groups {
            scope.spawn(move || {
                let error = perform(group[0].as_mut(), *operation, 100_003).unwrap_err();
                assert_eq!((error.operation, error.rank, error.peer), (*operation, 0, Some(2)), "{error}");
                assert!(matches!(error.cause, CollectiveCause::TimedOut { timeout_ms: SHORT_MS, .. }), "{error}");
                assert_eq!(perform(group[0].as_mut(), *operation, 1).unwrap_err(), error, "the first error stays");
            });
        }
    });
}

fn a_world_of_one_can_be_aborted(group: &mut [Box<dyn Collective>]) {
    let member = &mut group[0];
    member.barrier().unwrap();
    member.abort_handle().abort("enough");
    assert!(member.barrier().unwrap_err().to_string().contains("enough"));
}
