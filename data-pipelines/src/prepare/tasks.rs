//! Counts by task.

use std::collections::HashMap;

use crate::manifest::{Counts, TaskEntry};

/// Tasks numbered in the order in which they were seen. Until the cap is known, all samples count as kept.
#[derive(Clone, Debug, Default)]
pub(super) struct TaskTable {
    pub(super) entries: Vec<TaskEntry>,
    ids: HashMap<String, u32>,
}

impl TaskTable {
    /// Number of a task, which is new where the name is.
    pub(super) fn id(&mut self, name: &str, source: Option<&str>) -> u32 {
        if let Some(id) = self.ids.get(name) {
            return *id;
        }
        let id = self.entries.len() as u32;
        self.ids.insert(name.to_owned(), id);
        self.entries.push(TaskEntry { name: name.to_owned(), source: source.map(str::to_owned), counts: Counts::default() });
        id
    }

    /// Adds the counts of other tasks and answers with their numbers here.
    pub(super) fn merge(&mut self, others: &[TaskEntry]) -> Vec<u32> {
        others
            .iter()
            .map(|other| {
                let id = self.id(&other.name, other.source.as_deref());
                let entry = &mut self.entries[id as usize];
                entry.counts.add(&other.counts);
                if entry.source.is_none() {
                    entry.source.clone_from(&other.source);
                }
                id
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_adds_counts_by_name() {
        let mut first = TaskTable::default();
        first.id("a", None);
        let mut second = TaskTable::default();
        let (b, a) = (second.id("b", None), second.id("a", Some("P3")));
        second.entries[a as usize].counts.read = 2;
        second.entries[b as usize].counts.read = 3;
        assert_eq!(first.merge(&second.entries), [1, 0]);
        assert_eq!(first.merge(&second.entries), [1, 0]);
        assert_eq!(first.entries.iter().map(|entry| entry.counts.read).collect::<Vec<_>>(), [4, 6]);
        assert_eq!(first.entries[0].source.as_deref(), Some("P3"));
    }
}
