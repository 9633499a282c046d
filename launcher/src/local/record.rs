//! Which process fills a slot, written down so that a later controller finds it again.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context as _;
use cloze_cluster::host::host_name;
use cloze_recipes::failure::{Failure, FailureKind};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, getpgid, kill_process, kill_process_group};
use serde::{Deserialize, Serialize};

use crate::run_folder::{READABLE, RunPaths, remove_if_there, storage, write_whole};

/// Place of the start time in `/proc/PID/stat` behind the program's name: it is field 22, and the name is field 2.
const START_TICKS_PLACE: usize = 19;

/// That of the session, which is field 6.
const SESSION_PLACE: usize = 3;

/// One file of `processes/`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ProcessRecord {
    /// The slot.
    pub worker: u32,
    /// Slots of the run when the process started.
    pub slots: u32,
    /// The process.
    pub process_id: u32,
    /// Its start, in clock ticks since the host's; with the process id it names one process, however often the id is used again.
    pub start_ticks: u64,
    /// Its host.
    pub host: String,
    /// Hash of the whole recipe with which it was started.
    #[serde(default, alias = "layout")]
    pub recipe_hash: String,
    /// Whether `cloze join` started it, and not the controller.
    pub by_join: bool,
    /// Where its part of the log begins, in bytes.
    pub log_start: u64,
}

/// What `/proc` says about a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stat {
    state: char,
    session: u32,
    start_ticks: u64,
}

impl ProcessRecord {
    /// Writes the record whole.
    pub(super) fn write(&self, paths: &RunPaths) -> anyhow::Result<()> {
        let text = serde_json::to_vec(self).context("serialise a process record")?;
        write_whole(&paths.process(self.worker), &text, READABLE)
    }

    /// Removes the record of a slot.
    pub(super) fn remove(paths: &RunPaths, worker: u32) -> anyhow::Result<()> {
        let path = paths.process(worker);
        remove_if_there(&path).map_err(|error| storage("remove a process record", &path, &error).into())
    }

    /// Whether this very process still runs. One that has ended and that nobody has asked about does not run any more; one that cannot
    /// be looked at, for instance for want of file descriptors, counts as alive.
    pub(super) fn is_alive(&self) -> bool {
        self.look().unwrap_or_else(|error| {
            tell_unreadable(self.process_id, &error);
            true
        })
    }

    /// Sends a signal to this very process; does nothing when it has ended. Where it cannot be looked at, its process id may belong to
    /// another process by now, and nobody gets the signal.
    pub(super) fn signal(&self, signal: Signal) -> io::Result<()> {
        if self.look()? { send(self.process_id, signal) } else { Ok(()) }
    }

    /// Whether this very process still runs, where that can be seen.
    fn look(&self) -> io::Result<bool> {
        is_same_process(self.process_id, self.start_ticks)
    }

    /// Whether it is on this host, alive, and the worker that the record says, by its command line.
    fn is_found_again(&self, run: &Path) -> bool {
        self.host == host_name() && self.is_alive() && names_worker(self.process_id, run, self.worker)
    }
}

/// Start time of a live process, in clock ticks since the host's start.
pub(crate) fn start_ticks(process_id: u32) -> io::Result<u64> {
    stat(process_id).map(|stat| stat.start_ticks)
}

/// Whether the process of this id that began then still runs on this host.
pub(crate) fn is_same_process(process_id: u32, start_ticks: u64) -> io::Result<bool> {
    match stat(process_id) {
        Ok(found) => Ok(found.start_ticks == start_ticks && !matches!(found.state, 'Z' | 'X')),
        Err(error) if has_ended(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// The session of a live process; `None` where it has ended.
pub(crate) fn session_of(process_id: u32) -> io::Result<Option<u32>> {
    match stat(process_id) {
        Ok(found) => Ok((!matches!(found.state, 'Z' | 'X')).then_some(found.session)),
        Err(error) if has_ended(&error) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Sends a signal to a process, and to all that it has started where it leads a group, as worker processes do: a script around a worker
/// passes no signal on.
pub(super) fn send(process_id: u32, signal: Signal) -> io::Result<()> {
    let pid = i32::try_from(process_id).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, format!("{process_id} is no process id")))?;
    let leads = getpgid(Some(pid)).is_ok_and(|group| group == pid);
    Ok(if leads { kill_process_group(pid, signal) } else { kill_process(pid, signal) }?)
}

/// Kills what is left of the group that a process leads or led; nothing where it is empty.
pub(super) fn end_group(process_id: u32) {
    let group = i32::try_from(process_id).ok().and_then(Pid::from_raw);
    if let Some(Err(error)) = group.map(|group| kill_process_group(group, Signal::KILL))
        && error != rustix::io::Errno::SRCH
    {
        tracing::warn!(process_id, %error, "what a worker process has started could not be ended");
    }
}

/// The processes of a run that an earlier controller or `cloze join` started on this host and that still live.
pub(super) fn living(paths: &RunPaths) -> anyhow::Result<Vec<ProcessRecord>> {
    let mut records = all(paths)?;
    records.retain(|record| record.is_found_again(paths.root()));
    Ok(records)
}

/// The processes of a run that a controller on another host started. Whether they live cannot be seen from here.
pub(super) fn elsewhere(paths: &RunPaths) -> anyhow::Result<Vec<ProcessRecord>> {
    let own_host = host_name();
    let mut records = all(paths)?;
    records.retain(|record| record.host != own_host && !record.by_join);
    Ok(records)
}

/// All records of a run, by slot.
pub(super) fn all(paths: &RunPaths) -> anyhow::Result<Vec<ProcessRecord>> {
    let folder = paths.processes();
    let entries = match fs::read_dir(&folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(storage("list the process records", &folder, &error).into()),
    };
    let mut records = Vec::new();
    for entry in entries {
        let path = entry.map_err(|error| storage("list the process records", &folder, &error))?.path();
        if path.extension().is_some_and(|extension| extension == "json") {
            records.extend(read(&path)?);
        }
    }
    records.sort_by_key(|record: &ProcessRecord| record.worker);
    Ok(records)
}

/// Reads a record; one that its owner has just removed is none.
fn read(path: &Path) -> anyhow::Result<Option<ProcessRecord>> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(storage("read a process record", path, &error).into()),
    };
    let record = serde_json::from_slice(&text).map_err(|error| {
        Failure::new(FailureKind::Damaged, "a process record cannot be read")
            .at(path.display())
            .because(error)
            .hint("end the worker processes of this run on this host, and remove the file")
    })?;
    Ok(Some(record))
}

fn stat(process_id: u32) -> io::Result<Stat> {
    let text = fs::read_to_string(format!("/proc/{process_id}/stat"))?;
    parse_stat(&text).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{process_id}/stat is not understood")))
}

/// Whether a file of `/proc` could not be read because its process has ended, perhaps between opening and reading.
fn has_ended(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(Errno::SRCH.raw_os_error())
}

/// Processes are looked at many times a second; the first one that cannot be says it for all.
fn tell_unreadable(process_id: u32, error: &io::Error) {
    static IS_TOLD: AtomicBool = AtomicBool::new(false);
    if !IS_TOLD.swap(true, Ordering::Relaxed) {
        tracing::warn!(process_id, %error, "a worker process cannot be looked at and counts as alive");
    }
}

/// Reads state and start time. The program's name stands in parentheses and may itself hold any character.
fn parse_stat(text: &str) -> Option<Stat> {
    let (_, fields) = text.rsplit_once(')')?;
    let mut fields = fields.split_ascii_whitespace();
    let state = fields.clone().next()?.chars().next()?;
    let session = fields.clone().nth(SESSION_PLACE)?.parse().ok()?;
    let start_ticks = fields.nth(START_TICKS_PLACE)?.parse().ok()?;
    Some(Stat { state, session, start_ticks })
}

/// Whether a process's command line is that of a worker of this run and slot.
fn names_worker(process_id: u32, run: &Path, worker: u32) -> bool {
    let line = match fs::read(format!("/proc/{process_id}/cmdline")) {
        Ok(line) => line,
        Err(error) if has_ended(&error) => return false,
        Err(error) => {
            tell_unreadable(process_id, &error);
            return true;
        }
    };
    let arguments: Vec<&[u8]> = line.split(|&byte| byte == 0).collect();
    let is_run = |value: &[u8]| Path::new(OsStr::from_bytes(value)) == run;
    let is_slot = |value: &[u8]| value == worker.to_string().as_bytes();
    arguments.windows(2).any(|pair| pair[0] == b"--run" && is_run(pair[1]))
        && arguments.windows(2).any(|pair| pair[0] == b"--worker" && is_slot(pair[1]))
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn stats_are_read() {
        let tail = "1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 777 20 21";
        let cases = [
            (format!("12 (sleep) S {tail}"), Some(Stat { state: 'S', session: 3, start_ticks: 777 })),
            (format!("12 (a) b (c)) T {tail}"), Some(Stat { state: 'T', session: 3, start_ticks: 777 })),
            ("12 (sleep) S 1 2".to_owned(), None),
            (String::new(), None),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_stat(&text), expected, "{text}");
        }
    }

    /// A process with the command line of worker 3 of a run, and its record.
    fn process(paths: &RunPaths) -> (std::process::Child, ProcessRecord) {
        let child = Command::new("/bin/sh")
            .args(["-c", "read line", "worker", "train", "--run"])
            .arg(paths.root())
            .args(["--worker", "3"])
            .stdin(Stdio::piped())
            .spawn()
            .unwrap();
        let process_id = child.id();
        let start_ticks = start_ticks(process_id).unwrap();
        let host = host_name();
        (
            child,
            ProcessRecord { worker: 3, slots: 4, process_id, start_ticks, host, recipe_hash: "l".to_owned(), by_join: false, log_start: 0 },
        )
    }

    #[test]
    fn a_live_process_is_found_again_until_it_ends() {
        let folder = tempfile::tempdir().unwrap();
        let paths = RunPaths::new(folder.path().to_owned());
        assert!(living(&paths).unwrap().is_empty());
        fs::create_dir(paths.processes()).unwrap();
        let (mut child, record) = process(&paths);
        let others = [
            ProcessRecord { host: "another".to_owned(), ..record.clone() },
            ProcessRecord { start_ticks: record.start_ticks + 1, ..record.clone() },
            ProcessRecord { worker: 2, ..record.clone() },
        ];
        for other in others {
            other.write(&paths).unwrap();
            assert!(living(&paths).unwrap().is_empty(), "{other:?}");
            ProcessRecord::remove(&paths, other.worker).unwrap();
        }
        record.write(&paths).unwrap();
        assert_eq!(living(&paths).unwrap(), std::slice::from_ref(&record));
        record.signal(Signal::KILL).unwrap();
        // Until somebody asks for its status the process is a zombie, and counts as ended.
        while record.is_alive() {
            std::thread::yield_now();
        }
        assert!(living(&paths).unwrap().is_empty());
        child.wait().unwrap();
        record.signal(Signal::KILL).unwrap();
    }

    #[test]
    fn a_live_process_is_found_by_every_name_of_its_folder() {
        let folder = tempfile::tempdir().unwrap();
        let root = fs::canonicalize(folder.path()).unwrap();
        let (run, link) = (root.join("run"), root.join("link"));
        fs::create_dir_all(run.join("processes")).unwrap();
        std::os::unix::fs::symlink(&run, &link).unwrap();
        let paths = RunPaths::find(&run).unwrap();
        let (mut child, record) = process(&paths);
        record.write(&paths).unwrap();
        for name in [root.join("run/"), link, root.join("link/"), run.join("processes").join("..")] {
            let found = living(&RunPaths::find(&name).unwrap()).unwrap();
            assert_eq!(found, std::slice::from_ref(&record), "{}", name.display());
        }
        // A trailing slash alone makes no other folder.
        assert_eq!(living(&RunPaths::new(root.join("run/"))).unwrap(), std::slice::from_ref(&record));
        assert!(living(&RunPaths::new(root.join("ru"))).unwrap().is_empty());
        child.kill().unwrap();
        child.wait().unwrap();
    }

    #[test]
    fn only_a_process_that_is_not_there_has_ended() {
        let cases = [(Errno::NOENT, true), (Errno::SRCH, true), (Errno::ACCESS, false), (Errno::MFILE, false), (Errno::IO, false)];
        for (errno, wanted) in cases {
            assert_eq!(has_ended(&io::Error::from(errno)), wanted, "{errno}");
        }
        assert!(!has_ended(&io::Error::new(io::ErrorKind::InvalidData, "not understood")));
    }

    #[test]
    fn processes_of_another_controllers_host_are_told() {
        let folder = tempfile::tempdir().unwrap();
        let paths = RunPaths::new(folder.path().to_owned());
        fs::create_dir(paths.processes()).unwrap();
        let on = |worker, host: &str, by_join| ProcessRecord {
            worker,
            slots: 4,
            process_id: 1,
            start_ticks: 1,
            host: host.to_owned(),
            recipe_hash: "l".to_owned(),
            by_join,
            log_start: 0,
        };
        for record in [on(0, &host_name(), false), on(1, "another host", true), on(2, "another host", false)] {
            record.write(&paths).unwrap();
        }
        assert_eq!(elsewhere(&paths).unwrap(), [on(2, "another host", false)]);
    }

    #[test]
    fn a_damaged_record_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let paths = RunPaths::new(folder.path().to_owned());
        fs::create_dir(paths.processes()).unwrap();
        fs::write(paths.process(0), "{").unwrap();
        let failure = living(&paths).unwrap_err().downcast::<Failure>().unwrap();
        assert_eq!(failure.kind, FailureKind::Damaged);
    }
}
