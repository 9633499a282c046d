//! A run folder as a test sees it: events, losses, checkpoints, live workers.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use serde_json::Value;

use super::{send_signal, wait_until};

/// Longest time until a process that was sent SIGKILL is gone; one that writes to a slow disk can take a while.
const KILL_TIMEOUT: Duration = Duration::from_secs(20);

/// The folder of a run.
pub struct Run {
    /// The folder, absolute.
    pub path: PathBuf,
}

impl Run {
    /// All events so far. A last line that is still being written is left out; any other line must be JSON.
    pub fn events(&self) -> Vec<Value> {
        let bytes = fs::read(self.path.join("events.jsonl")).unwrap_or_default();
        let text = String::from_utf8_lossy(&bytes);
        let whole_lines = text.rfind('\n').map_or("", |end| &text[..end]);
        whole_lines.lines().map(|line| serde_json::from_str(line).expect("every event is a line of JSON")).collect()
    }

    /// The events of one name.
    pub fn events_named(&self, name: &str) -> Vec<Value> {
        self.events().into_iter().filter(|event| event["event"] == name).collect()
    }

    /// The loss of every step; of a replayed step, the last one.
    pub fn losses(&self) -> BTreeMap<u64, f64> {
        let steps = self.events_named("step");
        steps.iter().map(|event| (number(&event["step"]), event["loss"].as_f64().expect("a loss is a number"))).collect()
    }

    /// The same bit by bit, so that a difference in the last digit is one.
    pub fn loss_bits(&self) -> Vec<(u64, u64)> {
        self.losses().into_iter().map(|(step, loss)| (step, loss.to_bits())).collect()
    }

    /// Fails the test unless the losses are those of a run without failures, bit for bit, and no step was done twice. A step in which a
    /// generation broke can be done without having been reported; there may be `most_missing` of those, and the last is none.
    #[track_caller]
    pub fn expect_undisturbed(&self, whole: &Self, most_missing: usize) {
        let (found, expected) = (self.losses(), whole.losses());
        assert_eq!(self.events_named("step").len(), found.len(), "a step was done twice");
        assert_eq!(found.keys().next_back(), expected.keys().next_back());
        assert!(found.len() + most_missing >= expected.len(), "{} of {} steps were reported", found.len(), expected.len());
        for (step, loss) in &found {
            assert_eq!(loss.to_bits(), expected[step].to_bits(), "step {step}: loss {loss}, without failures {}", expected[step]);
        }
    }

    /// The newest step that was reported; 0 before the first.
    pub fn last_step(&self) -> u64 {
        self.events_named("step").last().map_or(0, |event| number(&event["step"]))
    }

    /// Steps from which the generations went on, in order; 0 is from scratch.
    pub fn restored_steps(&self) -> Vec<u64> {
        self.events_named("restored").iter().map(|event| number(&event["step"])).collect()
    }

    /// A file of a checkpoint.
    pub fn checkpoint_path(&self, step: u64, file: &str) -> PathBuf {
        self.path.join("checkpoints").join(format!("step-{step:012}")).join(file)
    }

    /// The content of a file of a checkpoint.
    #[track_caller]
    pub fn checkpoint_file(&self, step: u64, file: &str) -> Vec<u8> {
        let path = self.checkpoint_path(step, file);
        fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// The tensors of a checkpoint, by file name; every rank writes files of its own.
    #[track_caller]
    pub fn checkpoint_tensors(&self, step: u64) -> BTreeMap<String, Vec<u8>> {
        let folder = self.checkpoint_path(step, "");
        let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("{}: {error}", folder.display()));
        let names = entries.map(|entry| entry.expect("list a checkpoint").file_name().to_string_lossy().into_owned());
        let found: BTreeMap<_, _> = names
            .filter(|name| name.ends_with(".safetensors"))
            .map(|name| (name.clone(), fs::read(folder.join(&name)).expect("read a file of a checkpoint")))
            .collect();
        assert!(!found.is_empty(), "{} holds no tensors", folder.display());
        found
    }

    /// Number of live worker processes of this run.
    pub fn live_workers(&self) -> usize {
        self.worker_processes().len()
    }

    /// Slot and process id of the live worker processes of this run, as the kernel sees them; one that has ended has no command line.
    pub fn worker_processes(&self) -> Vec<(u32, u32)> {
        let processes = fs::read_dir("/proc").expect("list the processes").filter_map(Result::ok);
        let mut found: Vec<(u32, u32)> = processes
            .filter_map(|entry| {
                let process_id = entry.file_name().to_string_lossy().parse().ok()?;
                // A process can end between the list and the look.
                let command = fs::read(entry.path().join("cmdline")).ok()?;
                Some((self.slot_of(&String::from_utf8_lossy(&command))?, process_id))
            })
            .collect();
        found.sort_unstable();
        found
    }

    /// Process id of the live worker of a slot.
    pub fn process_of(&self, worker: u32) -> Option<u32> {
        self.worker_processes().into_iter().find(|(slot, _)| *slot == worker).map(|(_, process_id)| process_id)
    }

    /// Ends all workers with SIGKILL, as when their machine goes down.
    pub fn kill_workers(&self) {
        for (_, process_id) in self.worker_processes() {
            // It may end by itself between the look and the signal.
            send_signal(process_id, "KILL");
        }
        wait_until("the killed workers are gone", KILL_TIMEOUT, || self.live_workers() == 0);
    }

    /// What the controller says of itself while it lives: its address, for one.
    pub fn control(&self) -> Option<Value> {
        serde_json::from_slice(&fs::read(self.path.join("control.json")).ok()?).ok()
    }

    /// The slot that a command line names, where it is one of a worker of this run.
    fn slot_of(&self, command: &str) -> Option<u32> {
        let words: Vec<&str> = command.split('\0').collect();
        let path = self.path.display().to_string();
        let is_worker = words.first().is_some_and(|program| program.ends_with("cloze-worker")) && words.contains(&path.as_str());
        let after = words.iter().position(|word| *word == "--worker").filter(|_| is_worker)? + 1;
        words.get(after)?.parse().ok()
    }
}

/// Fails the test where a loss differs from the expected one of the same step by more than a share of it.
#[track_caller]
pub fn expect_close(losses: &BTreeMap<u64, f64>, expected: &BTreeMap<u64, f64>, tolerance: f64) {
    assert!(!losses.is_empty(), "there is nothing to compare");
    for (step, loss) in losses {
        let expected = expected.get(step).unwrap_or_else(|| panic!("step {step} is not expected"));
        assert!((loss - expected).abs() <= tolerance * expected, "step {step}: loss {loss}, expected {expected}");
    }
}

/// A whole number of an event.
#[track_caller]
pub fn number(value: &Value) -> u64 {
    value.as_u64().expect("a whole number")
}
