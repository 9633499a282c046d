//! Partitions, and whether a job fits into one.

use std::collections::{BTreeMap, BTreeSet};

use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::site::SlurmSite;
use cloze_recipes::study::Resources;

use super::parse::nodes_of_lists;

/// How the states of nodes begin that take no new job until somebody has seen to them. One that is switched off to save power, or boots, is
/// none of them.
const OUT_OF_USE: [&str; 5] = ["down", "drain", "fail", "future", "inval"];

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
    /// Its nodes, those that are alike together.
    pub groups: Vec<NodeGroup>,
}

/// Nodes of a partition that are alike.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NodeGroup {
    /// How many.
    pub nodes: u32,
    /// Cores of each.
    pub cpus: u32,
    /// Memory of each, in MiB.
    pub memory_mib: u64,
    /// GPUs of each, by type.
    pub gpus: BTreeMap<String, u32>,
    /// Their state, as SLURM calls it; empty where it does not say.
    pub state: String,
    /// Their names, where SLURM says them.
    pub names: BTreeSet<String>,
}

/// What a partition has for a job.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Fit {
    /// Everything that the job wants and the partition cannot give.
    pub misfits: Vec<Failure>,
    /// What it cannot give at present: the job would wait until nodes come back.
    pub shortage: Option<String>,
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
    /// Nodes that the job must not have.
    pub exclude: BTreeSet<String>,
}

impl Wish {
    /// What these resources want at a site, with its time limit where they state none.
    pub fn of(resources: &Resources, site: &SlurmSite) -> Self {
        Self {
            nodes: resources.nodes,
            cpus_per_node: resources.cpus_per_worker.map(|cpus| cpus.saturating_mul(resources.workers_per_node)),
            memory_per_node_mib: resources.memory_per_node_mib,
            gpus_per_node: resources.gpus_per_node,
            gpu_type: site.gpu_type.clone(),
            time_limit_minutes: resources.time_limit_minutes.or(site.time_limit_minutes),
            exclude: nodes_of_lists(site.exclude.iter().map(String::as_str)),
        }
    }

    /// GPUs of the wanted type among these.
    fn gpus_among(&self, gpus: &BTreeMap<String, u32>) -> u32 {
        match &self.gpu_type {
            Some(kind) => gpus.get(kind).copied().unwrap_or(0),
            None => gpus.values().copied().max().unwrap_or(0),
        }
    }
}

impl NodeGroup {
    /// Whether its nodes take new jobs, or will without anybody's doing.
    fn is_in_use(&self) -> bool {
        !OUT_OF_USE.iter().any(|state| self.state.to_ascii_lowercase().starts_with(state))
    }

    /// Whether each of its nodes has what a job wants of one.
    fn suits(&self, wish: &Wish) -> bool {
        wish.cpus_per_node.is_none_or(|cpus| cpus <= self.cpus)
            && wish.memory_per_node_mib.is_none_or(|memory| memory <= self.memory_mib)
            && wish.gpus_per_node <= wish.gpus_among(&self.gpus)
    }

    /// How many of its nodes a job may have.
    fn num_allowed(&self, wish: &Wish) -> u32 {
        let excluded = self.names.intersection(&wish.exclude).count();
        self.nodes.saturating_sub(u32::try_from(excluded).unwrap_or(u32::MAX))
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
        self.groups.extend(group.groups.iter().cloned());
    }

    /// What this partition has for a job.
    pub fn fit(&self, wish: &Wish) -> Fit {
        let mut misfits = self.misfits(wish);
        let suitable = || self.groups.iter().filter(|group| group.suits(wish));
        let allowed: u32 = suitable().map(|group| group.num_allowed(wish)).sum();
        if misfits.is_empty() && allowed < wish.nodes {
            let what = "the partition has fewer nodes for the run than it wants";
            let expected = format!("at most {allowed}, which have what it wants of a node and are not left out by `slurm.exclude`");
            misfits.push(self.wrong(what, expected, wish.nodes.to_string()));
        }
        let usable: u32 = suitable().filter(|group| group.is_in_use()).map(|group| group.num_allowed(wish)).sum();
        let is_short = misfits.is_empty() && usable < wish.nodes;
        let shortage = is_short.then(|| {
            let out: Vec<String> =
                suitable().filter(|group| !group.is_in_use()).map(|group| format!("{} {}", group.nodes, group.state)).collect();
            format!("{usable} of {} nodes that the run wants are in use in partition {}: {}", wish.nodes, self.name, out.join(", "))
        });
        Fit { misfits, shortage }
    }

    fn wrong(&self, what: &str, expected: String, found: String) -> Failure {
        Failure::new(FailureKind::Recipe, what).at(format!("partition {}", self.name)).expected(expected).found(found)
    }

    /// Everything that a job wants and this partition can never give: what, expected, found.
    fn misfits(&self, wish: &Wish) -> Vec<Failure> {
        let wrong = |what: &str, expected: String, found: String| self.wrong(what, expected, found);
        let mut found = Vec::new();
        if !self.is_up {
            found.push(wrong("the partition takes no jobs", "a partition that is up".to_owned(), "down".to_owned()));
        }
        if wish.nodes > self.nodes {
            found.push(wrong(
                "the partition has fewer nodes than the run wants",
                format!("at most {} (`resources.nodes`, `--nodes`)", self.nodes),
                wish.nodes.to_string(),
            ));
        }
        if let Some(cpus) = wish.cpus_per_node.filter(|&cpus| cpus > self.cpus_per_node) {
            found.push(wrong(
                "no node of the partition has that many cores",
                format!("at most {} (`resources.cpus_per_worker` times `resources.workers_per_node`)", self.cpus_per_node),
                cpus.to_string(),
            ));
        }
        if let Some(memory) = wish.memory_per_node_mib.filter(|&memory| memory > self.memory_per_node_mib) {
            found.push(wrong(
                "no node of the partition has that much memory",
                format!("at most {} MiB (`resources.memory_per_node_mib`)", self.memory_per_node_mib),
                format!("{memory} MiB"),
            ));
        }
        found.extend(
            self.gpu_misfit(wish)
                .map(|(expected, found)| wrong("no node of the partition has that many GPUs of that type", expected, found)),
        );
        if let (Some(limit_s), Some(minutes)) = (self.limit_s, wish.time_limit_minutes)
            && u64::from(minutes) * 60 > limit_s
        {
            found.push(wrong(
                "the time limit is longer than the partition allows",
                format!("at most {} minutes (`resources.time_limit_minutes`); a longer run goes on in its next job", limit_s / 60),
                format!("{minutes} minutes"),
            ));
        }
        found
    }

    /// What is expected and found, where the GPUs do not fit.
    fn gpu_misfit(&self, wish: &Wish) -> Option<(String, String)> {
        if wish.gpus_per_node <= wish.gpus_among(&self.gpus_per_node) {
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
            groups: vec![group("idle", &["n1", "n2"]), group("mixed", &["n3", "n4"])],
        }
    }

    fn group(state: &str, names: &[&str]) -> NodeGroup {
        NodeGroup {
            nodes: names.len() as u32,
            cpus: 8,
            memory_mib: 4096,
            gpus: BTreeMap::from([("h100".to_owned(), 2)]),
            state: state.to_owned(),
            names: names.iter().map(ToString::to_string).collect(),
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
            exclude: BTreeSet::new(),
        }
    }

    #[test]
    fn everything_that_does_not_fit_is_said() {
        assert_eq!(partition().fit(&wish()), Fit::default());
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
            let found = partition().fit(&wish).misfits;
            assert_eq!(found.len(), expected.len(), "{wish:?}: {found:?}");
            for (failure, word) in found.iter().zip(expected) {
                assert!(failure.what.contains(word), "{failure}");
            }
        }
        let down = Partition { is_up: false, limit_s: None, ..partition() };
        assert_eq!(down.fit(&Wish { time_limit_minutes: Some(100_000), ..wish() }).misfits.len(), 1);
    }
    #[test]
    fn nodes_that_are_left_out_or_out_of_use_do_not_count() {
        let of = |wish: &Wish, groups: Vec<NodeGroup>| {
            let fit = Partition { groups, ..partition() }.fit(wish);
            (fit.misfits.into_iter().map(|failure| failure.expected.unwrap()).collect::<Vec<_>>(), fit.shortage)
        };
        let excluded = Wish { exclude: BTreeSet::from(["n2".to_owned(), "other".to_owned()]), ..wish() };
        let (misfits, _) = of(&excluded, partition().groups);
        assert!(misfits.len() == 1 && misfits[0].starts_with("at most 3, "), "{misfits:?}");
        assert_eq!(of(&Wish { nodes: 3, ..excluded.clone() }, partition().groups), (Vec::new(), None));
        // What is down may come back: the job would only wait.
        for (state, is_out) in
            [("down*", true), ("drained", true), ("draining@", true), ("FAIL", true), ("powered_down~", false), ("", false)]
        {
            let (misfits, shortage) = of(&wish(), vec![group("idle", &["n1", "n2", "n3"]), group(state, &["n4"])]);
            let expected = is_out.then(|| format!("3 of 4 nodes that the run wants are in use in partition main: 1 {state}"));
            assert_eq!((misfits.len(), shortage), (0, expected), "{state}");
        }
        // A node that is too small for the job does not count, whatever the largest one has.
        let small = NodeGroup { gpus: BTreeMap::new(), ..group("idle", &["n3", "n4"]) };
        let (misfits, _) = of(&wish(), vec![group("idle", &["n1", "n2"]), small]);
        assert!(misfits[0].starts_with("at most 2, "), "{misfits:?}");
    }
}
