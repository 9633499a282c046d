//! The folder of one run: its recipe, what it was started with, its events, logs and checkpoints.
//!
//! ```text
//! NAME/
//!   recipe.yaml     the checked recipe; the workers read it
//!   run.json        hash, data, versions, command line, host, start
//!   control.json    where the live controller can be reached, and the run's token
//!   journal.jsonl   what the coordinator needs to go on after a controller that was killed
//!   events.jsonl    everything that happened, one line each
//!   failures.jsonl  what went wrong, and how it was met
//!   tensorboard/    scalars
//!   logs/           worker-N.log
//!   processes/      worker-N.json, which process fills the slot
//!   dumps/          worker-N-PID.txt, the stacks of a process that hung
//!   audit/          worker-N.jsonl, with `train.audit_samples`
//!   checkpoints/    unless the recipe names another place
//!   lock            held by the live controller, with its process id
//! ```

mod control;
mod files;
mod paths;

use std::ffi::{OsStr, OsString};
use std::fs::{self, DirEntry, File, OpenOptions, TryLockError};
use std::io::{self, Read, Seek as _, Write as _};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::Context as _;
use cloze_cluster::host::host_name;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::Recipe;
use serde::{Deserialize, Serialize};

pub use control::{ControlFile, TlsKeys};
pub(crate) use files::{READABLE, remove_if_there, storage, write_whole};
pub use paths::RunPaths;
use paths::no_run;

/// Name of the lock file; a folder that holds nothing else counts as empty.
const LOCK_FILE: &str = "lock";

/// Longest lock text that is read back, in bytes; a process id has at most ten digits.
const MAX_LOCK_BYTES: u64 = 64;

/// How often the lock is tried: `cloze status` and `cloze watch` hold it for an instant to see whether a controller lives.
const LOCK_TRIES: u32 = 10;

/// Wait between two tries, in milliseconds.
const LOCK_RETRY_MS: u64 = 10;

/// Longest wait for `git rev-parse`; a repository on a hanging network mount must not hold up a run.
const GIT_TIMEOUT_MS: u64 = 1_500;

/// Interval at which the end of `git rev-parse` is looked for.
const GIT_POLL_MS: u64 = 5;

/// What a new run is made of.
#[derive(Clone, Debug)]
pub struct NewRun<'a> {
    /// Name of the run and of its folder; usually the recipe's name.
    pub name: &'a str,
    /// The checked recipe.
    pub recipe: &'a Recipe,
    /// Fingerprint of the prepared data.
    pub data_fingerprint: String,
    /// The command line, program first.
    pub command_line: Vec<String>,
    /// Build of the worker binary.
    pub worker_build: String,
}

/// What `run.json` says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunInfo {
    /// Name of the run.
    pub name: String,
    /// Hash of its recipe.
    pub recipe_hash: String,
    /// Fingerprint of its prepared data.
    pub data_fingerprint: String,
    /// Version of `cloze` that made the folder.
    pub cloze_version: String,
    /// Build of the worker binary.
    pub worker_build: String,
    /// Git revision of the folder in which the command ran; `None` outside a repository.
    pub git_revision: Option<String>,
    /// The command line, program first.
    pub command_line: Vec<String>,
    /// Host of the controller.
    pub host: String,
    /// Process id of the controller.
    pub process_id: u32,
    /// Unix time of the start, in seconds.
    pub started: f64,
}

/// A run folder that this process controls: no other process can open it until this value is dropped.
#[derive(Debug)]
pub struct RunFolder {
    paths: RunPaths,
    info: RunInfo,
    /// The operating system releases the lock when the process ends, however it ends.
    _lock: File,
}

impl RunFolder {
    /// Makes `root/name`; a folder in which an earlier start was cut off serves as well. Fails with kind `Recipe` when the folder holds
    /// a run or anything else, with kind `Run` when another live process controls it, and with kind `Storage` when it cannot be written.
    pub fn create(root: &Path, new: &NewRun<'_>) -> anyhow::Result<Self> {
        let path = root.join(new.name);
        fs::create_dir_all(&path).map_err(|error| storage("create the run folder", &path, &error))?;
        let paths = RunPaths::find(&path)?;
        let path = paths.root();
        // A folder that never held a run gets no lock file from us.
        if let Some(entry) = first_entry(path, |_| Ok(false))?.filter(|_| !path.join(LOCK_FILE).exists()) {
            return Err(taken(path, &entry).into());
        }
        let lock = acquire_lock(path)?;
        if let Some(entry) = first_entry(path, |entry| is_of_a_start(&paths, entry))? {
            return Err(taken(path, &entry).into());
        }
        let checkpoints = new.recipe.checkpoint.url.is_none().then(|| paths.checkpoints());
        for folder in paths.folders().into_iter().chain(checkpoints) {
            fs::create_dir_all(&folder).map_err(|error| storage("create a folder", &folder, &error))?;
        }
        let info = RunInfo {
            name: new.name.to_owned(),
            recipe_hash: new.recipe.hash(),
            data_fingerprint: new.data_fingerprint.clone(),
            cloze_version: env!("CARGO_PKG_VERSION").to_owned(),
            worker_build: new.worker_build.clone(),
            git_revision: git_revision(),
            command_line: new.command_line.clone(),
            host: host_name(),
            process_id: std::process::id(),
            started: SystemTime::now().duration_since(UNIX_EPOCH).context("read the time of day")?.as_secs_f64(),
        };
        write_whole(&paths.recipe(), new.recipe.to_yaml().as_bytes(), READABLE)?;
        // run.json comes last: a folder with it is complete.
        write_whole(&paths.info(), &serde_json::to_vec_pretty(&info).context("serialise run.json")?, READABLE)?;
        Ok(Self { paths, info, _lock: lock })
    }

    /// Fails as [`RunFolder::create`] does where this folder cannot become that of a new run; nothing is made or written.
    pub fn check_free(path: &Path) -> anyhow::Result<()> {
        if !path.exists() {
            return Ok(());
        }
        let paths = RunPaths::find(path)?;
        let lock_path = paths.root().join(LOCK_FILE);
        if !lock_path.exists() {
            let entry = first_entry(paths.root(), |_| Ok(false))?;
            return entry.map_or(Ok(()), |entry| Err(taken(paths.root(), &entry).into()));
        }
        let mut lock = File::open(&lock_path).map_err(|error| storage("open the run folder's lock", &lock_path, &error))?;
        match lock.try_lock_shared() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(held(paths.root(), &mut lock).into()),
            Err(TryLockError::Error(error)) => return Err(storage("look at the run folder's lock", &lock_path, &error).into()),
        }
        let entry = first_entry(paths.root(), |entry| is_of_a_start(&paths, entry))?;
        entry.map_or(Ok(()), |entry| Err(taken(paths.root(), &entry).into()))
    }

    /// Opens an existing run to resume it. Fails with kind `Input` when there is none, with kind `Mismatch` when its recipe was
    /// changed, and with kind `Run` when another live process controls it.
    pub fn open(dir: &Path) -> anyhow::Result<(Self, Recipe)> {
        let paths = RunPaths::find(dir)?;
        let info = read_info(&paths)?;
        let lock = acquire_lock(paths.root())?;
        let recipe = read_recipe(&paths, &info)?;
        for folder in paths.folders() {
            fs::create_dir_all(&folder).map_err(|error| storage("create a folder", &folder, &error))?;
        }
        Ok((Self { paths, info, _lock: lock }, recipe))
    }

    /// Keeps a recipe of the same hash in the place of the run's: one that is operated otherwise. Fails with kind
    /// `Mismatch` on another recipe, and with kind `Storage` when it cannot be written.
    pub fn keep_recipe(&self, recipe: &Recipe) -> anyhow::Result<()> {
        let path = self.paths.recipe();
        let (expected, found) = (&self.info.recipe_hash, recipe.hash());
        if *expected != found {
            let failure = Failure::new(FailureKind::Mismatch, "this is not the recipe of the run").at(path.display());
            return Err(failure.expected(format!("recipe hash {expected}")).found(format!("recipe hash {found}")).into());
        }
        let text = recipe.to_yaml();
        if fs::read(&path).is_ok_and(|kept| kept == text.as_bytes()) {
            return Ok(());
        }
        write_whole(&path, text.as_bytes(), READABLE)
    }

    /// The folder, absolute.
    pub fn path(&self) -> &Path {
        self.paths.root()
    }

    /// Its files.
    pub fn paths(&self) -> &RunPaths {
        &self.paths
    }

    /// What `run.json` says.
    pub fn info(&self) -> &RunInfo {
        &self.info
    }
}

/// Reads what a run was started with. Fails with kind `Input` when there is no run, and with kind `Damaged` when its file is not whole.
pub fn read_info(paths: &RunPaths) -> Result<RunInfo, Failure> {
    let path = paths.info();
    let text = fs::read(&path).map_err(|error| no_run(&path, &error))?;
    serde_json::from_slice(&text)
        .map_err(|error| Failure::new(FailureKind::Damaged, "run.json cannot be read").at(path.display()).because(error))
}

/// Reads the recipe of a run. Fails with kind `Mismatch` when it was changed since the run's start.
pub fn read_recipe(paths: &RunPaths, info: &RunInfo) -> anyhow::Result<Recipe> {
    let path = paths.recipe();
    let recipe = cloze_recipes::load(&path, &[])?;
    let hash = recipe.hash();
    if hash != info.recipe_hash {
        return Err(Failure::new(FailureKind::Mismatch, "the run's recipe was changed after its start")
            .at(path.display())
            .expected(format!("recipe hash {}", info.recipe_hash))
            .found(format!("recipe hash {hash}"))
            .hint("put the old recipe.yaml back, or start a new run with the changed one")
            .into());
    }
    Ok(recipe)
}

fn taken(path: &Path, entry: &OsStr) -> Failure {
    let is_run = path.join("run.json").exists();
    let what = if is_run { "this run already exists" } else { "the run folder is not empty" };
    let found = if is_run { "run.json of an earlier run".to_owned() } else { entry.display().to_string() };
    let resume = format!("`cloze resume {}` goes on with it; `--run OTHER` starts a run of another name", path.display());
    Failure::new(FailureKind::Recipe, what).at(path.display()).expected("an empty or missing folder").found(found).hint(if is_run {
        resume
    } else {
        "`--run OTHER` starts a run of another name".to_owned()
    })
}

/// Takes the folder's lock and writes this process's id into it.
fn acquire_lock(folder: &Path) -> anyhow::Result<File> {
    let path = folder.join(LOCK_FILE);
    let opened = OpenOptions::new().read(true).write(true).create(true).truncate(false).open(&path);
    let mut file = opened.map_err(|error| storage("open the run folder's lock", &path, &error))?;
    let mut tries = 1;
    while let Err(error) = file.try_lock() {
        match error {
            TryLockError::WouldBlock if tries < LOCK_TRIES => sleep(Duration::from_millis(LOCK_RETRY_MS)),
            TryLockError::WouldBlock => return Err(held(folder, &mut file).into()),
            TryLockError::Error(error) => return Err(storage("lock the run folder", &path, &error).into()),
        }
        tries += 1;
    }
    let written = file.set_len(0).and_then(|()| file.rewind()).and_then(|()| writeln!(file, "{}", std::process::id()));
    written.map_err(|error| storage("write the run folder's lock", &path, &error))?;
    Ok(file)
}

fn held(folder: &Path, file: &mut File) -> Failure {
    let mut text = String::new();
    let owner = match Read::by_ref(file).take(MAX_LOCK_BYTES).read_to_string(&mut text) {
        Ok(_) if !text.trim().is_empty() => format!("process {}", text.trim()),
        // The owner has locked the file and not yet written its id.
        _ => "another process".to_owned(),
    };
    Failure::new(FailureKind::Run, "another live process controls this run")
        .at(folder.display())
        .found(owner)
        .hint("wait for it, or stop it with Ctrl-C in its terminal; `cloze resume` then goes on")
}

/// Some entry of the folder that is not ours.
fn first_entry(path: &Path, is_ours: impl Fn(&DirEntry) -> io::Result<bool>) -> anyhow::Result<Option<OsString>> {
    let failed = |error: io::Error| storage("list the run folder", path, &error);
    for entry in fs::read_dir(path).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        if !is_ours(&entry).map_err(failed)? {
            return Ok(Some(entry.file_name()));
        }
    }
    Ok(None)
}

/// Whether a start leaves this behind that is cut off before it has written run.json. All of it is written anew.
fn is_of_a_start(paths: &RunPaths, entry: &DirEntry) -> io::Result<bool> {
    let (path, kind) = (entry.path(), entry.file_type()?);
    if kind.is_dir() {
        let is_known = path == paths.checkpoints() || paths.folders().contains(&path);
        return Ok(is_known && fs::read_dir(&path)?.next().is_none());
    }
    let is_partial = path.extension().is_some_and(|extension| extension == "partial");
    Ok(kind.is_file() && (is_partial || path == paths.recipe() || entry.file_name() == LOCK_FILE))
}

/// The revision of the repository around the current folder, if git and a repository are there.
fn git_revision() -> Option<String> {
    let mut git = Command::new("git");
    git.args(["rev-parse", "HEAD"]).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::null());
    let mut child = git.spawn().ok()?;
    let deadline = Instant::now() + Duration::from_millis(GIT_TIMEOUT_MS);
    let status = loop {
        match child.try_wait() {
            Ok(Some(status)) => break status,
            Ok(None) if Instant::now() < deadline => sleep(Duration::from_millis(GIT_POLL_MS)),
            Ok(None) | Err(_) => {
                // It may have ended by itself just now; either way it is gone after this.
                let _ = child.kill();
                let _ = child.wait();
                return None;
            }
        }
    };
    let mut revision = String::new();
    child.stdout.take()?.take(MAX_LOCK_BYTES).read_to_string(&mut revision).ok()?;
    let revision = revision.trim();
    (status.success() && !revision.is_empty()).then(|| revision.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::recipe;

    fn new_run(recipe: &Recipe) -> NewRun<'_> {
        NewRun {
            name: "first",
            recipe,
            data_fingerprint: "data".to_owned(),
            command_line: vec!["cloze".to_owned(), "train".to_owned()],
            worker_build: "build".to_owned(),
        }
    }

    fn failure(result: anyhow::Result<RunFolder>) -> Failure {
        result.unwrap_err().downcast().unwrap()
    }

    #[test]
    fn a_new_folder_is_complete() {
        let root = tempfile::tempdir().unwrap();
        let recipe = recipe();
        let folder = RunFolder::create(root.path(), &new_run(&recipe)).unwrap();
        assert_eq!(folder.path(), root.path().join("first"));
        let info: RunInfo = serde_json::from_slice(&fs::read(folder.paths().info()).unwrap()).unwrap();
        assert_eq!(&info, folder.info());
        assert_eq!((info.name.as_str(), info.recipe_hash), ("first", recipe.hash()));
        assert_eq!(info.process_id, std::process::id());
        for path in [folder.paths().recipe(), folder.paths().tensorboard(), folder.path().join("logs"), folder.paths().checkpoints()] {
            assert!(path.exists(), "{}", path.display());
        }
        assert!(!folder.path().join("run.partial").exists());
        let mut elsewhere = recipe.clone();
        elsewhere.checkpoint.url = Some("s3://bucket/first".to_owned());
        let folder = RunFolder::create(root.path(), &NewRun { name: "second", ..new_run(&elsewhere) }).unwrap();
        assert!(folder.paths().recipe().exists() && !folder.paths().checkpoints().exists());
    }

    #[test]
    fn an_existing_run_is_not_overwritten() {
        let root = tempfile::tempdir().unwrap();
        let recipe = recipe();
        drop(RunFolder::create(root.path(), &new_run(&recipe)).unwrap());
        let failure = failure(RunFolder::create(root.path(), &new_run(&recipe)));
        assert_eq!(failure.kind, FailureKind::Recipe);
        assert_eq!(failure.what, "this run already exists");
        assert!(failure.hint.unwrap().starts_with("`cloze resume "));
    }

    #[test]
    fn a_folder_of_something_else_is_left_alone() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("first")).unwrap();
        fs::write(root.path().join("first").join("thesis.tex"), "x").unwrap();
        let failure = failure(RunFolder::create(root.path(), &new_run(&recipe())));
        assert_eq!((failure.what.as_str(), failure.found.as_deref()), ("the run folder is not empty", Some("thesis.tex")));
        assert_eq!(fs::read_dir(root.path().join("first")).unwrap().count(), 1);
    }

    #[test]
    fn a_start_that_was_cut_off_is_done_again() {
        let root = tempfile::tempdir().unwrap();
        let recipe = recipe();
        let path = root.path().join("first");
        let cut_off = || {
            drop(RunFolder::create(root.path(), &new_run(&recipe)).unwrap());
            fs::remove_file(path.join("run.json")).unwrap();
            fs::write(path.join("run.partial"), "{").unwrap();
        };
        cut_off();
        // Another recipe may be given the second time.
        fs::write(path.join("recipe.yaml"), "old").unwrap();
        cut_off();
        assert_eq!(cloze_recipes::load(&path.join("recipe.yaml"), &[]).unwrap(), recipe);

        fs::write(path.join("logs").join("worker-0.log"), "x").unwrap();
        let in_use = failure(RunFolder::create(root.path(), &new_run(&recipe)));
        assert_eq!((in_use.what.as_str(), in_use.found.as_deref()), ("the run folder is not empty", Some("logs")));

        // Without our lock the recipe is the user's own.
        let own = tempfile::tempdir().unwrap();
        fs::create_dir(own.path().join("first")).unwrap();
        fs::write(own.path().join("first").join("recipe.yaml"), "mine").unwrap();
        let foreign = failure(RunFolder::create(own.path(), &new_run(&recipe)));
        assert_eq!(foreign.found.as_deref(), Some("recipe.yaml"));
        assert_eq!(fs::read_to_string(own.path().join("first").join("recipe.yaml")).unwrap(), "mine");
    }

    #[test]
    fn a_live_controller_is_named() {
        let root = tempfile::tempdir().unwrap();
        let recipe = recipe();
        let folder = RunFolder::create(root.path(), &new_run(&recipe)).unwrap();
        let failure = failure(RunFolder::create(root.path(), &new_run(&recipe)));
        assert_eq!(failure.what, "another live process controls this run");
        assert_eq!(failure.found, Some(format!("process {}", std::process::id())));
        drop(folder);
    }

    #[test]
    fn a_run_is_resumed_with_its_recipe() {
        let root = tempfile::tempdir().unwrap();
        let recipe = recipe();
        let created = RunFolder::create(root.path(), &new_run(&recipe)).unwrap();
        let (path, info) = (created.path().to_owned(), created.info().clone());
        drop(created);
        let (opened, read_back) = RunFolder::open(&path).unwrap();
        assert_eq!((opened.info(), read_back), (&info, recipe));
        drop(opened);

        let recipe_path = path.join("recipe.yaml");
        let changed = fs::read_to_string(&recipe_path).unwrap().replace("learning_rate: 0.001", "learning_rate: 0.002");
        fs::write(&recipe_path, changed).unwrap();
        let failure = failure(RunFolder::open(&path).map(|(folder, _)| folder));
        assert_eq!((failure.kind, failure.expected), (FailureKind::Mismatch, Some(format!("recipe hash {}", info.recipe_hash))));
    }

    #[test]
    fn a_folder_without_a_run_cannot_be_resumed() {
        let root = tempfile::tempdir().unwrap();
        let failure = failure(RunFolder::open(root.path()).map(|(folder, _)| folder));
        assert_eq!((failure.kind, failure.what.as_str()), (FailureKind::Input, "this folder holds no run"));
        fs::write(root.path().join("run.json"), "{").unwrap();
        let failure = RunFolder::open(root.path()).unwrap_err().downcast::<Failure>().unwrap();
        assert_eq!(failure.kind, FailureKind::Damaged);
    }
}
