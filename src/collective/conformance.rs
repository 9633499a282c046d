//! What every [`Collective`] must do; each transport runs this suite.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use super::api::Collective;

const MAX_WORLD_SIZE: usize = 5;

/// Checks a transport; `make` forms a new group of the given size and returns its members by rank.
pub fn conformance(make: impl Fn(usize) -> Vec<Box<dyn Collective>>) {
    for world_size in 1..=MAX_WORLD_SIZE {
        sums_are_right(&mut make(world_size));
        broadcasts_reach_everyone(&mut make(world_size));
        a_root_outside_the_world_is_refused(&mut make(world_size));
        nobody_passes_a_barrier_early(&mut make(world_size));
        let first = bits_of_sums(&mut make(world_size));
        assert_eq!(first, bits_of_sums(&mut make(world_size)), "a second run differs");
    }
    for world_size in 2..=MAX_WORLD_SIZE {
        a_dead_peer_is_an_error(make(world_size));
        an_abort_unblocks(make(world_size));
    }
    a_world_of_one_can_be_aborted(&mut make(1));
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

fn lengths(world_size: usize) -> [usize; 7] {
    [0, 1, 2, world_size - 1, 7, 1000, 100_003]
}

fn sums_are_right(group: &mut [Box<dyn Collective>]) {
    let world_size = group.len();
    // Small whole numbers add up exactly in any order.
    let value = |rank: usize, index: usize| ((index * 7 + rank * 13) % 101) as f32 - 50.0;
    let seen = on_all(group, |member| {
        assert_eq!(member.world_size(), world_size);
        for len in lengths(world_size) {
            let mut data: Vec<f32> = (0..len).map(|index| value(member.rank(), index)).collect();
            member.all_reduce_sum(&mut data).unwrap();
            for (index, sum) in data.into_iter().enumerate() {
                let expected: f32 = (0..world_size).map(|rank| value(rank, index)).sum();
                assert!((sum - expected).abs() < f32::EPSILON, "world {world_size}, length {len}, index {index}: {sum} is not {expected}");
            }
        }
        member.rank()
    });
    assert_eq!(seen, (0..world_size).collect::<Vec<_>>());
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
        }
        bits
    });
    let first = sums.swap_remove(0);
    assert!(sums.into_iter().all(|other| other == first), "the ranks differ in a world of {world_size}");
    first
}

fn broadcasts_reach_everyone(group: &mut [Box<dyn Collective>]) {
    let world_size = group.len();
    on_all(group, |member| {
        for (root, len) in (0..world_size).flat_map(|root| [0, 1, 7, 300_001].map(|len| (root, len))) {
            let bytes = |rank: usize| (0..len).map(|index| (index * 3 + rank) as u8).collect::<Vec<_>>();
            let mut data = bytes(member.rank());
            member.broadcast(&mut data, root).unwrap();
            assert!(data == bytes(root), "root {root}, length {len}, rank {}", member.rank());
        }
    });
}

fn a_root_outside_the_world_is_refused(group: &mut [Box<dyn Collective>]) {
    let world_size = group.len();
    let results = on_all(group, |member| member.broadcast(&mut [0], world_size));
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
    let started = Instant::now();
    let errors = on_all(&mut group, |member| {
        let mut data = vec![1.0; 100_003];
        loop {
            if let Err(error) = member.all_reduce_sum(&mut data) {
                return error;
            }
        }
    });
    assert!(started.elapsed() < Duration::from_secs(5));
    for (rank, error) in errors.into_iter().enumerate() {
        assert_eq!(error.rank, rank);
        assert!(error.peer.is_some_and(|peer| peer != rank), "{error}");
    }
}

fn an_abort_unblocks(mut group: Vec<Box<dyn Collective>>) {
    let mut waiting = group.swap_remove(0);
    let handle = waiting.abort_handle();
    let (error, aborted) = thread::scope(|scope| {
        let blocked = scope.spawn(move || {
            let error = waiting.barrier().unwrap_err();
            (error, Instant::now())
        });
        thread::sleep(Duration::from_millis(50));
        let aborted = Instant::now();
        handle.abort("worker 1 is lost");
        let (error, unblocked) = blocked.join().unwrap();
        (error, unblocked.duration_since(aborted))
    });
    assert!(aborted < Duration::from_millis(200), "{aborted:?}");
    assert!(error.to_string().contains("worker 1 is lost"), "{error}");
}

fn a_world_of_one_can_be_aborted(group: &mut [Box<dyn Collective>]) {
    let member = &mut group[0];
    member.barrier().unwrap();
    member.abort_handle().abort("enough");
    assert!(member.barrier().unwrap_err().to_string().contains("enough"));
}
