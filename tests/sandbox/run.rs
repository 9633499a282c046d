//! A run folder as a test sees it: events, losses, checkpoints, live workers.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use serde_json::Value;

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

    /// Number of live worker processes of this run, as the kernel sees them; one that has ended has no command line.
    pub fn live_workers(&self) -> usize {
        let argument = format!("\0{}\0", self.path.display());
        let is_worker = |command: &[u8]| {
            let command = String::from_utf8_lossy(command);
            command.contains("cloze-worker") && command.contains(&argument)
        };
        let processes = fs::read_dir("/proc").expect("list the processes").filter_map(Result::ok);
        // A process can end between the list and the look.
        processes.filter(|entry| is_worker(&fs::read(entry.path().join("cmdline")).unwrap_or_default())).count()
    }
}

fn number(value: &Value) -> u64 {
    value.as_u64().expect("a whole number")
}
