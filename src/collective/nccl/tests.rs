//! The group on one GPU: two ranks in two processes. NCCL refuses a device that two ranks of one host use, so each rank claims a host of its own.
#![expect(unsafe_code, reason = "keeps test values in device memory")]

use std::ffi::c_int;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::channel;

use super::super::conformance::{
    assert_same, broadcasts_reach_everyone, lengths, shares_are_right, sums_are_right, sums_of_whole_numbers, waits_are_observed,
    whole_numbers,
};
use super::super::local::RingOptions;
use super::library::Libraries;
use super::*;

const WORLD_SIZE: usize = 2;
/// Long enough to form a group, short enough to be waited for once.
const TIMEOUT: Duration = Duration::from_secs(15);
const RANK_VARIABLE: &str = "CLOZE_TEST_NCCL_RANK";
const ENDING_VARIABLE: &str = "CLOZE_TEST_NCCL_ENDING";
/// What a rank puts before its address, because the test harness writes to the same output.
const ADDRESS_MARK: &str = "listens at ";

#[test]
fn what_runs_has_the_timeout_and_what_waits_for_the_computation_only_while_it_is_joined() {
    let start = Instant::now();
    let at = |millis: u64| start + Duration::from_millis(millis);
    let timeout = Duration::from_millis(100);
    let cases = [
        (None, None, false),
        (Some(at(900)), None, true),
        (Some(at(901)), None, false),
        (None, Some(at(900)), true),
        (None, Some(at(950)), false),
        // Its own start counts, not that of the wait.
        (Some(at(950)), Some(at(0)), false),
        // A clock that went back is no timeout.
        (Some(at(2000)), None, false),
    ];
    for (running_since, joined_since, expected) in cases {
        assert_eq!(is_stuck(at(1000), running_since, joined_since, timeout), expected, "{running_since:?} {joined_since:?}");
    }
}

#[test]
fn conforms_between_two_processes_on_one_device() {
    if let Err(reason) = device_is_there() {
        // Written past the macros: what goes through them is shown for failed tests only.
        std::io::stderr().write_all(format!("SKIPPED: NCCL conformance: no CUDA device: {reason}\n").as_bytes()).unwrap();
        return;
    }
    for ending in ["silence", "abort"] {
        let mut ranks: Vec<Child> = (0..WORLD_SIZE).map(|rank| start(rank, ending)).collect();
        let addresses: Vec<String> = ranks.iter_mut().map(address_of).collect();
        let line = format!("{}\n", addresses.join(" "));
        ranks.iter_mut().for_each(|rank| rank.stdin.as_mut().unwrap().write_all(line.as_bytes()).unwrap());
        // Rank 1 stays until its input ends, and rank 0 finds it silent.
        assert!(ranks[0].wait().unwrap().success(), "rank 0, {ending}");
        drop(ranks[1].stdin.take());
        assert!(ranks[1].wait().unwrap().success(), "rank 1, {ending}");
    }
}

/// One rank of the test above, in a process of its own; without the variable it is nothing.
#[test]
fn one_rank_of_two() {
    let Ok(rank) = std::env::var(RANK_VARIABLE) else { return };
    let rank: usize = rank.parse().unwrap();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    println!("{ADDRESS_MARK}{}", listener.local_addr().unwrap());
    let mut line = String::new();
    std::io::stdin().read_line(&mut line).unwrap();
    let peers: Vec<String> = line.split_whitespace().map(str::to_owned).collect();
    let interrupt = Arc::new(AtomicBool::new(false));
    let key = "key".to_owned();
    let options = RingOptions { listener, rank, peers, key, generation: 1, timeout: TIMEOUT, interrupt: Arc::clone(&interrupt) };
    let ring = Ring::connect(options).unwrap();
    let mut group = Nccl::connect(NcclOptions { ring, device: 0, compute_stream: 0, timeout: TIMEOUT, interrupt }).unwrap();
    assert!(group.works_on_device());
    works_on_device_memory(&mut group);
    sums_are_right(&mut group);
    shares_are_right(&mut group);
    broadcasts_reach_everyone(&mut group);
    waits_are_observed(&mut group);
    group.barrier().unwrap();
    if rank == 0 {
        ends_alone(group, &std::env::var(ENDING_VARIABLE).unwrap());
    } else {
        std::io::stdin().read_line(&mut line).unwrap();
    }
}

fn works_on_device_memory(group: &mut Nccl) {
    let (rank, world_size) = (group.rank(), group.world_size());
    for len in lengths(world_size) {
        let expected = sums_of_whole_numbers(world_size, len);
        let summed = DeviceValues::new(&whole_numbers(rank, len));
        let scattered = DeviceValues::new(&whole_numbers(rank, len));
        group.all_reduce_sum_on_device(summed.place).unwrap();
        let share = group.reduce_scatter_on_device(scattered.place).unwrap();
        group.join_device().unwrap();
        assert_eq!(share, share_of(len, world_size, rank));
        assert_same(&summed.read(), &expected, 0..len);
        let sums = scattered.read();
        assert_same(&sums, &expected, share.clone());

        let mut own = vec![f32::NAN; len];
        own[share.clone()].copy_from_slice(&sums[share]);
        let gathered = DeviceValues::new(&own);
        group.all_gather_on_device(gathered.place).unwrap();
        group.join_device().unwrap();
        assert_same(&gathered.read(), &expected, 0..len);

        let passed = DeviceValues::new(&own);
        let other = group.gather_share_on_device(passed.place, 1).unwrap();
        group.join_device().unwrap();
        assert_eq!(other, share_before(len, world_size, rank, 1));
        assert_same(&passed.read(), &expected, other);
        assert_same(&passed.read(), &expected, share_of(len, world_size, rank));
    }
}

/// The other rank takes no part any more: the operation ends by the timeout or by an abort, and the group stays ended.
fn ends_alone(mut group: Nccl, ending: &str) {
    let values = DeviceValues::new(&whole_numbers(0, 1000));
    let (sender, news) = channel();
    let sender = Mutex::new(sender);
    // Only the first news is waited for.
    group.set_wait_observer(Arc::new(move |is_waiting| sender.lock().unwrap().send(is_waiting).unwrap_or_default()));
    let handle = group.abort_handle();
    group.set_step(7);
    group.all_reduce_sum_on_device(values.place).unwrap();
    let error = thread::scope(|scope| {
        scope.spawn(move || {
            assert!(news.recv().unwrap());
            if ending == "abort" {
                handle.abort("worker 1 is lost");
            }
        });
        group.join_device().unwrap_err()
    });
    assert_eq!((error.rank, error.generation, error.step), (0, 1, 7));
    if ending == "abort" {
        assert_eq!(error.cause, CollectiveCause::Aborted("worker 1 is lost".to_owned()));
    } else {
        assert_eq!(error.operation, Operation::AllReduce);
        assert!(matches!(error.cause, CollectiveCause::TimedOut { .. }), "{error}");
    }
    assert_eq!(group.join_device().unwrap_err().cause, error.cause);
    assert_eq!(group.barrier().unwrap_err().cause, error.cause);
}

fn device_is_there() -> Result<(), CollectiveCause> {
    let Libraries { cuda, .. } = libraries()?;
    let mut count: c_int = 0;
    // SAFETY: the pointer is to a living value.
    unsafe {
        super::device::driver("start", (cuda.cuInit)(0))?;
        super::device::driver("count devices", (cuda.cuDeviceGetCount)(&raw mut count))?;
    }
    if count > 0 { Ok(()) } else { Err(CollectiveCause::Device("the driver counts 0".to_owned())) }
}

/// Starts this test program for one rank.
fn start(rank: usize, ending: &str) -> Child {
    let (_, module) = module_path!().split_once("::").unwrap();
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", &format!("{module}::one_rank_of_two"), "--nocapture", "--test-threads=1"]);
    command.env(RANK_VARIABLE, rank.to_string()).env(ENDING_VARIABLE, ending);
    // Two hosts that meet over loopback.
    command.env("NCCL_HOSTID", format!("cloze-test-{rank}")).env("NCCL_SOCKET_IFNAME", "lo").env("NCCL_IB_DISABLE", "1");
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap()
}

/// The address that a rank prints; what it prints later is read and dropped, so that it never waits for a reader.
fn address_of(rank: &mut Child) -> String {
    let mut lines = BufReader::new(rank.stdout.take().unwrap()).lines().map_while(Result::ok);
    let line = lines.find(|line| line.contains(ADDRESS_MARK)).expect("a rank prints its address");
    thread::spawn(move || lines.for_each(drop));
    line.split_once(ADDRESS_MARK).unwrap().1.to_owned()
}

/// Values in device memory.
struct DeviceValues {
    place: DeviceFloats,
    cuda: &'static super::functions::DriverFunctions,
}

impl DeviceValues {
    fn new(values: &[f32]) -> Self {
        let cuda = &libraries().unwrap().cuda;
        let mut address = 0;
        let bytes = size_of_val(values);
        // SAFETY: the pointers are to living values, of which `bytes` bytes are copied; the driver takes no empty allocation.
        unsafe {
            super::device::driver("allocate", (cuda.cuMemAlloc_v2)(&raw mut address, bytes.max(4))).unwrap();
            super::device::driver("copy", (cuda.cuMemcpyHtoD_v2)(address, values.as_ptr().cast(), bytes)).unwrap();
        }
        Self { place: DeviceFloats { address, len: values.len(), device: 0 }, cuda }
    }

    fn read(&self) -> Vec<f32> {
        let mut values = vec![0.0_f32; self.place.len];
        // SAFETY: as in `new`.
        let copied = unsafe { (self.cuda.cuMemcpyDtoH_v2)(values.as_mut_ptr().cast(), self.place.address, size_of_val(&values[..])) };
        super::device::driver("copy", copied).unwrap();
        values
    }
}

impl Drop for DeviceValues {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` and given back once.
        let _ = unsafe { (self.cuda.cuMemFree_v2)(self.place.address) };
    }
}
