//! Lets one fault happen, waits until the run is over it, and measures both.

use std::fs::{self, File};
use std::io::Write as _;
use std::time::Duration;

use serde_json::Value;

use super::schedule::{Fault, Kind, StoreKind};
use super::stage::{Stage, now};
use super::table::Measured;
use crate::sandbox::{number, send_signal, wait_until};

/// Steps that a run makes after a fault before the next one comes.
const STEPS_BETWEEN: usize = 2;
/// A drill whose worker was replaced for another reason never comes; this many steps later it is given up.
const STEPS_PAST_DRILL: u64 = 5;
/// Longest wait until the store's client has run into a fault; the run saves a checkpoint every few steps.
const STORE_TIMEOUT: Duration = Duration::from_mins(1);
/// Bytes that are written at a time to fill a disk.
const FILLER_PIECE: usize = 8 << 10;

/// Lets a fault come from outside, and waits until the run is over it.
pub fn perform(stage: &mut Stage, fault: Fault) -> Measured {
    let measured = match fault.kind {
        Kind::KilledWorker => signal(stage, fault, "KILL"),
        Kind::FrozenWorker => signal(stage, fault, "STOP"),
        Kind::KilledController => kill_controller(stage),
        Kind::CutNetwork => cut_network(stage, fault, false),
        Kind::LostNode => cut_network(stage, fault, true),
        Kind::SlowNetwork => slow_network(stage, fault),
        Kind::Store(kind) => disturb_store(stage, kind),
        Kind::FullDisk => fill_disk(stage),
        Kind::Hang | Kind::NotANumber | Kind::OutOfMemory => unreachable!("drills come from inside"),
    };
    let mark = stage.mark();
    stage.wait_steps(mark, STEPS_BETWEEN);
    measured
}

/// Waits for a drill that a worker was told of, and until the run is over it; `None` where that worker was replaced before. What came
/// before the mark belongs to other faults. The mark is moved to the end of this one, not to now: the next may already have come.
pub fn await_drill(stage: &mut Stage, fault: Fault, step: u64, mark: &mut usize) -> Option<Measured> {
    // The drill comes before its step, so it begins when the step before is done.
    let is_reached = |event: &Value| event["event"] == "step" && number(&event["step"]) + 1 >= step;
    let before = stage.wait_event("the run comes to the drill", *mark, is_reached);
    *mark = stage.place_of(*mark, &before);
    let is_past = |event: &Value| event["event"] == "step" && number(&event["step"]) >= step + STEPS_PAST_DRILL;
    let first = stage.wait_event("the drill is noticed or does not come", *mark, |event| is_detection(event) || is_past(event));
    if !is_detection(&first) {
        return None;
    }
    let measured = recovered(stage, fault.kind, *mark, time(&before));
    let end = stage.wait_event("the run has recovered", *mark, is_recovery);
    *mark = stage.place_of(*mark, &end) + 1;
    stage.wait_steps(*mark, STEPS_BETWEEN);
    Some(measured)
}

/// Whether an event tells that something is wrong with the running generation.
fn is_detection(event: &Value) -> bool {
    event["event"] == "worker_lost" || event["event"] == "generation_aborted"
}

fn is_recovery(event: &Value) -> bool {
    event["event"] == "recovered"
}

fn time(event: &Value) -> f64 {
    event["time"].as_f64().expect("an event has a time")
}

/// Waits for the recovery from a fault that began at a time.
fn recovered(stage: &mut Stage, kind: Kind, mark: usize, began: f64) -> Measured {
    let detected = stage.wait_event(&format!("{} is noticed", kind.name()), mark, is_detection);
    let recovered = stage.wait_event(&format!("the run recovers from: {}", kind.name()), mark, is_recovery);
    Measured {
        kind,
        detection_s: Some(time(&detected) - began),
        recovery_s: time(&recovered) - began,
        steps_lost: number(&recovered["steps_lost"]),
    }
}

fn signal(stage: &mut Stage, fault: Fault, name: &str) -> Measured {
    let process_id = stage.worker_process(fault.target as u32);
    let (mark, began) = (stage.mark(), now());
    assert!(send_signal(process_id, name), "worker {} ended before it was sent a signal", fault.target);
    recovered(stage, fault.kind, mark, began)
}

/// The workers train on; a new controller takes them over.
fn kill_controller(stage: &mut Stage) -> Measured {
    let began = now();
    stage.kill_controller();
    let mark = stage.mark();
    stage.start(&[]);
    let restarted = stage.wait_event("the coordinator is there again", mark, |event| event["event"] == "coordinator_restarted");
    let mut steps_lost = 0;
    if restarted["adopted"] == false {
        // Where one of them was late, a new generation begins; that too is a recovery.
        let recovered = stage.wait_event("the run goes on", mark, is_recovery);
        steps_lost = number(&recovered["steps_lost"]);
    }
    let from = stage.place_of(mark, &restarted);
    let first = stage.wait_steps(from, 1);
    Measured { kind: Kind::KilledController, detection_s: None, recovery_s: time(&first) - began, steps_lost }
}

/// Takes a host off the network, together with its processes where it is lost for good, and brings it back.
fn cut_network(stage: &mut Stage, fault: Fault, is_lost: bool) -> Measured {
    let (host, slot) = (fault.target, Stage::slot_of_host(fault.target));
    let (mark, began) = (stage.mark(), now());
    let network = stage.network.as_ref().expect("there are hosts");
    network.cut(host);
    if is_lost {
        network.kill_all(host);
    }
    stage.wait_event("the host is missed", mark, |event| event["event"] == "worker_lost" && event["worker"] == slot);
    stage.network.as_ref().expect("there are hosts").heal(host);
    stage.join_unless_there(host);
    recovered(stage, fault.kind, mark, began)
}

/// The run goes on over a slow link.
fn slow_network(stage: &mut Stage, fault: Fault) -> Measured {
    stage.network.as_ref().expect("there are hosts").slow(fault.target);
    let (mark, began) = (stage.mark(), now());
    let first = stage.wait_steps(mark, STEPS_BETWEEN);
    stage.network.as_ref().expect("there are hosts").restore_speed(fault.target);
    Measured { kind: fault.kind, detection_s: None, recovery_s: time(&first) - began, steps_lost: 0 }
}

/// Disturbs the next requests to the bucket; the run is over it with the first checkpoint that is complete afterwards.
fn disturb_store(stage: &mut Stage, kind: StoreKind) -> Measured {
    let mark = stage.mark();
    let (fault, count) = kind.fault();
    let before = stage.proxy.applied().len();
    stage.proxy.inject(fault, count);
    wait_until("the store is asked for something", STORE_TIMEOUT, || stage.proxy.applied().len() >= before + count);
    let applied = stage.proxy.applied();
    let (began, last) = (applied[before].1, applied[before + count - 1].1);
    let is_saved = |event: &Value| event["event"] == "checkpoint_saved" && time(event) > last;
    let saved = stage.wait_event("a checkpoint is saved", mark, is_saved);
    Measured { kind: Kind::Store(kind), detection_s: None, recovery_s: time(&saved) - began, steps_lost: 0 }
}

/// Fills the disk of the cache, which the run can do without, and makes room after the next checkpoint.
fn fill_disk(stage: &mut Stage) -> Measured {
    let path = stage.disk.as_ref().expect("there is a small disk").path().join("filler");
    let mut filler = File::create(&path).expect("begin to fill the disk");
    while filler.write_all(&[0; FILLER_PIECE]).is_ok() {}
    let (mark, began) = (stage.mark(), now());
    let is_saved = |event: &Value| event["event"] == "checkpoint_saved";
    let saved = stage.wait_event("a checkpoint is saved without the cache", mark, is_saved);
    drop(filler);
    fs::remove_file(&path).expect("make room on the disk");
    let mark = stage.mark();
    stage.wait_event("a checkpoint is saved with the cache", mark, is_saved);
    Measured { kind: Kind::FullDisk, detection_s: None, recovery_s: time(&saved) - began, steps_lost: 0 }
}
