//! The records of a sweep's trials: in the study folder, and where `--journal` says so in a bucket too, so that the controller can be
//! started again on another machine. This process is the one that writes them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::Context as _;
use cloze_data::store::{self, Store};
use cloze_recipes::failure::{Failure, FailureKind};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::folder::{StudyFolder, StudyInfo, SweepPlan, read_bounded};
use super::lease::{Home, Lease, MAX_CLOCK_SKEW_S};
use super::lock::{FileLock, Taken};
use super::record::{MAX_RECORD_BYTES, TrialRecord, TrialState};
use super::time::unix_now_s;
use crate::run_folder::{READABLE, write_whole};

/// Largest object with the recipes of all trials, in bytes; one has some three thousand.
const MAX_RECIPES_BYTES: u64 = 256 << 20;

/// Largest of the other objects, in bytes.
const MAX_OBJECT_BYTES: u64 = 64 << 20;

/// Object with the recipes of all trials, by hash.
const RECIPES: &str = "recipes.json";

/// File and object with what was asked for.
const INFO: &str = "study.json";

/// File and object with how the trials are run.
const PLAN: &str = "sweep.json";

/// The journal of a sweep, held by this process until the value is dropped.
pub struct Journal {
    folder: StudyFolder,
    remote: Option<Remote>,
    /// Trials that are out; `None` before the records were read.
    outs: Option<BTreeSet<String>>,
    /// Whether trials run on this machine, where they live by the lease.
    is_here: bool,
    _lock: FileLock,
}

struct Remote {
    store: Store,
    lease: Lease,
}

impl Journal {
    /// Opens the journal of a study folder. Fails with kind `Run` where another live controller has it.
    pub fn open(folder: &StudyFolder, url: Option<&str>, now: f64) -> anyhow::Result<Self> {
        let lock = lock(folder)?;
        let home = Home::of(&folder.lock_path())?;
        let remote = url.map(|url| Remote::open(url, home, now)).transpose()?;
        Ok(Self { folder: folder.clone(), remote, outs: None, is_here: false, _lock: lock })
    }

    /// The folder.
    pub fn folder(&self) -> &StudyFolder {
        &self.folder
    }

    /// The study whose journal is in the bucket; `None` where there is none.
    pub fn remote_info(&self) -> anyhow::Result<Option<StudyInfo>> {
        self.remote_json(INFO)
    }

    /// How the trials of the study in the bucket are run; `None` where there is none.
    pub fn remote_plan(&self) -> anyhow::Result<Option<SweepPlan>> {
        self.remote_json(PLAN)
    }

    fn remote_json<T: DeserializeOwned>(&self, name: &str) -> anyhow::Result<Option<T>> {
        let Some(Remote { store, .. }) = &self.remote else { return Ok(None) };
        if store::size_of(store, name)?.is_none() {
            return Ok(None);
        }
        let bytes = store::read_all(store, name, MAX_OBJECT_BYTES)?;
        let value = serde_json::from_slice(&bytes).map_err(|error| {
            Failure::new(FailureKind::Damaged, "the study of a journal cannot be read").at(store.url(name)).because(error)
        })?;
        Ok(Some(value))
    }

    /// Writes what was asked for, in the bucket and here.
    pub fn write_info(&self, info: &StudyInfo) -> anyhow::Result<()> {
        self.write_both(INFO, info)
    }

    /// Writes how the trials are run, in the bucket and here.
    pub fn write_plan(&mut self, plan: &SweepPlan) -> anyhow::Result<()> {
        self.write_both(PLAN, plan)?;
        self.settle(plan);
        Ok(())
    }

    /// Takes note of where the trials run from now on.
    pub fn settle(&mut self, plan: &SweepPlan) {
        self.is_here = !plan.ends_whole();
    }

    /// Writes a file of the study: into the bucket first, since whoever opens the study later believes that one.
    fn write_both(&self, name: &str, value: &impl Serialize) -> anyhow::Result<()> {
        if let Some(Remote { store, .. }) = &self.remote {
            store::put(store, name, serde_json::to_vec_pretty(value).context("serialise a file of the study")?)?;
        }
        StudyFolder::write_json(&self.folder.root().join(name), value)
    }

    /// Puts the study itself into the bucket: the part that names it last, and only where there is none. Fails with kind `Run` where another
    /// controller has put one there meanwhile.
    pub fn publish(&mut self, recipes: &BTreeMap<String, String>, plan: &SweepPlan, info: &StudyInfo) -> anyhow::Result<()> {
        // A process that stood still until its lease was over must not write into the study of whoever has come after it.
        self.renew(unix_now_s())?;
        let Some(Remote { store, .. }) = &self.remote else { return Ok(()) };
        store::put(store, RECIPES, serde_json::to_vec(recipes).context("serialise the recipes")?)?;
        store::put(store, PLAN, serde_json::to_vec_pretty(plan).context("serialise a plan")?)?;
        if store::put_if_absent(store, INFO, serde_json::to_vec_pretty(info).context("serialise a study")?)? {
            return Ok(());
        }
        match self.remote_info()? {
            Some(found) if (&found.hash, &found.key) == (&info.hash, &info.key) => Ok(()),
            _ => Err(Failure::new(FailureKind::Run, "another controller has made a study there meanwhile")
                .at(store.url(INFO))
                .hint("the same command again goes on with that study where it is the same, once its controller has left")
                .into()),
        }
    }

    /// Where the journal lies, for people.
    pub fn shown(&self) -> String {
        let folder = || self.folder.root().display().to_string();
        self.remote.as_ref().map_or_else(folder, |remote| remote.store.display_url.clone())
    }

    /// The records that there are, by hash, and what is odd about them. Those of the bucket win.
    pub fn records(&mut self, plan: &SweepPlan, now: f64) -> anyhow::Result<(BTreeMap<String, TrialRecord>, Vec<String>)> {
        let mut records = read_records(&self.folder, plan)?;
        if let Some(Remote { store, .. }) = &self.remote {
            for record in remote_records(store)? {
                write_record(&self.folder, &record)?;
                records.insert(record.hash.clone(), record);
            }
        }
        self.settle(plan);
        self.outs = Some(records.values().filter(|record| is_out(record)).map(|record| record.hash.clone()).collect());
        let ahead = records.values().filter(|record| record.updated > now + MAX_CLOCK_SKEW_S);
        let odd = ahead.map(|record| {
            let ahead_s = record.updated - now;
            format!("the record of {} is {ahead_s:.0} s from the future; are the clocks of the hosts set?", record.name)
        });
        let odd = odd.collect();
        Ok((records, odd))
    }

    /// Writes a record: into the bucket first, since whoever takes over believes that one. Fails with kind `Run` where another controller
    /// has taken over meanwhile: what this one knows is older.
    pub fn write(&mut self, record: &TrialRecord) -> anyhow::Result<()> {
        self.renew(unix_now_s())?;
        let outs = self.outs.get_or_insert_default();
        // Where the writing fails it is not known what others believe.
        if is_out(record) {
            outs.insert(record.hash.clone());
        }
        if let Some(Remote { store, .. }) = &self.remote {
            store::put(store, &record_key(&record.hash), serde_json::to_vec_pretty(record).context("serialise a record")?)?;
        }
        write_record(&self.folder, record)?;
        if !is_out(record) {
            self.outs.get_or_insert_default().remove(&record.hash);
        }
        Ok(())
    }

    /// Keeps what others see of this controller alive.
    pub fn renew(&mut self, now: f64) -> anyhow::Result<()> {
        self.remote.as_mut().map_or(Ok(()), |remote| remote.lease.renew(now))
    }

    /// Leaves the journal to the next controller; while trials of this machine are out, only to one in this folder.
    pub fn close(mut self) -> anyhow::Result<()> {
        self.give_back()
    }

    /// Gives the lease back. What is out on this machine lives by it, and must have ended before another host has the study: then it is
    /// kept, until it is over by itself.
    fn give_back(&mut self) -> anyhow::Result<()> {
        let Some(Remote { lease, .. }) = self.remote.take() else { return Ok(()) };
        let is_needed = match &self.outs {
            Some(outs) => self.is_here && !outs.is_empty(),
            None => lease.follows(),
        };
        if is_needed { Ok(()) } else { lease.release() }
    }
}

fn is_out(record: &TrialRecord) -> bool {
    record.state == TrialState::Training
}

impl Drop for Journal {
    /// Also a controller that fails leaves its lease to the next one, if it can.
    fn drop(&mut self) {
        if let Err(error) = self.give_back() {
            tracing::warn!(error = format!("{error:#}"), "the lease of the journal could not be given back; it is over by itself");
        }
    }
}

impl Remote {
    fn open(url: &str, home: Home, now: f64) -> anyhow::Result<Self> {
        let store = store::open(url, &BTreeMap::new())?;
        let lease = Lease::take(&store, home, now)?;
        Ok(Self { store, lease })
    }
}

/// Takes the lock of a study.
fn lock(folder: &StudyFolder) -> Result<FileLock, Failure> {
    match FileLock::take(&folder.lock_path())? {
        Taken::Ours(lock) => Ok(lock),
        Taken::Held(holder) => Err(Failure::new(FailureKind::Run, "another live controller has this sweep")
            .at(folder.root().display())
            .found(holder)
            .hint("`cloze sweep status` says how it is; `cloze sweep cancel` or Ctrl-C in its terminal ends it")),
    }
}

/// What a bucket says of its study, besides the plan.
pub struct Restored {
    /// Recipes of the trials, by hash.
    pub recipes: BTreeMap<String, String>,
    /// The text of `study.json`, which comes last into the folder.
    pub info: Vec<u8>,
}

/// Brings the plan of a study from its bucket into a folder, and returns the rest.
pub fn restore(folder: &StudyFolder, url: &str) -> anyhow::Result<Restored> {
    let store = store::open(url, &BTreeMap::new())?;
    if store::size_of(&store, INFO)?.is_none() {
        return Err(Failure::new(FailureKind::Input, "this place holds no journal of a sweep")
            .at(&store.display_url)
            .hint("`cloze sweep run RECIPE --journal URL` makes one")
            .into());
    }
    folder.make()?;
    let recipes = store::read_all(&store, RECIPES, MAX_RECIPES_BYTES)?;
    let recipes: BTreeMap<String, String> = serde_json::from_slice(&recipes).map_err(|error| {
        Failure::new(FailureKind::Damaged, "the recipes of a journal cannot be read").at(store.url(RECIPES)).because(error)
    })?;
    write_whole(&folder.plan_path(), &store::read_all(&store, PLAN, MAX_OBJECT_BYTES)?, READABLE)?;
    Ok(Restored { recipes, info: store::read_all(&store, INFO, MAX_OBJECT_BYTES)?.to_vec() })
}

/// The records of a study folder, without controlling it.
pub fn read_records(folder: &StudyFolder, plan: &SweepPlan) -> anyhow::Result<BTreeMap<String, TrialRecord>> {
    let mut records = BTreeMap::new();
    for trial in &plan.trials {
        let path = folder.record_path(&trial.hash);
        if let Some(bytes) = read_bounded(&path)? {
            records.insert(trial.hash.clone(), TrialRecord::parse(&bytes, &trial.hash, &shown(&path))?);
        }
    }
    Ok(records)
}

fn remote_records(store: &Store) -> anyhow::Result<Vec<TrialRecord>> {
    let mut records = Vec::new();
    for info in store::list_below(store, "trials")? {
        let name = info.key.rsplit('/').next().and_then(|name| name.strip_suffix(".json"));
        if let Some(hash) = name {
            let bytes = store::read_all(store, &info.key, MAX_RECORD_BYTES)?;
            records.push(TrialRecord::parse(&bytes, hash, &store.url(&info.key))?);
        }
    }
    Ok(records)
}

fn record_key(hash: &str) -> String {
    format!("trials/{hash}.json")
}

/// Writes a record into the study folder.
pub(super) fn write_record(folder: &StudyFolder, record: &TrialRecord) -> anyhow::Result<()> {
    StudyFolder::write_json(&folder.record_path(&record.hash), record)
}

fn shown(path: &Path) -> String {
    path.display().to_string()
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::super::fixtures;
    use super::super::lease::LEASE_S;
    use super::*;

    #[test]
    fn a_plan_that_the_bucket_does_not_take_is_not_in_the_folder_either() {
        let [root, bucket] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let folder = StudyFolder::new(root.path().to_owned());
        folder.make().unwrap();
        let mut journal = Journal::open(&folder, Some(&bucket.path().display().to_string()), 1000.0).unwrap();
        // A folder of the plan's name takes no file.
        fs::create_dir_all(bucket.path().join(PLAN).join("inside")).unwrap();
        assert!(journal.write_plan(&fixtures::plan(Vec::new())).is_err());
        assert!(!folder.plan_path().exists());
        fs::remove_dir_all(bucket.path().join(PLAN)).unwrap();
        journal.write_plan(&fixtures::plan(Vec::new())).unwrap();
        assert_eq!(journal.remote_plan().unwrap().unwrap(), folder.plan().unwrap());
    }

    #[test]
    fn the_lease_is_kept_while_a_trial_of_this_machine_is_out() {
        let bucket = tempfile::tempdir().unwrap();
        let url = bucket.path().display().to_string();
        let trials = vec![fixtures::trial("aa")];
        let out = TrialRecord { state: TrialState::Training, ..TrialRecord::new(&trials[0], None) };
        let [here, there] = [(); 2].map(|()| tempfile::tempdir().unwrap());
        let open = |root: &Path| {
            let folder = StudyFolder::new(root.to_owned());
            folder.make().unwrap();
            Journal::open(&folder, Some(&url), unix_now_s())
        };
        let refused = || open(there.path()).err().map(|error| error.downcast::<Failure>().unwrap().kind);
        let plan = fixtures::plan(trials.clone());
        let mut journal = open(here.path()).unwrap();
        journal.records(&plan, 0.0).unwrap();
        journal.write(&out).unwrap();
        drop(journal);
        assert_eq!(refused(), Some(FailureKind::Run), "it may train on");
        // In this folder its trials are known, so nobody waits; one that fails before it has read them leaves it as it was.
        drop(open(here.path()).unwrap());
        assert_eq!(refused(), Some(FailureKind::Run), "it may still train on");
        let mut next = open(here.path()).unwrap();
        next.records(&plan, 0.0).unwrap();
        // Jobs of a batch system have their own end.
        next.settle(&SweepPlan { site: Some(fixtures::site("mine", "kind: slurm")), ..plan.clone() });
        next.close().unwrap();
        let mut third = open(there.path()).unwrap();
        third.records(&plan, 0.0).unwrap();
        third.write(&TrialRecord::new(&trials[0], None)).unwrap();
        third.close().unwrap();
        assert!(open(here.path()).is_ok(), "nothing is out");
    }

    #[test]
    fn a_study_is_made_once_whoever_stood_still_meanwhile() {
        let [here, there, bucket] = [(); 3].map(|()| tempfile::tempdir().unwrap());
        let url = bucket.path().display().to_string();
        let info = |key: &str| -> StudyInfo {
            let text = serde_json::json!({
                "version": 1, "name": "demo", "file": "demo.yaml", "profile": null, "overrides": [], "hash": "ab", "key": key,
                "expected": null, "metric": {"task": null, "score": "loss"}, "keys": [], "created": 1.0,
            });
            serde_json::from_value(text).unwrap()
        };
        let open = |root: &Path, now| {
            let folder = StudyFolder::new(root.to_owned());
            folder.make().unwrap();
            Journal::open(&folder, Some(&url), now).unwrap()
        };
        let (plan, now) = (fixtures::plan(Vec::new()), unix_now_s());
        // The first has a lease that is over for the second.
        let mut first = open(here.path(), now - 2.0 * LEASE_S);
        let mut second = open(there.path(), now);
        second.publish(&BTreeMap::new(), &plan, &info("second")).unwrap();
        let lost: Failure = first.publish(&BTreeMap::new(), &plan, &info("first")).unwrap_err().downcast().unwrap();
        assert_eq!((lost.kind, lost.what.as_str()), (FailureKind::Run, "another controller has taken this sweep over"));
        // Once more is nothing new; a study under another key is another one.
        second.publish(&BTreeMap::new(), &plan, &info("second")).unwrap();
        let made: Failure = second.publish(&BTreeMap::new(), &plan, &info("first")).unwrap_err().downcast().unwrap();
        assert_eq!((made.kind, made.what.as_str()), (FailureKind::Run, "another controller has made a study there meanwhile"));
        assert_eq!(second.remote_info().unwrap().unwrap().key, "second");
    }
}
