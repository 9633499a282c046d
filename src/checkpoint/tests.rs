//! Checkpoints of one worker and of several: saved, committed, damaged, contested, pruned and loaded again.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use cloze_cluster::protocol::SavedFile;
use cloze_data::store::{ConditionalPut, Store};
use cloze_recipes::failure::{Failure, FailureKind};
use object_store::memory::InMemory;
use object_store::path::Path as ObjectPath;
use tempfile::TempDir;

use super::hf::read_weights;
use super::manifest::{INDEX_FILE, MANIFEST_FILE, MODEL_FILE, Manifest, OPTIMIZER_FILE, key, model_file, optimizer_file};
use super::pieces::encode;
use super::retention::Verdict;
use super::store::Saved;
use super::{CheckpointState, CheckpointStore, Loaded, NamedTensorOwned, Piece, Share, StorePolicy};

/// Shapes of the two tensors of a test's model.
const MATRIX: [usize; 2] = [4, 6];
const BIAS: [usize; 1] = [5];

/// First value of a worker's part of the matrix, and the one behind its last.
type Cut = (usize, usize);

struct Fixture {
    folder: TempDir,
    checkpoints: CheckpointStore,
}

impl Fixture {
    /// A store with checkpoints of the given steps, by one worker.
    fn new(keep_last: u32, steps: &[u64]) -> Self {
        Self::with_policy(StorePolicy { keep_last, ..StorePolicy::default() }, steps)
    }

    fn with_policy(policy: StorePolicy, steps: &[u64]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let fixture = Self { checkpoints: reopened(folder.path(), policy), folder };
        for step in steps {
            fixture.save(*step);
        }
        fixture
    }

    fn save(&self, step: u64) -> Saved {
        save(&self.checkpoints, &state(step, 1), &[(0, 24)]).unwrap()
    }

    /// Another process with the same store.
    fn reopened(&self) -> CheckpointStore {
        reopened(self.folder.path(), StorePolicy::default())
    }

    fn path(&self, step: u64, file: &str) -> PathBuf {
        self.folder.path().join("checkpoints").join(key(step, file))
    }

    fn steps(&self) -> Vec<u64> {
        self.checkpoints.list().unwrap().into_iter().map(|listed| listed.step).collect()
    }

    fn latest(&self) -> Loaded {
        self.checkpoints.latest_good().unwrap().unwrap()
    }

    fn index(&self, step: u64) -> serde_json::Value {
        serde_json::from_slice(&fs::read(self.path(step, INDEX_FILE)).unwrap()).unwrap()
    }
}

fn reopened(folder: &Path, policy: StorePolicy) -> CheckpointStore {
    CheckpointStore::open(&folder.join("checkpoints").display().to_string(), &BTreeMap::new(), policy).unwrap()
}

fn in_memory() -> CheckpointStore {
    let store = Store::over(Arc::new(InMemory::new()), ObjectPath::from("run"), "memory:///run");
    CheckpointStore::over(store, StorePolicy::default())
}

fn state(step: u64, world_size: u32) -> CheckpointState {
    CheckpointState {
        step,
        recipe_hash: "recipe".to_owned(),
        data_fingerprint: "data".to_owned(),
        world_size,
        adam_step: step + 9,
        loss: Some(1.0 / step as f64),
        temporary: false,
        shard: "none".to_owned(),
    }
}

fn values(seed: u64, len: usize) -> Bytes {
    (0..len as u64).flat_map(|index| ((seed * 100 + index) as f32).sqrt().to_le_bytes()).collect()
}

/// A share with a range of the matrix; the first rank has the bias and the companion, too.
fn share(step: u64, rank: u32, world_size: u32, (start, end): Cut) -> Share {
    let piece = |name: &str, seed: u64| Piece {
        name: name.to_owned(),
        full_shape: MATRIX.to_vec(),
        start,
        data: values(seed, 24).slice(start * 4..end * 4),
    };
    let mut share =
        Share { rank, world_size, model: vec![piece("w", step)], optimizer: vec![piece("exp_avg.w", step + 1)], companions: Vec::new() };
    if start == end {
        (share.model, share.optimizer) = (Vec::new(), Vec::new());
    }
    if rank == 0 {
        share.model.push(Piece { name: "b".to_owned(), full_shape: BIAS.to_vec(), start: 0, data: values(step + 2, 5) });
        share.companions.push(("config.json".to_owned(), Bytes::from_static(b"{}")));
    }
    share
}

fn save_shares(checkpoints: &CheckpointStore, step: u64, cuts: &[Cut]) -> Vec<SavedFile> {
    let world_size = cuts.len() as u32;
    let shares = (0..world_size).zip(cuts);
    shares.flat_map(|(rank, cut)| checkpoints.save_share(step, &share(step, rank, world_size, *cut)).unwrap()).collect()
}

fn save(checkpoints: &CheckpointStore, state: &CheckpointState, cuts: &[Cut]) -> anyhow::Result<Saved> {
    checkpoints.commit(state, save_shares(checkpoints, state.step, cuts))
}

fn check_tensors(loaded: &Loaded, step: u64) {
    let tensor = |name: &str, shape: &[usize], data: Bytes| NamedTensorOwned { name: name.to_owned(), shape: shape.to_vec(), data };
    assert_eq!(loaded.model, [tensor("b", &BIAS, values(step + 2, 5)), tensor("w", &MATRIX, values(step, 24))]);
    assert_eq!(loaded.optimizer, [tensor("exp_avg.w", &MATRIX, values(step + 1, 24))]);
}

fn failure<T: std::fmt::Debug>(result: anyhow::Result<T>) -> Failure {
    result.unwrap_err().downcast().unwrap()
}

fn flip_last_byte(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(path, bytes).unwrap();
}

fn truncate(path: &Path) {
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() - 1]).unwrap();
}

#[test]
fn a_checkpoint_comes_back_bit_by_bit() {
    let fixture = Fixture::new(2, &[]);
    assert_eq!(fixture.checkpoints.latest_good().unwrap(), None);
    assert!(!fixture.checkpoints.is_saved(5, "recipe").unwrap());
    let saved = fixture.save(5);
    let loaded = fixture.latest();
    assert_eq!((&loaded.state, &loaded.url, loaded.skipped.len()), (&state(5, 1), &saved.url, 0));
    check_tensors(&loaded, 5);
    let sizes = [MODEL_FILE, OPTIMIZER_FILE, "config.json"].map(|file| fs::metadata(fixture.path(5, file)).unwrap().len());
    assert_eq!(saved.bytes, sizes.iter().sum::<u64>());
    assert!(fixture.checkpoints.is_saved(5, "recipe").unwrap());
    assert_eq!(fixture.checkpoints.load_step(5).unwrap(), loaded);
    assert_eq!(fixture.checkpoints.companions(5).unwrap(), [("config.json".to_owned(), Bytes::from_static(b"{}"))]);
    assert_eq!(failure(fixture.checkpoints.load_step(6)).kind, FailureKind::Input);
    assert_eq!(read_weights(&fixture.path(5, "")).unwrap(), loaded.model);
}

#[test]
fn shares_of_any_number_of_workers_make_the_same_state() {
    let worlds: [&[Cut]; 4] = [&[(0, 24)], &[(0, 1), (1, 24)], &[(0, 7), (7, 7), (7, 20), (20, 24)], &[(0, 0), (0, 0), (0, 24)]];
    for cuts in worlds {
        let fixture = Fixture::new(2, &[]);
        for checkpoints in [&in_memory(), &fixture.checkpoints] {
            let state = CheckpointState { shard: "optimizer".to_owned(), ..state(3, cuts.len() as u32) };
            save(checkpoints, &state, cuts).unwrap();
            let loaded = checkpoints.latest_good().unwrap().unwrap();
            assert_eq!(loaded.state, state);
            check_tensors(&loaded, 3);
            assert!(checkpoints.verify(3).unwrap().is_good());
        }
    }
}

#[test]
fn whole_tensors_in_several_files_are_a_model_folder_with_an_index() {
    let fixture = Fixture::new(2, &[]);
    save(&fixture.checkpoints, &state(3, 3), &[(0, 0), (0, 24), (0, 0)]).unwrap();
    let (first, second) = (model_file(0, 3), model_file(1, 3));
    let expected = serde_json::json!({"metadata": {"total_size": 29 * 4}, "weight_map": {"b": first, "w": second}});
    assert_eq!(fixture.index(3), expected);
    assert_eq!(read_weights(&fixture.path(3, "")).unwrap(), fixture.latest().model);
    // The index belongs to the checkpoint like any other file.
    flip_last_byte(&fixture.path(3, INDEX_FILE));
    assert!(failure(fixture.reopened().latest_good()).found.unwrap().contains("index.json has BLAKE3 hash"));

    save(&fixture.checkpoints, &state(4, 2), &[(0, 12), (12, 24)]).unwrap();
    assert!(!fixture.path(4, INDEX_FILE).exists(), "an index cannot name a tensor that is divided");
}

#[test]
fn a_checkpoint_of_the_first_version_is_loaded() {
    let fixture = Fixture::new(2, &[]);
    let whole = share(7, 0, 1, (0, 24));
    let contents = [(MODEL_FILE, encode(&whole.model).unwrap().concat()), (OPTIMIZER_FILE, encode(&whole.optimizer).unwrap().concat())];
    let files: Vec<_> = contents
        .iter()
        .map(|(name, content)| serde_json::json!({"name": name, "size": content.len(), "blake3": blake3::hash(content).to_hex().as_str()}))
        .collect();
    let state = serde_json::json!({"step": 7, "recipe_hash": "recipe", "data_fingerprint": "data", "world_size": 4, "adam_step": 7});
    let manifest = serde_json::json!({"format_version": 1, "step": 7, "files": files, "state": state}).to_string();
    fs::create_dir_all(fixture.path(7, "")).unwrap();
    for (name, content) in &contents {
        fs::write(fixture.path(7, name), content).unwrap();
    }
    fs::write(fixture.path(7, MANIFEST_FILE), manifest).unwrap();
    let loaded = fixture.latest();
    check_tensors(&loaded, 7);
    assert_eq!((loaded.state.world_size, loaded.state.loss), (4, None));
    fixture.save(8);
    assert_eq!(fixture.steps(), [7, 8]);
}

#[test]
fn a_damaged_newest_checkpoint_gives_way_to_its_predecessor() {
    type Damage = fn(&Fixture);
    let cases: [(Damage, &str); 8] = [
        (|f| flip_last_byte(&f.path(9, MODEL_FILE)), "model.safetensors has BLAKE3 hash"),
        (|f| flip_last_byte(&f.path(9, "config.json")), "config.json has BLAKE3 hash"),
        (|f| truncate(&f.path(9, OPTIMIZER_FILE)), "the manifest says"),
        (|f| fs::remove_file(f.path(9, MODEL_FILE)).unwrap(), "model.safetensors is missing"),
        (|f| fs::remove_file(f.path(9, MANIFEST_FILE)).unwrap(), "manifest.json is missing"),
        (|f| fs::write(f.path(9, MANIFEST_FILE), "garbage").unwrap(), "manifest.json is not readable"),
        (|f| truncate(&f.path(9, MANIFEST_FILE)), "manifest.json is not readable"),
        (|f| fs::write(f.path(9, MANIFEST_FILE), fs::read(f.path(5, MANIFEST_FILE)).unwrap()).unwrap(), "manifest.json is of step 5"),
    ];
    for (damage, reason) in cases {
        let fixture = Fixture::new(2, &[5, 9]);
        damage(&fixture);
        // A process that did not write it has no memory of how it was.
        let loaded = fixture.reopened().latest_good().unwrap().unwrap();
        assert_eq!((loaded.state.step, loaded.skipped.len()), (5, 1), "{reason}");
        assert!(loaded.skipped[0].contains(reason) && loaded.skipped[0].contains("step-000000000009"), "{}", loaded.skipped[0]);
    }
}

#[test]
fn a_damaged_share_is_told_by_name() {
    type Damage = fn(&Fixture);
    let cases: [(Damage, &str); 4] = [
        (|f| truncate(&f.path(9, &model_file(1, 2))), "model-00002-of-00002.safetensors has"),
        (|f| fs::remove_file(f.path(9, &optimizer_file(0, 2))).unwrap(), "optimizer-00001-of-00002.safetensors is missing"),
        (
            |f| {
                let (a, b) = (f.path(9, &model_file(0, 2)), f.path(9, &model_file(1, 2)));
                let contents = (fs::read(&a).unwrap(), fs::read(&b).unwrap());
                fs::write(a, contents.1).unwrap();
                fs::write(b, contents.0).unwrap();
            },
            "model-0000",
        ),
        (
            |f| {
                let text = fs::read_to_string(f.path(9, MANIFEST_FILE)).unwrap();
                fs::write(f.path(9, MANIFEST_FILE), text.replace("\"world_size\": 2", "\"world_size\": 3")).unwrap();
            },
            "does not name model-00001-of-00003.safetensors",
        ),
    ];
    for (damage, reason) in cases {
        let fixture = Fixture::new(2, &[5]);
        save(&fixture.checkpoints, &state(9, 2), &[(0, 10), (10, 24)]).unwrap();
        // What nobody names does no harm.
        fs::write(fixture.path(9, "model-00003-of-00003.safetensors"), "extra").unwrap();
        assert_eq!(fixture.reopened().latest_good().unwrap().unwrap().state.step, 9);
        damage(&fixture);
        let loaded = fixture.reopened().latest_good().unwrap().unwrap();
        assert_eq!(loaded.state.step, 5, "{reason}");
        assert!(loaded.skipped[0].contains(reason), "{}", loaded.skipped[0]);
        let report = fixture.reopened().verify(9).unwrap();
        let mut problems = report.problem.iter().chain(report.files.iter().filter_map(|file| file.problem.as_ref()));
        assert!(problems.any(|problem| problem.contains(reason)), "{report:?}");
    }
}

#[test]
fn values_that_are_missing_or_there_twice_are_damage() {
    for (cuts, reason) in [([(0, 10), (11, 24)], "lacks its values 10 to 11"), ([(0, 10), (9, 24)], "has its values from 9 twice")] {
        let fixture = Fixture::new(2, &[5]);
        save(&fixture.checkpoints, &state(9, 2), &cuts).unwrap();
        let loaded = fixture.latest();
        assert_eq!(loaded.state.step, 5);
        assert!(loaded.skipped[0].contains(reason), "{}", loaded.skipped[0]);
        assert!(fixture.checkpoints.verify(9).unwrap().problem.unwrap().contains(reason));
        assert_eq!(failure(fixture.checkpoints.load_step(9)).kind, FailureKind::Damaged);
    }
}

#[test]
fn nothing_usable_is_a_failure_that_lists_everything() {
    let fixture = Fixture::new(2, &[5, 9]);
    flip_last_byte(&fixture.path(5, MODEL_FILE));
    truncate(&fixture.path(9, MODEL_FILE));
    let failure = failure(fixture.checkpoints.latest_good());
    assert_eq!(failure.kind, FailureKind::Damaged);
    let found = failure.found.unwrap();
    assert!(found.contains("step-000000000005: model.safetensors has BLAKE3") && found.contains("step-000000000009: model"), "{found}");
}

#[test]
fn a_commit_needs_every_file_in_its_size() {
    type Damage = fn(&Fixture, &mut Vec<SavedFile>);
    let cases: [(Damage, &str); 4] = [
        (|f, _| fs::remove_file(f.path(3, &model_file(1, 2))).unwrap(), "model-00002-of-00002.safetensors is missing"),
        (|f, _| truncate(&f.path(3, &optimizer_file(1, 2))), "its writer says"),
        (|_, files| files.retain(|file| file.name != model_file(0, 2)), "does not name model-00001-of-00002.safetensors"),
        (|_, files| files.push(files[0].clone()), "occurs twice"),
    ];
    for (damage, reason) in cases {
        let fixture = Fixture::new(2, &[]);
        let mut files = save_shares(&fixture.checkpoints, 3, &[(0, 12), (12, 24)]);
        damage(&fixture, &mut files);
        let failure = failure(fixture.checkpoints.commit(&state(3, 2), files));
        assert_eq!(failure.kind, FailureKind::Storage);
        assert!(failure.found.unwrap().contains(reason), "{reason}");
        assert!(!fixture.path(3, MANIFEST_FILE).exists());
    }
}

#[test]
fn of_two_runs_that_save_the_same_step_one_fails() {
    let fixture = Fixture::new(2, &[]);
    let other = fixture.reopened();
    let foreign = CheckpointState { recipe_hash: "other".to_owned(), ..state(3, 1) };
    let files = save_shares(&fixture.checkpoints, 3, &[(0, 24)]);
    let same_files = save_shares(&other, 3, &[(0, 24)]);
    fixture.checkpoints.commit(&state(3, 1), files).unwrap();
    let conflict = failure(other.commit(&foreign, same_files));
    assert_eq!((conflict.kind, conflict.what.as_str()), (FailureKind::Mismatch, "another run saves its checkpoints here"));
    assert!(conflict.found.unwrap().contains("recipe recipe") && conflict.expected.unwrap().contains("recipe other"));
    assert_eq!(failure(other.is_saved(3, "other")).kind, FailureKind::Mismatch);
    assert_eq!(fixture.latest().state, state(3, 1));
}

#[test]
fn a_manifest_that_says_the_same_counts_as_saved() {
    for conditional_put in [ConditionalPut::Honoured, ConditionalPut::Ignored, ConditionalPut::Unsupported] {
        let fixture = Fixture::new(2, &[]);
        fixture.checkpoints.memory().conditional_put = Some(conditional_put);
        let saved = fixture.save(3);
        let before = fs::read(fixture.path(3, MANIFEST_FILE)).unwrap();
        assert_eq!(fixture.save(3).url, saved.url, "{conditional_put:?}");
        assert_eq!(fs::read(fixture.path(3, MANIFEST_FILE)).unwrap(), before);
        let foreign = CheckpointState { recipe_hash: "other".to_owned(), ..state(3, 1) };
        assert_eq!(failure(save(&fixture.checkpoints, &foreign, &[(0, 24)])).kind, FailureKind::Mismatch, "{conditional_put:?}");
    }
}

#[test]
fn other_workers_of_the_same_run_may_have_completed_the_step() {
    let fixture = Fixture::new(2, &[]);
    save(&fixture.checkpoints, &state(3, 2), &[(0, 12), (12, 24)]).unwrap();
    save(&fixture.reopened(), &state(3, 1), &[(0, 24)]).unwrap();
    assert_eq!(fixture.latest().state.world_size, 2);
    assert!(!fixture.path(3, MODEL_FILE).exists(), "what no manifest names goes");

    // Where theirs is damaged, ours takes its place.
    flip_last_byte(&fixture.path(3, &optimizer_file(0, 2)));
    save(&fixture.reopened(), &state(3, 1), &[(0, 24)]).unwrap();
    assert_eq!(fixture.reopened().latest_good().unwrap().unwrap().state.world_size, 1);
    assert!(!fixture.path(3, &model_file(0, 2)).exists());
}

#[test]
fn a_weak_store_is_named_and_a_sound_one_is_not() {
    let fixture = Fixture::new(2, &[]);
    assert_eq!(fixture.checkpoints.probe().unwrap(), None);
    assert_eq!(in_memory().probe().unwrap(), None);
    let cases = [(ConditionalPut::Ignored, "ignores the condition"), (ConditionalPut::Unsupported, "has no conditional writes")];
    for (conditional_put, words) in cases {
        let checkpoints = in_memory();
        checkpoints.memory().conditional_put = Some(conditional_put);
        let warning = checkpoints.probe().unwrap().unwrap();
        assert!(warning.contains(words) && warning.contains("memory:///run"), "{warning}");
    }
}

#[test]
fn old_checkpoints_are_pruned_whole() {
    let fixture = Fixture::new(2, &[1, 2, 3, 4]);
    assert_eq!(fixture.steps(), [3, 4]);
    assert!(!fixture.path(2, "").exists());
    assert_eq!(Fixture::new(0, &[1, 2, 3]).steps(), [2, 3]);
    let policy = StorePolicy { keep_best: 1, keep_every_steps: Some(3), ..StorePolicy::default() };
    let fixture = Fixture::with_policy(policy, &[1, 2, 3]);
    let temporary = CheckpointState { loss: Some(0.0), temporary: true, ..state(6, 1) };
    save(&fixture.checkpoints, &temporary, &[(0, 24)]).unwrap();
    for step in [7, 8, 9] {
        fixture.save(step);
    }
    // The loss falls with every step, so the best is among the newest.
    assert_eq!(fixture.steps(), [3, 8, 9]);
    let dry = reopened(fixture.folder.path(), StorePolicy::default()).prune_now(true, None).unwrap();
    assert_eq!(dry, [(3, Verdict::DeleteSurplus), (8, Verdict::KeepNewest), (9, Verdict::KeepNewest)]);
    assert_eq!(fixture.steps(), [3, 8, 9]);
}

#[test]
fn another_runs_checkpoints_are_never_deleted() {
    let fixture = Fixture::new(2, &[1, 2]);
    let theirs = |step: u64| CheckpointState { recipe_hash: "theirs".to_owned(), ..state(step, 1) };
    for step in [10, 11] {
        save(&fixture.checkpoints, &theirs(step), &[(0, 24)]).unwrap();
    }
    fs::create_dir_all(fixture.path(5, "")).unwrap();
    fs::write(fixture.path(5, MODEL_FILE), "half of theirs, perhaps").unwrap();
    for step in [3, 4, 12] {
        fixture.save(step);
    }
    assert_eq!(fixture.steps(), [4, 5, 10, 11, 12], "ours are the newest two of ours");
}

#[test]
fn a_checkpoint_of_a_newer_version_is_neither_passed_over_nor_touched() {
    let fixture = Fixture::new(2, &[5, 9]);
    let manifest = fs::read_to_string(fixture.path(9, MANIFEST_FILE)).unwrap().replace("\"format_version\": 2", "\"format_version\": 3");
    fs::write(fixture.path(9, MANIFEST_FILE), &manifest).unwrap();
    let other = fixture.reopened();
    let expect_newer = |error: anyhow::Error| {
        let failure = error.downcast::<Failure>().unwrap();
        assert_eq!((failure.kind, failure.found.as_deref()), (FailureKind::Mismatch, Some("format version 3")), "{failure}");
        assert!(failure.place.unwrap().ends_with("step-000000000009"));
    };
    expect_newer(other.latest_good().unwrap_err());
    expect_newer(other.load_step(9).unwrap_err());
    expect_newer(other.is_saved(9, "recipe").unwrap_err());
    expect_newer(other.prune_now(false, None).unwrap_err());
    expect_newer(save(&other, &state(9, 1), &[(0, 24)]).unwrap_err());
    assert_eq!(fs::read_to_string(fixture.path(9, MANIFEST_FILE)).unwrap(), manifest);
    assert!(other.overview().unwrap()[1].reason.as_ref().unwrap().contains("a newer version"));
    assert_eq!(other.verify(9).unwrap().problem.as_deref(), Some("a newer version of cloze has written this checkpoint"));
    assert_eq!(other.load_step(5).unwrap().state.step, 5);
}

#[test]
fn a_damaged_checkpoint_does_not_count_as_kept() {
    let fixture = Fixture::new(2, &[1, 2]);
    flip_last_byte(&fixture.path(2, MODEL_FILE));
    assert_eq!(fixture.latest().state.step, 1);
    fixture.save(3);
    assert_eq!(fixture.steps(), [1, 3]);
    fixture.save(4);
    assert_eq!(fixture.steps(), [3, 4]);
}

#[test]
fn an_interrupted_save_is_invisible_and_goes_once_it_is_old() {
    let fixture = Fixture::new(2, &[]);
    for step in [1, 3] {
        fs::create_dir_all(fixture.path(step, "")).unwrap();
        fs::write(fixture.path(step, MODEL_FILE), "half of it").unwrap();
        fs::write(fixture.path(step, ".optimizer.safetensors.77.partial"), "a quarter").unwrap();
    }
    assert_eq!(fixture.checkpoints.latest_good().unwrap(), None);
    fixture.save(2);
    assert_eq!(fixture.steps(), [2, 3]);
    assert!(!fixture.path(1, "").exists());
    assert_eq!(fixture.latest().state.step, 2);
    fixture.save(3);
    assert_eq!(fs::read_dir(fixture.path(3, "")).unwrap().count(), 4, "three files and the manifest");
    fixture.save(4);
    assert_eq!(fixture.steps(), [3, 4]);
}

#[test]
fn a_damaged_step_is_saved_again() {
    let fixture = Fixture::new(2, &[1, 2]);
    flip_last_byte(&fixture.path(2, MODEL_FILE));
    assert!(fixture.checkpoints.is_saved(2, "recipe").unwrap(), "the sizes look right");
    assert_eq!(fixture.latest().state.step, 1);
    assert!(!fixture.checkpoints.is_saved(2, "recipe").unwrap());
    assert!(!fixture.path(2, MANIFEST_FILE).exists(), "the old manifest vouches for nothing that is written now");
    fixture.save(2);
    assert_eq!((fixture.latest().state.step, fixture.steps()), (2, vec![1, 2]));

    fs::write(fixture.path(2, MANIFEST_FILE), "garbage").unwrap();
    fixture.save(2);
    assert_eq!(fixture.latest().state.step, 2);
}

#[test]
fn the_cache_serves_what_the_store_has_and_nothing_else() {
    let place = tempfile::tempdir().unwrap();
    let cache = place.path().join("cache");
    let policy = StorePolicy { cache: Some(cache.clone()), ..StorePolicy::default() };
    let fixture = Fixture::with_policy(policy.clone(), &[1, 2]);
    let cached = |step: u64, file: &str| cache.join(format!("cached-{}", key(step, file)));
    assert!(!cached(1, MODEL_FILE).exists() && cached(2, MODEL_FILE).exists() && cached(2, "config.json").exists());

    // A hit: the store's copy has the right size and is not read. The manifest is.
    flip_last_byte(&fixture.path(2, MODEL_FILE));
    check_tensors(&reopened(fixture.folder.path(), policy.clone()).latest_good().unwrap().unwrap(), 2);
    assert!(!fixture.reopened().verify(2).unwrap().is_good(), "a verification reads the store");
    flip_last_byte(&fixture.path(2, MODEL_FILE));

    // A copy that is damaged, and one that is missing, are fetched.
    flip_last_byte(&cached(2, MODEL_FILE));
    fs::remove_file(cached(2, OPTIMIZER_FILE)).unwrap();
    check_tensors(&reopened(fixture.folder.path(), policy).latest_good().unwrap().unwrap(), 2);
    assert!(fs::read(cached(2, MODEL_FILE)).unwrap() == fs::read(fixture.path(2, MODEL_FILE)).unwrap());
    assert!(cached(2, OPTIMIZER_FILE).exists());
}

#[test]
fn a_share_that_takes_too_long_is_given_up() {
    let fixture = Fixture::with_policy(StorePolicy { upload_timeout: Duration::ZERO, ..StorePolicy::default() }, &[]);
    let failure = failure(fixture.checkpoints.save_share(1, &share(1, 0, 1, (0, 24))));
    assert!(failure.what.contains("too long"), "{failure}");
}

#[test]
fn a_reserved_or_foreign_name_is_no_companion() {
    let fixture = Fixture::new(2, &[]);
    for name in [MANIFEST_FILE, MODEL_FILE, "model-00007-of-00009.safetensors", INDEX_FILE, "../escape", ".hidden", ""] {
        let mut share = share(1, 0, 1, (0, 24));
        share.companions = vec![(name.to_owned(), Bytes::new())];
        assert!(fixture.checkpoints.save_share(1, &share).is_err(), "{name}");
    }
    assert!(fixture.checkpoints.save_share(1, &share(1, 2, 2, (0, 24))).is_err());
    assert!(fixture.steps().is_empty());
}

#[test]
fn a_manifest_is_read_again_only_when_it_was_written_again() {
    let fixture = Fixture::new(2, &[1, 2]);
    let other = fixture.reopened();
    assert_eq!(other.overview().unwrap().len(), 2);
    let manifest: Manifest = other.overview().unwrap().pop().unwrap().manifest.unwrap();
    assert_eq!(manifest.state, state(2, 1));
    truncate(&fixture.path(2, MANIFEST_FILE));
    let overview = other.overview().unwrap().pop().unwrap();
    assert!(overview.manifest.is_none() && overview.reason.unwrap().contains("not readable"));
}
