//! What the batch system's programs print, read. Nothing here starts a program.

use std::collections::{BTreeMap, BTreeSet};

use super::job::{ExitStatus, JobId, JobState, State};
use super::partition::{NodeGroup, Partition};

/// What `squeue -o` is asked for: job, state, reason, time used, time limit, nodes. Names could hold a bar, so they are not asked for.
pub(super) const QUEUE_FORMAT: &str = "%i|%T|%M|%l|%N|%r";

/// What `sacct --format` is asked for.
pub(super) const ACCOUNT_FORMAT: &str = "JobID,State,ExitCode,ElapsedRaw,NodeList";

/// What `sinfo -o` is asked for: partition, availability, time limit, nodes, cores, memory in MiB, generic resources, state, names.
pub(super) const PARTITION_FORMAT: &str = "%R|%a|%l|%D|%c|%m|%G|%T|%N";

/// Most nodes of one bracket in a list of nodes; the largest clusters have some ten thousand.
const MAX_LIST_NODES: usize = 1 << 16;

/// Seconds of a minute, an hour and a day.
const MINUTE_S: u64 = 60;
const HOUR_S: u64 = 60 * MINUTE_S;
const DAY_S: u64 = 24 * HOUR_S;

/// The job number that `sbatch --parsable` prints: `12`, or `12;cluster` in a federation.
pub(super) fn submitted_job(output: &str) -> Option<JobId> {
    // A site's submit plugin may print lines of its own before it.
    let line = output.lines().rev().find(|line| !line.trim().is_empty())?;
    let number = line.trim().split(';').next()?;
    number.parse().ok().map(JobId::whole)
}

/// The jobs of `squeue -h -r -o` with [`QUEUE_FORMAT`]. Elements of an array that wait together, as in `12_[3-5%2]`, each get a place.
pub(super) fn queue(output: &str) -> BTreeMap<JobId, JobState> {
    let mut jobs = BTreeMap::new();
    for line in output.lines() {
        let mut fields = line.splitn(6, '|').map(str::trim);
        let (Some(ids), Some(state), Some(used), Some(limit), Some(nodes), Some(reason)) =
            (fields.next(), fields.next(), fields.next(), fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        for id in job_ids(ids) {
            let job = JobState {
                elapsed_s: duration_s(used),
                limit_s: duration_s(limit),
                nodes: node_list(nodes),
                reason: word(reason),
                ..JobState::new(State::from_name(state))
            };
            jobs.insert(id, job);
        }
    }
    jobs
}

/// The jobs of `sacct -n -P -X -D` with [`ACCOUNT_FORMAT`]. A job that was put back has a line for each of its starts; the last counts.
pub(super) fn account(output: &str) -> BTreeMap<JobId, JobState> {
    let mut jobs: BTreeMap<JobId, JobState> = BTreeMap::new();
    for line in output.lines() {
        let mut fields = line.split('|').map(str::trim);
        let (Some(ids), Some(state), Some(exit), Some(elapsed), Some(nodes)) =
            (fields.next(), fields.next(), fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        for id in job_ids(ids) {
            let requeues = jobs.get(&id).and_then(|before| before.requeues).map_or(0, |before| before + 1);
            let name = State::from_name(state);
            let job = JobState {
                exit: exit_status(exit).filter(|_| name.is_end()),
                elapsed_s: elapsed.parse().ok(),
                nodes: node_list(nodes),
                requeues: Some(requeues),
                cancelled_by: state.strip_prefix("CANCELLED by ").and_then(|user| user.parse().ok()),
                ..JobState::new(name)
            };
            jobs.insert(id, job);
        }
    }
    jobs
}

/// The jobs of `scontrol -o show job`, one a line; several lines for an array.
pub(super) fn shown_jobs(output: &str) -> BTreeMap<JobId, JobState> {
    let mut jobs = BTreeMap::new();
    for line in output.lines() {
        let get = |key: &str| field(line, key);
        let ids = match (get("ArrayJobId"), get("ArrayTaskId"), get("JobId")) {
            (Some(array), Some(elements), _) if elements != "N/A" => job_ids(&format!("{array}_[{elements}]")),
            (_, _, Some(job)) => job_ids(job),
            _ => continue,
        };
        let Some(state) = get("JobState").map(State::from_name) else { continue };
        let job = JobState {
            exit: get("ExitCode").and_then(exit_status).filter(|_| state.is_end()),
            elapsed_s: get("RunTime").and_then(duration_s),
            limit_s: get("TimeLimit").and_then(duration_s),
            nodes: node_list(get("NodeList").unwrap_or_default()),
            reason: get("Reason").and_then(word),
            requeues: get("Restarts").and_then(|restarts| restarts.parse().ok()),
            is_preempted: get("PreemptTime").is_some_and(|time| !matches!(time, "None" | "N/A" | "Unknown")),
            ..JobState::new(state)
        };
        jobs.extend(ids.into_iter().map(|id| (id, job.clone())));
    }
    jobs
}

/// The name of the cluster in `scontrol show config`: `ClusterName = big`.
pub(super) fn cluster_name(output: &str) -> Option<String> {
    let mut pairs = output.lines().filter_map(|line| line.split_once('='));
    pairs.find(|(key, _)| key.trim() == "ClusterName").and_then(|(_, name)| word(name.trim()))
}

/// The lists of nodes that the waiting jobs of `scontrol -o show job` are kept away from; `None` where no job waits.
pub(super) fn excluded_nodes(output: &str) -> Option<BTreeSet<String>> {
    let is_waiting = |line: &&str| field(line, "JobState").map(State::from_name) == Some(State::Pending);
    let mut waiting = output.lines().filter(is_waiting).peekable();
    waiting.peek()?;
    Some(waiting.filter_map(|line| field(line, "ExcNodeList").and_then(word)).collect())
}

/// Numbers and names of `squeue -h -o "%i|%j"`: those of exactly this name.
pub(super) fn jobs_of_name(output: &str, name: &str) -> Vec<JobId> {
    let lines = output.lines().filter_map(|line| line.split_once('|'));
    let mut jobs: Vec<JobId> =
        lines.filter(|(_, found)| found.trim() == name).flat_map(|(ids, _)| job_ids(ids.trim())).map(|id| JobId::whole(id.job)).collect();
    jobs.sort_unstable();
    jobs.dedup();
    jobs
}

/// The partitions of `sinfo -h -o` with [`PARTITION_FORMAT`]. Groups of unequal nodes have a line each and are put together: the
/// largest node counts, since a job can wait for it.
pub(super) fn partitions(output: &str) -> Vec<Partition> {
    let mut found: Vec<Partition> = Vec::new();
    for line in output.lines() {
        let mut fields = line.splitn(9, '|').map(str::trim);
        let (Some(name), Some(state), Some(limit), Some(nodes), Some(cpus), Some(memory), Some(gres)) =
            (fields.next(), fields.next(), fields.next(), fields.next(), fields.next(), fields.next(), fields.next())
        else {
            continue;
        };
        let (node_state, names) = (fields.next().unwrap_or_default(), fields.next().unwrap_or_default());
        let alike = NodeGroup {
            nodes: count(nodes),
            cpus: count(cpus),
            memory_mib: u64::from(count(memory)),
            gpus: gpus_of(gres),
            state: node_state.to_owned(),
            names: nodes_of_lists([names]),
        };
        let group = Partition {
            name: name.trim_end_matches('*').to_owned(),
            is_up: state == "up",
            limit_s: duration_s(limit),
            nodes: alike.nodes,
            cpus_per_node: alike.cpus,
            memory_per_node_mib: alike.memory_mib,
            gpus_per_node: alike.gpus.clone(),
            groups: vec![alike],
        };
        match found.iter_mut().find(|partition| partition.name == group.name) {
            Some(partition) => partition.add(&group),
            None => found.push(group),
        }
    }
    found
}

/// The node names of `scontrol show hostnames`.
pub(super) fn host_names(output: &str) -> Vec<String> {
    output.lines().map(str::trim).filter(|line| !line.is_empty()).map(str::to_owned).collect()
}

/// The names in lists of nodes such as `n[08-10,12],m1`. At most some thousands are told, so that a wrong range does no harm.
pub(super) fn nodes_of_lists<'a>(lists: impl IntoIterator<Item = &'a str>) -> BTreeSet<String> {
    let mut names = BTreeSet::new();
    for list in lists {
        let mut depth = 0_u32;
        let is_end = |letter: char| {
            match letter {
                '[' => depth += 1,
                ']' => depth = depth.saturating_sub(1),
                _ => {}
            }
            letter == ',' && depth == 0
        };
        names.extend(list.split(is_end).filter(|part| !part.trim().is_empty()).flat_map(|part| nodes_of(part.trim())));
    }
    names
}

/// The names of `n[08-10,12]`, of a name alone, or of several brackets.
fn nodes_of(pattern: &str) -> Vec<String> {
    let Some((prefix, rest)) = pattern.split_once('[') else { return vec![pattern.to_owned()] };
    let (ranges, rest) = rest.split_once(']').unwrap_or((rest, ""));
    let endings = nodes_of(rest);
    let numbers = ranges.split(',').flat_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        let bounds = first.parse::<u64>().ok().zip(last.parse::<u64>().ok());
        let width = first.len();
        bounds.into_iter().flat_map(move |(first, last)| (first..=last).map(move |number| format!("{number:0width$}")))
    });
    numbers.take(MAX_LIST_NODES).flat_map(|number| endings.iter().map(move |ending| format!("{prefix}{number}{ending}"))).collect()
}

/// Value of a key in a line of `Key=value Key=value`.
pub(super) fn field<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.split_whitespace().find_map(|pair| pair.split_once('=').filter(|(name, _)| *name == key)).map(|(_, value)| value)
}

/// `12`, `12_3`, or the elements of `12_[0,2-5%2]`.
fn job_ids(text: &str) -> Vec<JobId> {
    let Some((job, elements)) = text.split_once("_[") else { return text.parse().into_iter().collect() };
    let Ok(job) = job.parse() else { return Vec::new() };
    let elements = elements.trim_end_matches(']').split('%').next().unwrap_or_default();
    let ranges = elements.split(',').filter_map(|range| {
        let (first, last) = range.split_once('-').unwrap_or((range, range));
        // A step, as in `0-8:2`, is left out by `squeue -r`; the others print it only for jobs that wait.
        let (last, step) = last.split_once(':').unwrap_or((last, "1"));
        Some((first.parse::<u32>().ok()?, last.parse::<u32>().ok()?, step.parse::<usize>().ok().filter(|&step| step > 0)?))
    });
    ranges.flat_map(|(first, last, step)| (first..=last).step_by(step)).map(|element| JobId::whole(job).element(element)).collect()
}

/// `3:0`, exit code and signal.
fn exit_status(text: &str) -> Option<ExitStatus> {
    let (code, signal) = text.split_once(':')?;
    Some(ExitStatus { code: code.parse().ok()?, signal: signal.parse().ok()? })
}

/// `1-02:03:04`, `02:03:04`, `03:04` or `1-00` in seconds; `None` for `UNLIMITED`, `infinite`, `INVALID` and anything else.
pub(super) fn duration_s(text: &str) -> Option<u64> {
    let (days, rest) = match text.split_once('-') {
        Some((days, rest)) => (Some(days.parse::<u64>().ok()?), rest),
        None => (None, text),
    };
    let parts: Option<Vec<u64>> = rest.split(':').map(|part| part.parse().ok()).collect();
    let seconds = match (days.is_some(), parts?.as_slice()) {
        (_, [hours, minutes, seconds]) => hours * HOUR_S + minutes * MINUTE_S + seconds,
        (true, [hours, minutes]) => hours * HOUR_S + minutes * MINUTE_S,
        (true, [hours]) => hours * HOUR_S,
        (false, [minutes, seconds]) => minutes * MINUTE_S + seconds,
        (false, [minutes]) => minutes * MINUTE_S,
        _ => return None,
    };
    Some(days.unwrap_or(0) * DAY_S + seconds)
}

/// Count and type of the GPUs in `gpu:h100:8(S:0-1),nvme:1`; the sum over the types.
fn gpus_of(gres: &str) -> BTreeMap<String, u32> {
    let mut gpus = BTreeMap::new();
    // Commas inside parentheses belong to the place of a resource.
    let mut depth = 0_u32;
    let parts = gres.split(|letter| {
        match letter {
            '(' => depth += 1,
            ')' => depth = depth.saturating_sub(1),
            _ => {}
        }
        letter == ',' && depth == 0
    });
    for part in parts {
        let part = part.split('(').next().unwrap_or_default();
        let mut words = part.split(':');
        if words.next() != Some("gpu") {
            continue;
        }
        let (kind, count) = match (words.next(), words.next()) {
            (Some(kind), Some(count)) => (kind, count.parse().unwrap_or(0)),
            (Some(count), None) => ("", count.parse().unwrap_or(0)),
            _ => ("", 1),
        };
        *gpus.entry(kind.to_owned()).or_insert(0) += count;
    }
    gpus
}

/// The number in `4`, `4+` or `128000+`.
fn count(text: &str) -> u32 {
    text.trim_end_matches('+').parse().unwrap_or(0)
}

fn node_list(text: &str) -> String {
    match text {
        "(null)" | "None assigned" | "n/a" => String::new(),
        nodes => nodes.to_owned(),
    }
}

fn word(text: &str) -> Option<String> {
    match text {
        "" | "None" | "(null)" => None,
        word => Some(word.to_owned()),
    }
}

#[cfg(test)]
mod tests;
