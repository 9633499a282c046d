//! Which faults come in which order: a pure function of a seed.

use crate::sandbox::StoreFault;

/// Requests that a fault of the store happens to. A client sends a request again up to five times, so each of these is survived.
const NUM_REQUESTS: usize = 2;
/// A slow store, in bytes per second: a checkpoint of a test is about half a megabyte.
const SLOW_STORE_RATE: u32 = 2_000_000;
/// Workers that run beside the controller and can be given drills.
pub const NUM_LOCAL_WORKERS: u32 = 2;
/// Hosts besides the controller's where there is a network, each with one worker.
pub const NUM_OTHER_HOSTS: usize = 2;

/// What can go wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Hang,
    NotANumber,
    OutOfMemory,
    KilledWorker,
    FrozenWorker,
    KilledController,
    CutNetwork,
    SlowNetwork,
    LostNode,
    Store(StoreKind),
    FullDisk,
}

/// What the proxy does to requests; [`StoreFault`] without its numbers, and in an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum StoreKind {
    ServerError,
    Unavailable,
    RetryAfter,
    Silence,
    Truncation,
    Slow,
    Reset,
    LostAnswer,
}

/// Those that a worker does to itself.
const DRILLS: [Kind; 3] = [Kind::Hang, Kind::NotANumber, Kind::OutOfMemory];
/// Those that need nothing but a process and a bucket.
const ALWAYS: [Kind; 11] = [
    Kind::KilledWorker,
    Kind::FrozenWorker,
    Kind::KilledController,
    Kind::Store(StoreKind::ServerError),
    Kind::Store(StoreKind::Unavailable),
    Kind::Store(StoreKind::RetryAfter),
    Kind::Store(StoreKind::Silence),
    Kind::Store(StoreKind::Truncation),
    Kind::Store(StoreKind::Slow),
    Kind::Store(StoreKind::Reset),
    Kind::Store(StoreKind::LostAnswer),
];
/// Those that need hosts.
const ON_NETWORK: [Kind; 3] = [Kind::CutNetwork, Kind::SlowNetwork, Kind::LostNode];

/// What this machine can do.
#[derive(Clone, Copy, Debug)]
pub struct Means {
    /// Hosts with links.
    pub network: bool,
    /// A disk that can be filled.
    pub small_disk: bool,
}

/// One fault.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What it is.
    pub kind: Kind,
    /// The worker that it happens to, or the host, from 1, where it happens to one.
    pub target: usize,
}

/// A part of the run from a start or resumption on. It begins with the drills, because a worker is told of them when it is started.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// What workers are told at their start, in order.
    pub drills: Vec<Fault>,
    /// What comes from outside after that, in order.
    pub others: Vec<Fault>,
}

impl Kind {
    /// How the table names it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Hang => "worker hangs",
            Self::NotANumber => "loss is not a number",
            Self::OutOfMemory => "worker out of memory",
            Self::KilledWorker => "worker killed",
            Self::FrozenWorker => "worker frozen",
            Self::KilledController => "controller killed",
            Self::CutNetwork => "network cut",
            Self::SlowNetwork => "network slow",
            Self::LostNode => "node lost",
            Self::Store(kind) => kind.name(),
            Self::FullDisk => "cache disk full",
        }
    }

    /// How `--drill` names it.
    pub fn drill(self) -> Option<&'static str> {
        match self {
            Self::Hang => Some("hang"),
            Self::NotANumber => Some("nan"),
            Self::OutOfMemory => Some("oom"),
            _ => None,
        }
    }

    /// Whether the worker that it happens to is replaced.
    fn ends_worker(self) -> bool {
        [Self::Hang, Self::OutOfMemory].contains(&self)
    }
}

impl StoreKind {
    fn name(self) -> &'static str {
        match self {
            Self::ServerError => "store answers 500",
            Self::Unavailable => "store answers 503",
            Self::RetryAfter => "store answers 503 with Retry-After",
            Self::Silence => "store does not answer",
            Self::Truncation => "store request cut short",
            Self::Slow => "store slow",
            Self::Reset => "store connection reset",
            Self::LostAnswer => "store answer lost",
        }
    }

    /// What the proxy is told, and for how many requests.
    pub fn fault(self) -> (StoreFault, usize) {
        match self {
            Self::ServerError => (StoreFault::ServerError, NUM_REQUESTS),
            Self::Unavailable => (StoreFault::Unavailable, NUM_REQUESTS),
            Self::RetryAfter => (StoreFault::RetryAfter, NUM_REQUESTS),
            // Each costs the client's whole patience.
            Self::Silence => (StoreFault::Silence, 1),
            Self::Truncation => (StoreFault::Truncation, NUM_REQUESTS),
            Self::Slow => (StoreFault::Slow(SLOW_STORE_RATE), 2 * NUM_REQUESTS),
            Self::Reset => (StoreFault::Reset, NUM_REQUESTS),
            Self::LostAnswer => (StoreFault::LostAnswer, NUM_REQUESTS),
        }
    }
}

/// `num_faults` faults in segments; over the whole every kind comes equally often, but for the last segment.
pub fn schedule(seed: u64, num_faults: usize, means: Means) -> Vec<Segment> {
    let mut numbers = Numbers(seed);
    let mut kinds = ALWAYS.to_vec();
    kinds.extend(ON_NETWORK.iter().filter(|_| means.network));
    kinds.extend(means.small_disk.then_some(Kind::FullDisk));
    let num_workers = NUM_LOCAL_WORKERS as usize + if means.network { NUM_OTHER_HOSTS } else { 0 };
    let mut segments = Vec::new();
    let mut left = num_faults;
    while left > 0 {
        let mut drills = drills(&mut numbers);
        drills.truncate(left);
        left -= drills.len();
        numbers.shuffle(&mut kinds);
        let fault = |kind: &Kind| {
            let is_of_host = ON_NETWORK.contains(kind);
            Fault { kind: *kind, target: if is_of_host { 1 + numbers.below(NUM_OTHER_HOSTS) } else { numbers.below(num_workers) } }
        };
        let others: Vec<Fault> = kinds.iter().take(left).map(fault).collect();
        left -= others.len();
        segments.push(Segment { drills, others });
    }
    segments
}

/// The drills of a segment. A worker that was replaced has forgotten its drills, so each goes to one that will not have been.
fn drills(numbers: &mut Numbers) -> Vec<Fault> {
    let mut kinds = DRILLS;
    numbers.shuffle(&mut kinds);
    if kinds[2] == Kind::NotANumber {
        kinds.swap(1, 2);
    }
    let mut worker = numbers.below(NUM_LOCAL_WORKERS as usize);
    let mut drills = Vec::new();
    for kind in kinds {
        drills.push(Fault { kind, target: worker });
        if kind.ends_worker() {
            worker = 1 - worker;
        }
    }
    drills
}

/// `SplitMix64`: the same numbers from the same seed on every machine.
struct Numbers(u64);

impl Numbers {
    fn draw(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    /// A number below a bound that is far below 2^64, so that the remainder favours none.
    fn below(&mut self, bound: usize) -> usize {
        (self.draw() % bound as u64) as usize
    }

    fn shuffle<T>(&mut self, items: &mut [T]) {
        for last in (1..items.len()).rev() {
            items.swap(last, self.below(last + 1));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    const EVERYTHING: Means = Means { network: true, small_disk: true };

    fn all(segments: &[Segment]) -> Vec<Fault> {
        segments.iter().flat_map(|segment| segment.drills.iter().chain(&segment.others)).copied().collect()
    }

    #[test]
    fn the_seed_decides() {
        assert_eq!(schedule(7, 100, EVERYTHING), schedule(7, 100, EVERYTHING));
        assert_ne!(schedule(7, 100, EVERYTHING), schedule(8, 100, EVERYTHING));
    }

    #[test]
    fn every_kind_comes_equally_often() {
        let num_kinds = DRILLS.len() + ALWAYS.len() + ON_NETWORK.len() + 1;
        let mut counts: BTreeMap<Kind, usize> = BTreeMap::new();
        for fault in all(&schedule(3, 5 * num_kinds, EVERYTHING)) {
            *counts.entry(fault.kind).or_default() += 1;
        }
        assert_eq!(counts.len(), num_kinds);
        assert!(counts.values().all(|count| *count == 5), "{counts:?}");
    }

    #[test]
    fn there_are_as_many_as_asked_for_and_only_what_the_machine_can_do() {
        let means = Means { network: false, small_disk: false };
        for num_faults in [0, 1, 2, 3, 4, 14, 15, 200] {
            let faults = all(&schedule(1, num_faults, means));
            assert_eq!(faults.len(), num_faults);
            assert!(faults.iter().all(|fault| fault.kind != Kind::FullDisk && !ON_NETWORK.contains(&fault.kind)));
            assert!(faults.iter().all(|fault| fault.target < NUM_LOCAL_WORKERS as usize));
        }
    }

    #[test]
    fn no_worker_has_a_drill_after_one_that_replaces_it() {
        for segment in schedule(5, 400, EVERYTHING) {
            let ended = |fault: &&Fault| fault.kind.ends_worker();
            for (place, fault) in segment.drills.iter().enumerate() {
                assert!(segment.drills[..place].iter().filter(ended).all(|before| before.target != fault.target), "{segment:?}");
            }
        }
    }
}
