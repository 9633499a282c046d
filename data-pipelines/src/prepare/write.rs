//! The second pass: cap, draw, shards, manifest.

use std::fs;
use std::path::Path;

use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::DataRecipe;

use super::parts::Part;
use super::run::ProgressLine;
use super::tasks::TaskTable;
use crate::files;
use crate::manifest::{Counts, MANIFEST_FILE, ShardEntry, TaskEntry};
use crate::select::{Smallest, capped_total, drawn_names, find_cap, name_key, priority, share_of};
use crate::shard::{ShardBuilder, shard_name};

/// Which cap was applied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cap {
    /// Samples per task at most; `None` keeps all.
    pub(super) per_task: Option<u64>,
    /// Samples that are missing to the wanted total.
    pub(super) shortfall: u64,
}

/// What the second pass made.
pub(super) struct Written {
    pub(super) cap: Cap,
    pub(super) tasks: Vec<TaskEntry>,
    pub(super) shards: Vec<ShardEntry>,
}

/// Finds the cap for tasks with `counts` samples. Fails when the wanted total is below one sample for each task.
pub(super) fn choose_cap(data: &DataRecipe, counts: &[u64]) -> Result<Cap, Failure> {
    let Some(wanted) = data.wanted_total else { return Ok(Cap { per_task: data.cap_per_task, shortfall: 0 }) };
    let cap = find_cap(counts, wanted);
    let num_tasks = counts.iter().filter(|count| **count > 0).count();
    if cap == 0 && num_tasks > 0 {
        return Err(Failure::new(FailureKind::Recipe, "wanted total leaves less than one sample for each task")
            .at("data.wanted_total")
            .expected(format!("at least {num_tasks}, the number of tasks"))
            .found(wanted)
            .hint("raise `data.wanted_total` or hold tasks out"));
    }
    Ok(Cap { per_task: Some(cap), shortfall: wanted - capped_total(counts, cap) })
}

/// Copies the samples that are kept from the parts, in their order, into shards below `output`. What was prepared there before
/// is removed first.
pub(super) fn write_shards(
    output: &Path,
    data: &DataRecipe,
    seed: u64,
    parts: &[&Part],
    progress: &mut dyn FnMut(ProgressLine),
) -> anyhow::Result<Written> {
    let mut tasks = sorted_tasks(parts);
    let counts = available(data, &tasks.entries, seed);
    let cap = choose_cap(data, &counts)?;
    for (task, available) in tasks.entries.iter_mut().zip(counts) {
        let candidates = task.counts.kept;
        task.counts.kept = share_of(cap.per_task.map_or(available, |cap| available.min(cap)), data.fraction);
        task.counts.capped = candidates - task.counts.kept;
    }
    check_not_empty(output, &tasks.entries)?;
    progress(ProgressLine::Capped { cap_per_task: cap.per_task, kept: tasks.entries.iter().map(|task| task.counts.kept).sum() });
    let sources = sources(parts, &mut tasks, seed);
    let draw = Draw::new(&sources, &tasks.entries, seed)?;
    remove_old(output)?;
    let shards = copy_samples(output, &sources, draw, progress)?;
    Ok(Written { cap, tasks: tasks.entries, shards })
}

/// Samples of each task before the cap: none where the task is not among those that are drawn. One without samples takes no place.
fn available(data: &DataRecipe, tasks: &[TaskEntry], seed: u64) -> Vec<u64> {
    let names: Vec<&str> = tasks.iter().filter(|task| task.counts.kept > 0).map(|task| task.name.as_str()).collect();
    let mut drawn = drawn_names(seed, &names, data.max_tasks.unwrap_or(u64::MAX)).into_iter();
    tasks.iter().map(|task| if task.counts.kept > 0 && drawn.next() == Some(true) { task.counts.kept } else { 0 }).collect()
}

/// All tasks by name, so that their numbers do not depend on the order of the inputs.
fn sorted_tasks(parts: &[&Part]) -> TaskTable {
    let mut found = TaskTable::default();
    for part in parts {
        found.merge(&part.report.tasks);
    }
    found.entries.sort_by(|a, b| a.name.cmp(&b.name));
    let mut sorted = TaskTable::default();
    sorted.merge(&found.entries);
    sorted
}

fn check_not_empty(output: &Path, tasks: &[TaskEntry]) -> Result<(), Failure> {
    let mut total = Counts::default();
    for task in tasks {
        total.add(&task.counts);
    }
    if total.kept > 0 {
        return Ok(());
    }
    Err(Failure::new(FailureKind::Input, "no samples are left")
        .at(output.display())
        .expected("at least one record whose target is one token and whose task is not held out")
        .found(format!(
            "{} records: {} held out by task, {} by template, {} with targets that are not one token, {} too long",
            total.read, total.held_out, total.held_out_template, total.not_single_token, total.too_long
        ))
        .hint("check `data.sources`, `data.hold_out`, `data.template` and `model.tokenizer`"))
}

/// A part with what the draw needs to know about it.
struct Source<'a> {
    part: &'a Part,
    /// The part's task numbers as numbers of all tasks.
    tasks: Vec<u32>,
    key: u64,
}

fn sources<'a>(parts: &[&'a Part], tasks: &mut TaskTable, seed: u64) -> Vec<Source<'a>> {
    let source = |part: &'a Part| Source {
        part,
        tasks: part.report.tasks.iter().map(|task| tasks.id(&task.name, None)).collect(),
        key: name_key(seed, &part.report.input_blake3),
    };
    parts.iter().copied().map(source).collect()
}

/// The uniform draw: of a task that exceeds the cap, the samples with the smallest priorities are kept.
struct Draw {
    task_keys: Vec<u64>,
    /// Largest priority that is kept, and how many samples may still be kept; `None` keeps all.
    limits: Vec<Option<(u64, u64)>>,
}

impl Draw {
    fn new(sources: &[Source<'_>], tasks: &[TaskEntry], seed: u64) -> anyhow::Result<Self> {
        let task_keys: Vec<u64> = tasks.iter().map(|task| name_key(seed, &task.name)).collect();
        let mut smallest: Vec<Option<Smallest>> =
            tasks.iter().map(|task| (task.counts.capped > 0).then(|| Smallest::new(task.counts.kept as usize))).collect();
        for source in sources {
            for (row, task) in (0..).zip(source.part.sample_tasks()?) {
                let task = source.tasks[task as usize] as usize;
                if let Some(smallest) = &mut smallest[task] {
                    smallest.push(priority(task_keys[task], source.key, row));
                }
            }
        }
        let limit = |(smallest, task): (Option<Smallest>, &TaskEntry)| Some((smallest?.threshold().unwrap_or(0), task.counts.kept));
        Ok(Self { task_keys, limits: smallest.into_iter().zip(tasks).map(limit).collect() })
    }

    /// Whether a sample is kept. Each sample is asked for once.
    fn keeps(&mut self, task: u32, source_key: u64, row: u64) -> bool {
        let Some((threshold, num_left)) = &mut self.limits[task as usize] else { return true };
        let keeps = *num_left > 0 && priority(self.task_keys[task as usize], source_key, row) <= *threshold;
        *num_left -= u64::from(keeps);
        keeps
    }
}

fn copy_samples(
    output: &Path,
    sources: &[Source<'_>],
    mut draw: Draw,
    progress: &mut dyn FnMut(ProgressLine),
) -> anyhow::Result<Vec<ShardEntry>> {
    let mut shards: Vec<ShardEntry> = Vec::new();
    let mut builder = ShardBuilder::default();
    let mut close = |builder: ShardBuilder| -> anyhow::Result<()> {
        shards.push(builder.write(output, &shard_name(shards.len()))?);
        progress(ProgressLine::Writing { shards: shards.len(), samples: shards.iter().map(|shard| shard.samples).sum() });
        Ok(())
    };
    for source in sources {
        let mut samples = source.part.samples()?;
        let mut row = 0;
        while let Some(mut sample) = samples.next_sample()? {
            sample.task = source.tasks[sample.task as usize];
            if draw.keeps(sample.task, source.key, row) {
                builder.push(&sample)?;
            }
            row += 1;
            if builder.is_full() {
                close(std::mem::take(&mut builder))?;
            }
        }
    }
    if !builder.is_empty() {
        close(builder)?;
    }
    Ok(shards)
}

/// Removes the manifest of an older preparation, then its shards, so that no manifest ever names shards that are gone.
fn remove_old(output: &Path) -> anyhow::Result<()> {
    let manifest = output.join(MANIFEST_FILE);
    if manifest.exists() {
        fs::remove_file(&manifest).map_err(|error| files::disk_failure("remove old manifest", &manifest, &error))?;
    }
    let entries = fs::read_dir(output).map_err(|error| files::disk_failure("list folder", output, &error))?;
    for entry in entries {
        let path = entry.map_err(|error| files::disk_failure("list folder", output, &error))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        let after_number = name.strip_prefix("shard-").map(|rest| rest.trim_start_matches(|c: char| c.is_ascii_digit()));
        if matches!(after_number, Some(".arrow" | ".arrow.tmp")) {
            fs::remove_file(&path).map_err(|error| files::disk_failure("remove old shard", &path, &error))?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures;

    fn data(cap_per_task: Option<u64>, wanted_total: Option<u64>) -> DataRecipe {
        let recipe = fixtures::recipe(Path::new("/t"), Path::new("/o"), &[]);
        DataRecipe { cap_per_task, wanted_total, ..recipe.data }
    }

    #[test]
    fn the_cap_is_given_found_or_absent() {
        let counts = [1, 10, 100, 0];
        let cases = [
            (None, None, None, 0),
            (Some(5), None, Some(5), 0),
            (None, Some(30), Some(19), 0),
            (None, Some(4), Some(1), 1),
            (None, Some(1000), Some(100), 889),
        ];
        for (cap, wanted, per_task, shortfall) in cases {
            assert_eq!(choose_cap(&data(cap, wanted), &counts).unwrap(), Cap { per_task, shortfall }, "{cap:?} {wanted:?}");
        }
        assert_eq!(choose_cap(&data(None, Some(2)), &counts).unwrap_err().kind, FailureKind::Recipe);
    }
}
