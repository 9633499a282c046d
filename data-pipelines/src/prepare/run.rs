//! The order of a preparation.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::Context;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::Recipe;

use super::parts::{Part, part_path};
use super::pipeline::{HoldOut, Job, Step, read_inputs};
use super::sample::SampleEncoder;
use super::settings::{Origin, part_key, settings};
use super::write::{Written, write_shards};
use crate::files;
use crate::manifest::{Counts, InputEntry, MANIFEST_FILE, MANIFEST_VERSION, Manifest};
use crate::record::{Input, list_inputs};
use crate::tokenizer::Tokenizer;

/// Folder of the parts, below the output folder; gone once everything is prepared.
const PARTS_FOLDER: &str = ".parts";
/// Held while a preparation runs; the file stays, the lock goes with the process.
const LOCK_FILE: &str = ".lock";
/// Progress is reported every so many records.
const REPORT_RECORDS: u64 = 20_000;

/// How to prepare.
#[derive(Clone, Debug, Default)]
pub struct PrepareOptions {
    /// Prepare again what is prepared already, also when it was prepared from something else.
    pub force: bool,
}

/// What was done.
#[derive(Clone, Debug, PartialEq)]
pub enum PrepareOutcome {
    /// The folder was prepared now.
    Prepared(Manifest),
    /// The folder was prepared already, from the same recipe, tokenizer and inputs.
    UpToDate(Manifest),
}

impl PrepareOutcome {
    /// The manifest of the folder.
    pub fn manifest(&self) -> &Manifest {
        match self {
            Self::Prepared(manifest) | Self::UpToDate(manifest) => manifest,
        }
    }
}

/// Where a preparation stands; as text, one line without a line break.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProgressLine {
    /// The inputs are known.
    Inputs {
        /// Number of files.
        files: usize,
        /// Their size as stored.
        bytes: u64,
        /// Files that an interrupted preparation finished.
        finished: usize,
    },
    /// Some records are read.
    Reading {
        /// Number of files.
        files: usize,
        /// Files that are finished.
        finished: usize,
        /// Records read by this call.
        records: u64,
        /// Samples made from them.
        samples: u64,
    },
    /// All files are read and the cap is known.
    Capped {
        /// Samples per task at most.
        cap_per_task: Option<u64>,
        /// Samples that go into shards.
        kept: u64,
    },
    /// A shard is written.
    Writing {
        /// Shards written.
        shards: usize,
        /// Samples in them.
        samples: u64,
    },
}

impl fmt::Display for ProgressLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Inputs { files, bytes, finished } => {
                let mib = *bytes as f64 / f64::from(1 << 20);
                write!(f, "{files} {}, {mib:.1} MiB", if *files == 1 { "file" } else { "files" })?;
                if *finished > 0 { write!(f, "; {finished} finished before") } else { Ok(()) }
            }
            Self::Reading { files, finished, records, samples } => {
                write!(f, "read {finished} of {files} files: {records} records, {samples} samples")
            }
            Self::Capped { cap_per_task: Some(cap), kept } => write!(f, "at most {cap} samples per task: {kept} samples"),
            Self::Capped { cap_per_task: None, kept } => write!(f, "no cap: {kept} samples"),
            Self::Writing { shards, samples } => {
                write!(f, "wrote {shards} {} with {samples} samples", if *shards == 1 { "shard" } else { "shards" })
            }
        }
    }
}

/// Prepares the data of a recipe into its output folder, or finds that this is done.
///
/// An interrupted preparation goes on with the files that are missing. Fails on bad input with file and line, when the folder was
/// prepared from something else (unless `force`), when another preparation of the folder is running, and when the disk or a
/// bucket refuses; nothing is half-written and finished files are kept.
pub fn prepare(recipe: &Recipe, options: &PrepareOptions, progress: &mut dyn FnMut(ProgressLine)) -> anyhow::Result<PrepareOutcome> {
    let (tokenizer, anchor_id) = Tokenizer::load_with_anchor(&recipe.model.tokenizer, &recipe.model.anchor_token)?;
    let encoder = SampleEncoder::new(recipe, &tokenizer, anchor_id)?;
    let hold_out = HoldOut::new(&recipe.data)?;
    let inputs = list_inputs(&recipe.data.sources)?;
    let output = &recipe.data.output;
    files::create_folder(output)?;
    check_own_folder(output)?;
    let _lock = lock(output)?;
    let origin = Origin { settings: settings(recipe), tokenizer_fingerprint: tokenizer.fingerprint(), inputs: &inputs };
    if !options.force
        && let Some(manifest) = origin.find_prepared(output)?
    {
        return Ok(PrepareOutcome::UpToDate(manifest));
    }
    let parts_folder = parts_folder(output)?;
    let part_keys: Vec<String> = inputs.iter().map(|input| part_key(recipe, tokenizer.fingerprint(), input)).collect();
    let job = Job { inputs: &inputs, part_keys: &part_keys, parts_folder: &parts_folder, encoder: &encoder, hold_out: &hold_out };
    let parts = read_parts(&job, progress)?;
    let parts = part_keys.iter().map(|key| parts.get(key).context("find the part of an input")).collect::<anyhow::Result<Vec<&Part>>>()?;
    let written = write_shards(output, &recipe.data, recipe.seed, &parts, progress)?;
    let manifest = manifest(&origin, &parts, written);
    manifest.save(output)?;
    fs::remove_dir_all(&parts_folder).map_err(|error| files::disk_failure("remove finished parts", &parts_folder, &error))?;
    Ok(PrepareOutcome::Prepared(manifest))
}

/// Refuses a folder that holds anything but prepared data, such as the records themselves.
fn check_own_folder(output: &Path) -> Result<(), Failure> {
    let unreadable = |error: io::Error| files::disk_failure("read the output folder", output, &error);
    for entry in fs::read_dir(output).map_err(unreadable)? {
        let name = entry.map_err(unreadable)?.file_name().to_string_lossy().into_owned();
        let is_ours = name.starts_with('.') || name == MANIFEST_FILE || name.starts_with("shard-");
        if !is_ours {
            return Err(Failure::new(FailureKind::Recipe, "the output folder holds something else")
                .at(output.display())
                .expected("a new folder, or one that `cloze data prepare` made")
                .found(name)
                .hint("set another `data.output`"));
        }
    }
    Ok(())
}

/// Makes the parts that are missing and answers with all of them by key.
fn read_parts(job: &Job<'_>, progress: &mut dyn FnMut(ProgressLine)) -> anyhow::Result<HashMap<String, Part>> {
    let mut parts: HashMap<String, Part> = HashMap::new();
    let mut pending: Vec<usize> = Vec::new();
    // The same file in two sources has one part.
    let mut seen = HashSet::new();
    for (file, key) in job.part_keys.iter().enumerate().filter(|(_, key)| seen.insert(*key)) {
        match Part::find(&part_path(job.parts_folder, key)) {
            Some(part) => drop(parts.insert(key.clone(), part)),
            None => pending.push(file),
        }
    }
    let files = parts.len() + pending.len();
    let bytes = job.inputs.iter().map(|input| input.info.size).sum();
    progress(ProgressLine::Inputs { files, bytes, finished: parts.len() });
    let (mut records, mut samples, mut next_report) = (0, 0, REPORT_RECORDS);
    read_inputs(job, &pending, &mut |step: Step| {
        records += step.records;
        samples += step.samples;
        let is_due = step.finished.is_some() || records >= next_report;
        if let Some((file, part)) = step.finished {
            parts.insert(job.part_keys[file].clone(), part);
        }
        if is_due {
            next_report = records + REPORT_RECORDS;
            progress(ProgressLine::Reading { files, finished: parts.len(), records, samples });
        }
    })?;
    Ok(parts)
}

fn manifest(origin: &Origin<'_>, parts: &[&Part], written: Written) -> Manifest {
    let entry = |(input, part): (&Input, &&Part)| InputEntry {
        url: input.url.clone(),
        size: input.info.size,
        version: input.version(),
        blake3: part.report.input_blake3.clone(),
    };
    let mut counts = Counts::default();
    written.tasks.iter().for_each(|task| counts.add(&task.counts));
    Manifest {
        version: MANIFEST_VERSION,
        recipe_hash: origin.recipe_hash(),
        settings: origin.settings.clone(),
        tokenizer_fingerprint: origin.tokenizer_fingerprint.to_owned(),
        inputs: origin.inputs.iter().zip(parts).map(entry).collect(),
        counts,
        cap_per_task: written.cap.per_task,
        shortfall: written.cap.shortfall,
        tasks: written.tasks,
        samples: written.shards.iter().map(|shard| shard.samples).sum(),
        tokens: written.shards.iter().map(|shard| shard.tokens).sum(),
        shards: written.shards,
    }
}

/// The folder of the parts, without the unfinished ones that an interrupted preparation left.
fn parts_folder(output: &Path) -> anyhow::Result<PathBuf> {
    let folder = output.join(PARTS_FOLDER);
    files::create_folder(&folder)?;
    let entries = fs::read_dir(&folder).map_err(|error| files::disk_failure("list folder", &folder, &error))?;
    for entry in entries {
        let path = entry.map_err(|error| files::disk_failure("list folder", &folder, &error))?.path();
        if path.extension().is_some_and(|extension| extension == "tmp") {
            fs::remove_file(&path).map_err(|error| files::disk_failure("remove unfinished part", &path, &error))?;
        }
    }
    Ok(folder)
}

/// Takes the folder for this process; it is free again when the file is dropped, however the process ends.
fn lock(output: &Path) -> anyhow::Result<File> {
    let path = output.join(LOCK_FILE);
    let refused = |error: io::Error| files::disk_failure("lock output folder", &path, &error);
    let mut file = File::options().read(true).write(true).create(true).truncate(false).open(&path).map_err(refused)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::Error(error)) => return Err(refused(error).into()),
        Err(TryLockError::WouldBlock) => {
            let mut holder = String::new();
            file.read_to_string(&mut holder).map_err(refused)?;
            return Err(Failure::new(FailureKind::Environment, "another preparation of the same folder is running")
                .at(path.display())
                .found(format!("held by process {}", holder.trim()))
                .hint("wait for it to end, or set another `data.output`")
                .into());
        }
    }
    file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).map_err(refused)?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use std::time::{Duration, SystemTime};

    use tempfile::TempDir;

    use super::super::settings::check_prepared;
    use super::*;
    use crate::dataset::Dataset;
    use crate::fixtures;
    use crate::manifest::MANIFEST_FILE;

    /// A folder with a tokenizer, record files below `in`, and a recipe that prepares them into `out`.
    struct Place {
        folder: TempDir,
        recipe: Recipe,
    }

    impl Place {
        fn new(files: &[(&str, Vec<u8>)]) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let (input, output) = (folder.path().join("in"), folder.path().join("out"));
            fs::create_dir(&input).unwrap();
            let recipe = fixtures::recipe(&fixtures::tokenizer(folder.path()), &output, &[&input]);
            files.iter().for_each(|(name, content)| fs::write(input.join(name), content).unwrap());
            Self { folder, recipe }
        }

        fn input(&self, name: &str) -> PathBuf {
            self.folder.path().join("in").join(name)
        }

        fn output(&self) -> &Path {
            &self.recipe.data.output
        }

        fn prepare(&self) -> anyhow::Result<PrepareOutcome> {
            prepare(&self.recipe, &PrepareOptions::default(), &mut |_| ())
        }

        fn prepared(&self) -> Manifest {
            match self.prepare().unwrap() {
                PrepareOutcome::Prepared(manifest) => manifest,
                PrepareOutcome::UpToDate(_) => panic!("nothing was to be done"),
            }
        }

        fn failure(&self) -> Failure {
            self.prepare().unwrap_err().downcast().unwrap()
        }

        fn is_up_to_date(&self) -> bool {
            matches!(self.prepare().unwrap(), PrepareOutcome::UpToDate(_))
        }

        fn visible_files(&self) -> Vec<String> {
            let names = fs::read_dir(self.output()).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap());
            let mut names: Vec<String> = names.filter(|name| !name.starts_with('.')).collect();
            names.sort();
            names
        }
    }

    /// Lines of several tasks: `num` of each with one-token targets, and one with a longer target.
    fn lines(tasks: &[&str], num: usize) -> Vec<u8> {
        let answers = ["yes", "no", "maybe"];
        let line = |task: &str, row: usize| fixtures::line(&format!("is it {}", "one ".repeat(row % 9)), answers[row % 3], task, "zs_opt");
        let mut text: String = tasks.iter().flat_map(|task| (0..num).map(move |row| line(task, row))).collect();
        text.push_str(&fixtures::line("why ?", "no one knows", tasks[0], "zs_opt"));
        text.into_bytes()
    }

    #[test]
    fn every_format_is_prepared_once_and_then_up_to_date() {
        let rows: Vec<(String, &str)> = (0..50).map(|row| (format!("question {row}"), ["yes", "no", "yes no"][row % 3])).collect();
        let place = Place::new(&fixtures::every_format(&rows));
        let manifest = place.prepared();
        // 16 of 50 rows have the answer of two tokens.
        assert_eq!(manifest.counts, Counts { read: 200, not_single_token: 64, kept: 136, ..Counts::default() });
        let names: Vec<&str> = manifest.tasks.iter().map(|task| task.name.as_str()).collect();
        assert_eq!(names, ["packed", "plain", "table", "zipped"]);
        assert!(manifest.tasks.iter().all(|task| task.counts.kept == 34));
        assert_eq!(place.visible_files(), [MANIFEST_FILE, "shard-00000.arrow"]);
        assert!(!place.output().join(PARTS_FOLDER).exists());
        let dataset = Dataset::open(place.output()).unwrap();
        dataset.verify().unwrap();
        let tokenizer = Tokenizer::load(&place.recipe.model.tokenizer).unwrap();
        let sample = dataset.read(1).unwrap();
        assert_eq!(tokenizer.decode(&sample.tokens, false), "[CLS] question [UNK] Answer : [unused0] no [SEP]");
        assert_eq!(tokenizer.decode(&[sample.tokens[sample.answer_position as usize]], false), "no");
        assert_eq!(place.prepare().unwrap(), PrepareOutcome::UpToDate(manifest));
    }

    #[test]
    fn tasks_and_templates_are_held_out_and_the_rest_is_capped_uniformly() {
        let mut content = lines(&["sst2", "mmlu_law", "cola"], 300);
        content.extend(fixtures::line("is it ?", "yes", "cola", "fs_opt").into_bytes());
        let mut place = Place::new(&[("a.jsonl", content), ("b.jsonl", lines(&["sst2"], 100))]);
        place.recipe.data.hold_out = vec!["^mmlu".into(), "bbh".into()];
        place.recipe.data.hold_out_templates = vec!["^fs".into()];
        place.recipe.data.wanted_total = Some(401);
        let manifest = place.prepared();
        let expected =
            Counts { read: 1003, held_out: 300, held_out_template: 1, not_single_token: 2, capped: 300, kept: 400, ..Counts::default() };
        assert_eq!(manifest.counts, expected);
        assert_eq!((manifest.cap_per_task, manifest.shortfall), (Some(200), 1));
        let kept: Vec<(&str, u64)> = manifest.tasks.iter().map(|task| (task.name.as_str(), task.counts.kept)).collect();
        assert_eq!(kept, [("cola", 200), ("mmlu_law", 0), ("sst2", 200)]);
        assert_eq!(manifest.tasks[0].source.as_deref(), Some("Test"));
        // Half of the samples of sst2 are kept: of file b's 100 about 50, with a standard deviation of 4.3.
        let dataset = Dataset::open(place.output()).unwrap();
        let tasks: Vec<u32> = (0..dataset.num_samples()).map(|sample| dataset.read(sample).unwrap().task).collect();
        let from_b = tasks.iter().rev().take_while(|task| **task == 2).count();
        assert!((30..=70).contains(&from_b), "{from_b}");
    }

    #[test]
    fn only_some_tasks_and_shares_are_kept_and_more_of_them_hold_the_fewer() {
        let files = [("a.jsonl", lines(&["a", "b", "c", "d", "mmlu"], 100))];
        let kept = |change: &dyn Fn(&mut Recipe)| {
            let mut place = Place::new(&files);
            place.recipe.data.only = vec!["^[a-d]$".into()];
            change(&mut place.recipe);
            let manifest = place.prepared();
            check_prepared(&place.recipe, &manifest).unwrap();
            let dataset = Dataset::open(place.output()).unwrap();
            let samples: HashSet<(u32, Vec<u32>)> =
                (0..dataset.num_samples()).map(|sample| dataset.read(sample).unwrap()).map(|sample| (sample.task, sample.tokens)).collect();
            (manifest, samples)
        };
        let (all, _) = kept(&|_| ());
        assert_eq!((all.counts.held_out, all.counts.kept, all.counts.capped), (100, 400, 0));
        let num_kept = |manifest: &Manifest| manifest.tasks.iter().filter(|task| task.counts.kept > 0).count();
        let (three, of_three) = kept(&|recipe| recipe.data.max_tasks = Some(3));
        let (two, of_two) = kept(&|recipe| recipe.data.max_tasks = Some(2));
        assert_eq!((num_kept(&three), num_kept(&two), two.counts.kept, two.counts.capped), (3, 2, 200, 200));
        assert!(of_two.is_subset(&of_three));
        let capped = |fraction| {
            kept(&|recipe| {
                recipe.data.cap_per_task = Some(40);
                recipe.data.fraction = fraction;
            })
        };
        let ((quarter, of_quarter), (half, of_half)) = (capped(0.25), capped(0.5));
        assert_eq!((quarter.samples, half.samples, quarter.cap_per_task), (40, 80, Some(40)));
        assert!(of_quarter.is_subset(&of_half));
    }

    #[test]
    fn what_a_recipe_without_the_later_keys_prepared_still_fits() {
        let mut place = Place::new(&[("a.jsonl", lines(&["x"], 5))]);
        let manifest = place.prepared();
        for key in ["data.only", "data.max_tasks", "data.fraction"] {
            assert!(!manifest.settings.contains_key(key), "{key}");
        }
        place.recipe.data.mixing_cap = Some(2);
        assert!(place.is_up_to_date(), "the batches change, not the shards");
        place.recipe.data.max_tasks = Some(3);
        place.recipe.data.fraction = 0.5;
        place.recipe.data.only = vec!["x".into()];
        let found = check_prepared(&place.recipe, &manifest).unwrap_err().found.unwrap();
        assert_eq!(found, "data.fraction was null, is 0.5; data.max_tasks was null, is 3; data.only was null, is [\"x\"]");
    }

    #[test]
    fn the_same_recipe_gives_the_same_shards_and_another_seed_others() {
        let files = [("a.jsonl", lines(&["x", "y"], 200)), ("b.jsonl.gz", fixtures::gzip(&lines(&["y", "z"], 200)))];
        let prepared = |seed| {
            let mut place = Place::new(&files);
            place.recipe.seed = seed;
            place.recipe.data.cap_per_task = Some(20);
            place.prepared().fingerprint()
        };
        assert_eq!(prepared(1), prepared(1));
        assert_ne!(prepared(1), prepared(2));
    }

    #[test]
    fn what_changed_is_said_and_force_prepares_again() {
        let mut place = Place::new(&[("a.jsonl", lines(&["x"], 5)), ("b.jsonl", lines(&["y"], 5))]);
        place.prepared();
        let unchanged = place.recipe.clone();
        place.recipe.data.max_length = 32;
        place.recipe.seed = 8;
        let failure = place.failure();
        assert_eq!(failure.kind, FailureKind::Mismatch);
        assert_eq!(failure.found.as_deref(), Some("data.max_length was 64, is 32; seed was 7, is 8"));
        place.recipe = unchanged;
        assert!(place.is_up_to_date());

        fs::write(place.input("a.jsonl"), lines(&["x"], 6)).unwrap();
        fs::rename(place.input("b.jsonl"), place.input("c.jsonl")).unwrap();
        let found = place.failure().found.unwrap();
        for part in ["b.jsonl is gone", "a.jsonl had ", "c.jsonl is new"] {
            assert!(found.contains(part), "{found}");
        }
        let options = PrepareOptions { force: true };
        assert!(matches!(prepare(&place.recipe, &options, &mut |_| ()).unwrap(), PrepareOutcome::Prepared(_)));
        assert!(place.is_up_to_date());

        let json = fixtures::tokenizer_json();
        fs::write(&place.recipe.model.tokenizer, json.replace("\"five\"", "\"six\"")).unwrap();
        assert!(place.failure().found.unwrap().starts_with("tokenizer was blake3 "));
    }

    #[test]
    fn a_new_date_alone_is_no_change_but_new_content_of_the_same_size_is() {
        let place = Place::new(&[("a.jsonl", lines(&["x"], 5))]);
        place.prepared();
        let touch = |seconds: u64| {
            let time = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
            File::options().append(true).open(place.input("a.jsonl")).unwrap().set_modified(time).unwrap();
        };
        touch(1_000_000_000);
        assert!(place.is_up_to_date());
        let content = fs::read_to_string(place.input("a.jsonl")).unwrap();
        fs::write(place.input("a.jsonl"), content.replace("maybe", "notno")).unwrap();
        touch(1_000_000_001);
        assert!(place.failure().found.unwrap().contains("a.jsonl was blake3 "));
    }

    #[test]
    fn bad_input_leaves_nothing_visible_and_after_repair_the_result_is_as_if_it_had_been_good() {
        let good = lines(&["x"], 2000);
        let clean = Place::new(&[("a.jsonl", good.clone()), ("b.jsonl.gz", fixtures::gzip(&good))]).prepared();
        let zipped = fixtures::gzip(&good);
        let place = Place::new(&[("a.jsonl", good), ("b.jsonl.gz", zipped[..zipped.len() - 20].to_vec())]);
        let failure = place.failure();
        assert_eq!(failure.kind, FailureKind::Input);
        assert!(failure.place.unwrap().starts_with(&format!("{}:", place.input("b.jsonl.gz").display())));
        assert!(place.visible_files().is_empty());
        fs::write(place.input("b.jsonl.gz"), zipped).unwrap();
        assert_eq!(place.prepared().fingerprint(), clean.fingerprint());
    }

    #[test]
    fn an_interrupted_preparation_goes_on_with_the_missing_files() {
        let files = [("a.jsonl", lines(&["x"], 50)), ("b.jsonl", lines(&["y"], 50)), ("c.jsonl", lines(&["x", "z"], 50))];
        let clean = Place::new(&files).prepared();
        let place = Place::new(&files);
        read_only(&place.recipe, 1);
        let parts = parts_folder(place.output()).unwrap();
        fs::write(parts.join("half.part.tmp"), "unfinished").unwrap();
        let mut finished_before = None;
        let outcome = prepare(&place.recipe, &PrepareOptions::default(), &mut |line| {
            if let ProgressLine::Inputs { files: 3, finished, .. } = line {
                finished_before = Some(finished);
            }
        });
        assert_eq!(finished_before, Some(1));
        assert_eq!(outcome.unwrap().manifest().fingerprint(), clean.fingerprint());
        assert!(!parts.exists());
    }

    /// Makes the part of one input, as a preparation that is then interrupted.
    fn read_only(recipe: &Recipe, file: usize) {
        let (tokenizer, anchor) = Tokenizer::load_with_anchor(&recipe.model.tokenizer, &recipe.model.anchor_token).unwrap();
        let inputs = list_inputs(&recipe.data.sources).unwrap();
        let part_keys: Vec<String> = inputs.iter().map(|input| part_key(recipe, tokenizer.fingerprint(), input)).collect();
        let encoder = SampleEncoder::new(recipe, &tokenizer, anchor).unwrap();
        let hold_out = HoldOut::new(&recipe.data).unwrap();
        let parts_folder = parts_folder(&recipe.data.output).unwrap();
        let job = Job { inputs: &inputs, part_keys: &part_keys, parts_folder: &parts_folder, encoder: &encoder, hold_out: &hold_out };
        read_inputs(&job, &[file], &mut |_| ()).unwrap();
    }

    #[test]
    fn a_file_named_twice_is_read_once_and_counted_twice() {
        let mut place = Place::new(&[("a.jsonl", lines(&["x"], 10))]);
        place.recipe.data.sources.push(place.recipe.data.sources[0].clone());
        let manifest = place.prepared();
        assert_eq!((manifest.inputs.len(), manifest.samples), (2, 20));
        assert!(place.is_up_to_date());
    }

    #[test]
    fn a_second_preparation_of_the_folder_is_refused_by_name() {
        let place = Place::new(&[("a.jsonl", lines(&["x"], 5))]);
        files::create_folder(place.output()).unwrap();
        let held = lock(place.output()).unwrap();
        let failure = place.failure();
        assert_eq!(failure.kind, FailureKind::Environment);
        assert!(failure.place.unwrap().ends_with(LOCK_FILE));
        assert_eq!(failure.found, Some(format!("held by process {}", std::process::id())));
        drop(held);
        place.prepared();
    }

    #[test]
    fn a_damaged_folder_and_an_empty_result_are_told() {
        let mut place = Place::new(&[("a.jsonl", lines(&["x"], 5))]);
        place.recipe.data.hold_out = vec!["x".into()];
        let failure = place.failure();
        assert_eq!((failure.kind, failure.what.as_str()), (FailureKind::Input, "no samples are left"));
        place.recipe.data.hold_out.clear();
        place.prepared();
        fs::remove_file(place.output().join("shard-00000.arrow")).unwrap();
        assert_eq!(place.failure().kind, FailureKind::Damaged);
    }
}
