//! Partitions, and whether a job fits into one.

use std::collections::BTreeMap;

use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::study::Resources;

/// Nodes that jobs are queued for together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its name.
    pub name: String,
    /// Whether it takes jobs.
    pub is_up: bool,
    /// Longest time of a job, in seconds; `None` is without a limit.
    pub limit_s: Option<u64>,
    /// Number of its nodes.
    pub nodes: u32,
    /// Cores of its largest node.
    pub cpus_per_node: u32,
    /// Memory of its largest node, in MiB.
    pub memory_per_node_mib: u64,
    /// GPUs of its largest node, by type; the empty type where the site names none.
    pub gpus_per_node: BTreeMap<String, u32>,
}

/// What a job wants of a partition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Wish {
    /// Nodes.
    pub nodes: u32,
    /// Cores of one node, where they are stated.
    pub cpus_per_node: Option<u32>,
    /// Memory of one node, in MiB, where it is stated.
    pub memory_per_node_mib: Option<u64>,
    /// GPUs of one node.
    pub gpus_per_node: u32,
    /// Their type, where it is stated.
    pub gpu_type: Option<String>,
    /// Time limit in minutes, where it is stated.
    pub time_limit_minutes: Option<u32>,
}

impl Wish {
    /// What these resources want, with the site's GPU type and its time limit where they state none.
    pub fn of(resources: &Resources, gpu_type: Option<&str>, time_limit_minutes: Option<u32>) -> Self {
        Self {
            nodes: resources.nodes,
            cpus_per_node: resources.cpus_per_worker.map(|cpus| cpus.saturating_mul(resources.workers_per_node)),
            memory_per_node_mib: resources.memory_per_node_mib,
            gpus_per_node: resources.gpus_per_node,
            gpu_type: gpu_type.map(str::to_owned),
            time_limit_minutes: resources.time_limit_minutes.or(time_limit_minutes),
        }
    }
}

impl Partition {
    /// Takes another group of nodes of the same partition in.
    pub(super) fn add(&mut self, group: &Partition) {
        self.is_up |= group.is_up;
        self.nodes = self.nodes.saturating_add(group.nodes);
        self.cpus_per_node = self.cpus_per_node.max(group.cpus_per_node);
        self.memory_per_node_mib = self.memory_per_node_mib.max(group.memory_per_node_mib);
        for (kind, &count) in &group.gpus_per_node {
            let known = self.gpus_per_node.entry(kind.clone()).or_insert(0);
            *known = (*known).max(count);
        }
    }

    /// Everything that a job wants and this partition cannot give: what, expected, found.
    pub fn misfits(&self, wish: &Wish) -> Vec<Failure> {
        let name = &self.name;
        let wrong = |what: String, expected: String, found: String| {
            Failure::new(FailureKind::Recipe, what).at(format!("partition {name}")).expected(expected).found(found)
        };
        let mut found = Vec::new();
        if !self.is_up {
            found.push(wrong("the partition takes no jobs".to_owned(), "a partition that is up".to_owned(), "down".to_owned()));
        }
        if wish.nodes > self.nodes {
            found.push(wrong(
                "the partition has fewer nodes than the run wants".to_owned(),
                format!("at most {} (`resources.nodes`, `--nodes`)", self.nodes),
                wish.nodes.to_string(),
            ));
        }
        if let Some(cpus) = wish.cpus_per_node.filter(|&cpus| cpus > self.cpus_per_node) {
            found.push(wrong(
                "no node of the partition has that many cores".to_owned(),
                format!("at most {} (`resources.cpus_per_worker` times `resources.workers_per_node`)", self.cpus_per_node),
                cpus.to_string(),
            ));
        }
        if let Some(memory) = wish.memory_per_node_mib.filter(|&memory| memory > self.memory_per_node_mib) {
            found.push(wrong(
                "no node of the partition has that much memory".to_owned(),
                format!("at most {} MiB (`resources.memory_per_node_mib`)", self.memory_per_node_mib),
                format!("{memory} MiB"),
            ));
        }
        found.extend(
            self.gpu_misfit(wish)
                .map(|(expected, found)| wrong("no node of the partition has that many GPUs of that type".to_owned(), expected, found)),
        );
        if let (Some(limit_s), Some(minutes)) = (self.limit_s, wish.time_limit_minutes)
            && u64::from(minutes) * 60 > limit_s
        {
            found.push(wrong(
                "the time limit is longer than the partition allows".to_owned(),
                format!("at most {} minutes (`resources.time_limit_minutes`); a longer run goes on in its next job", limit_s / 60),
                format!("{minutes} minutes"),
            ));
        }
        found
    }

    /// What is expected and found, where the GPUs do not fit.
    fn gpu_misfit(&self, wish: &Wish) -> Option<(String, String)> {
        let there = match &wish.gpu_type {
            Some(kind) => self.gpus_per_node.get(kind).copied().unwrap_or(0),
            None => self.gpus_per_node.values().copied().max().unwrap_or(0),
        };
        if wish.gpus_per_node <= there {
            return None;
        }
        let kinds: Vec<String> = self.gpus_per_node.iter().map(|(kind, count)| format!("{count} of type {kind:?}")).collect();
        let has = if kinds.is_empty() { "no GPUs".to_owned() } else { kinds.join(", ") };
        let wanted = match &wish.gpu_type {
            Some(kind) => format!("{} of type {kind:?}", wish.gpus_per_node),
            None => wish.gpus_per_node.to_string(),
        };
        Some((format!("at most what a node has: {has} (`resources.gpus_per_node`, `slurm.gpu_type`)"), wanted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn partition() -> Partition {
        Partition {
            name: "main".to_owned(),
            is_up: true,
            limit_s: Some(7200),
            nodes: 4,
            cpus_per_node: 8,
            memory_per_node_mib: 4096,
            gpus_per_node: BTreeMap::from([("h100".to_owned(), 2)]),
        }
    }

    fn wish() -> Wish {
        Wish {
            nodes: 4,
            cpus_per_node: Some(8),
            memory_per_node_mib: Some(4096),
            gpus_per_node: 2,
            gpu_type: Some("h100".to_owned()),
            time_limit_minutes: Some(120),
        }
    }

    #[test]
    fn everything_that_does_not_fit_is_said() {
        assert!(partition().misfits(&wish()).is_empty());
        let cases: [(Wish, &[&str]); 7] = [
            (Wish { nodes: 5, ..wish() }, &["fewer nodes"]),
            (Wish { cpus_per_node: Some(9), ..wish() }, &["many cores"]),
            (Wish { memory_per_node_mib: Some(4097), ..wish() }, &["much memory"]),
            (Wish { gpus_per_node: 3, ..wish() }, &["many GPUs"]),
            (Wish { gpu_type: Some("a100".to_owned()), ..wish() }, &["many GPUs"]),
            (Wish { gpu_type: None, gpus_per_node: 1, ..wish() }, &[]),
            (Wish { time_limit_minutes: Some(121), nodes: 9, ..wish() }, &["fewer nodes", "time limit"]),
        ];
        for (wish, expected) in cases {
            let found = partition().misfits(&wish);
            assert_eq!(found.len(), expected.len(), "{wish:?}: {found:?}");
            for (failure, word) in found.iter().zip(expected) {
                assert!(failure.what.contains(word), "{failure}");
            }
        }
        let down = Partition { is_up: false, limit_s: None, ..partition() };
        assert_eq!(down.misfits(&Wish { time_limit_minutes: Some(100_000), ..wish() }).len(), 1);
    }
}
