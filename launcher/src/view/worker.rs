//! The slots of a run and what each of them does.

use serde::{Deserialize, Serialize};

/// Longest last word of a worker, in bytes; the whole of it is in the worker's log.
const MAX_LAST_WORD_BYTES: usize = 300;

/// What a slot does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkerState {
    /// Nobody fills it: not yet, or the run has ended.
    #[default]
    Absent,
    /// Its process is there and has not joined.
    Starting,
    /// It has joined and waits for a generation.
    Joined,
    /// It is a member of the generation.
    Training,
    /// Its connection or its process is gone.
    Lost,
    /// It is done and left as it should.
    Finished,
}

impl WorkerState {
    /// All states, in the order of a worker's life.
    pub const ALL: [Self; 6] = [Self::Absent, Self::Starting, Self::Joined, Self::Training, Self::Lost, Self::Finished];

    /// Its name, as in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Absent => "absent",
            Self::Starting => "starting",
            Self::Joined => "joined",
            Self::Training => "training",
            Self::Lost => "lost",
            Self::Finished => "finished",
        }
    }
}

/// One slot.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerView {
    /// Its number, from 0.
    pub slot: u32,
    /// What it does.
    pub state: WorkerState,
    /// Its rank in the generation; `None` while it is no member.
    pub rank: Option<u32>,
    /// Host that it joined from.
    pub host: Option<String>,
    /// Its process, where one lives; of what the controller started that process, which may be the parent of what joined.
    pub process_id: Option<u32>,
    /// Restarts of this slot, by whoever fills it.
    pub restarts: u32,
    /// The controller starts its processes, and tells of each restart; else `cloze join` does.
    #[serde(skip)]
    pub(super) is_own: bool,
    /// A process of `cloze join` has joined this controller.
    #[serde(skip)]
    pub(super) has_joined: bool,
    /// The last thing that was heard of it, in words.
    pub last_word: String,
}

impl WorkerView {
    /// A slot that nobody has filled.
    pub fn absent(slot: u32) -> Self {
        Self { slot, ..Self::default() }
    }

    /// A process has joined, another one than before.
    pub(super) fn is_filled(&mut self, process_id: u32) {
        if self.is_own {
            // What a controller has started may be the parent of what joins.
            self.process_id.get_or_insert(process_id);
            return;
        }
        self.process_id = Some(process_id);
        self.restarts += u32::from(std::mem::replace(&mut self.has_joined, true));
    }

    /// Something else happens to it now.
    pub fn becomes(&mut self, state: WorkerState, last_word: impl Into<String>) {
        self.state = state;
        self.says(last_word);
    }

    /// Something was heard of it that changes nothing.
    pub fn says(&mut self, last_word: impl Into<String>) {
        self.last_word = last_word.into();
        if self.last_word.len() > MAX_LAST_WORD_BYTES {
            let end = self.last_word.floor_char_boundary(MAX_LAST_WORD_BYTES);
            self.last_word.truncate(end);
            self.last_word.push('…');
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_those_of_the_json() {
        for state in WorkerState::ALL {
            assert_eq!(serde_json::to_value(state).unwrap(), state.name());
        }
    }

    #[test]
    fn a_last_word_is_bounded() {
        let mut worker = WorkerView::absent(3);
        worker.becomes(WorkerState::Lost, "é".repeat(MAX_LAST_WORD_BYTES));
        assert_eq!(worker.last_word.chars().count(), MAX_LAST_WORD_BYTES / 2 + 1);
        assert!(worker.last_word.ends_with("é…"));
        worker.says("back");
        assert_eq!((worker.slot, worker.state, worker.last_word.as_str()), (3, WorkerState::Lost, "back"));
    }
}
