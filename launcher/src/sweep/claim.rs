//! Who works on a batch that was given to a host: one process, or nobody ever.
//!
//! The claim of a batch is a file of the study folder that is made once, by a hard link, which a file server does for one of several. The
//! process that begins the work makes it and names itself; a controller that takes the batch back makes it too, and then nothing of the
//! batch begins any more, whatever is still on its way to a host. The process leads a session, to which all that it starts belongs, so that
//! its host can say whether anything of it is left.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write as _};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::Duration;

use cloze_cluster::host::host_name;
use cloze_recipes::failure::{Failure, FailureKind};
use rustix::process::{Pid, Signal, kill_process};
use serde::{Deserialize, Serialize};

use super::folder::{StudyFolder, read_json};
use super::share::Part;
use crate::local::{is_same_process, session_of, start_ticks};
use crate::run_folder::{remove_if_there, storage};

/// Claims that this process has tried to make; each has a file of its own before it is linked.
static NUM_MADE: AtomicU32 = AtomicU32::new(0);

/// The kernel's identity since its start.
const BOOT_PATH: &str = "/proc/sys/kernel/random/boot_id";

/// How often the processes of a session are looked for while they are ended; one that waits for a disk may stay.
const END_ROUNDS: u32 = 50;

/// Wait between two of these looks, in milliseconds.
const END_POLL_MS: u64 = 20;

/// What a claim says.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum Claim {
    /// A process works on the batch, or did.
    Taken(Worker),
    /// A controller has taken the batch back before anything began.
    Withdrawn,
}

/// The process that works on a batch.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Worker {
    /// The host, as the controller calls it.
    pub host: String,
    /// The process, which leads a session of its own.
    pub process_id: u32,
    /// Its start, in clock ticks since the host's; with its id it names one process.
    pub start_ticks: u64,
    /// The kernel under which it runs.
    pub boot: String,
    /// What that machine calls itself; one name may lead to several.
    pub machine: String,
    /// The part of that machine that it has; an earlier version of this program did not say so.
    #[serde(default)]
    pub part: Option<Part>,
}

impl Claim {
    /// The claim of a batch; `None` where nobody has made one.
    pub fn read(folder: &StudyFolder, batch: u32) -> Result<Option<Self>, Failure> {
        read_json(&folder.claim_path(batch))
    }

    /// Makes the claim, unless there is one already; returns the one that holds.
    pub fn make(&self, folder: &StudyFolder, batch: u32) -> anyhow::Result<Self> {
        let path = folder.claim_path(batch);
        let number = NUM_MADE.fetch_add(1, Ordering::Relaxed);
        let own = path.with_extension(format!("claim-{}-{number}-{}", std::process::id(), host_name()));
        // Nobody else writes a file of this name, so it is written as it is: a name in between could be another one's too.
        let text = serde_json::to_vec(self)?;
        let written = File::create(&own).and_then(|mut file| file.write_all(&text).and_then(|()| file.sync_all()));
        let linked = written.and_then(|()| fs::hard_link(&own, &path)).or_else(|error| without_links(error, &path, &text));
        remove_if_there(&own).map_err(|error| storage("remove a file", &own, &error))?;
        match linked {
            Ok(()) => {}
            // A file server that was asked twice may say so of our own.
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {}
            Err(error) => return Err(storage("claim a batch", &path, &error).into()),
        }
        // What is there now holds, whoever was told what.
        let held = Self::read(folder, batch)?;
        held.ok_or_else(|| {
            Failure::new(FailureKind::Storage, "a claim is gone that was there")
                .at(path.display())
                .hint("did somebody clear the study's jobs?")
                .into()
        })
    }
}

/// Makes the file itself where the disk has no hard links, as some of virtual machines and of USB sticks: one process makes it there too, but
/// somebody may see it before its text.
fn without_links(error: io::Error, path: &Path, text: &[u8]) -> io::Result<()> {
    let has_no_links = error.kind() == ErrorKind::Unsupported || error.kind() == ErrorKind::PermissionDenied;
    if !has_no_links {
        return Err(error);
    }
    tracing::debug!(%error, path = %path.display(), "the disk of the study has no hard links");
    File::create_new(path).and_then(|mut file| file.write_all(text).and_then(|()| file.sync_all()))
}

impl Worker {
    /// This process, once it leads a session.
    pub fn this_process(host: &str) -> io::Result<Self> {
        let process_id = std::process::id();
        Ok(Self {
            host: host.to_owned(),
            process_id,
            start_ticks: start_ticks(process_id)?,
            boot: boot()?,
            machine: host_name(),
            part: None,
        })
    }

    /// Lets this process lead a session of its own, unless it does already.
    pub fn lead_session() -> Result<(), Failure> {
        let own = std::process::id();
        if matches!(session_of(own), Ok(Some(session)) if session == own) {
            return Ok(());
        }
        rustix::process::setsid().map(drop).map_err(|error| {
            Failure::new(FailureKind::Environment, "this process cannot lead a session").because(error).hint("start it without job control")
        })
    }

    /// Whether it runs itself; only its host can say.
    pub fn is_alive(&self) -> io::Result<bool> {
        Ok(self.runs_under_this_kernel()? && is_same_process(self.process_id, self.start_ticks)?)
    }

    /// Whether it began since this machine was started. Fails on another machine, where nobody can tell.
    pub fn runs_under_this_kernel(&self) -> io::Result<bool> {
        if boot()? == self.boot {
            return Ok(true);
        }
        let here = host_name();
        if here == self.machine {
            return Ok(false);
        }
        Err(io::Error::other(format!("{} was {}, and now {here} answers to that name", self.host, self.machine)))
    }

    /// The processes of its session that are left, itself included; only its host can say.
    pub fn session(&self) -> io::Result<Vec<u32>> {
        if !self.runs_under_this_kernel()? {
            return Ok(Vec::new());
        }
        // While a session has members no process gets its id, so another process of the id means that nothing is left.
        match start_ticks(self.process_id) {
            Ok(found) if found != self.start_ticks => return Ok(Vec::new()),
            Ok(_) | Err(_) => {}
        }
        let mut members = Vec::new();
        for entry in fs::read_dir("/proc")? {
            let name = entry?.file_name();
            let Some(process_id) = name.to_str().and_then(|name| name.parse().ok()) else { continue };
            match session_of(process_id) {
                Ok(found) if found == Some(self.process_id) => members.push(process_id),
                Ok(_) => {}
                // Where processes of others are hidden, one that may not be looked at is another user's.
                Err(error) if error.kind() == ErrorKind::PermissionDenied => {}
                Err(error) => return Err(error),
            }
        }
        Ok(members)
    }

    /// Asks the process to save and leave; asked again it is the same wish, since nobody knows whether the first one came through.
    pub fn stop(&self) -> io::Result<()> {
        if self.is_alive()? { signal(self.process_id, Signal::USR2) } else { Ok(()) }
    }

    /// Ends all of its session; this process last, where it is among them.
    pub fn end(&self) -> io::Result<()> {
        self.end_others()?;
        if self.process_id == std::process::id() {
            kill(self.process_id);
        }
        Ok(())
    }

    /// Ends all of its session but this process. One that is about to end may have started another meanwhile, so it is looked again.
    pub fn end_others(&self) -> io::Result<()> {
        let own = std::process::id();
        for _ in 0..END_ROUNDS {
            let members = self.session()?;
            let others: Vec<u32> = members.into_iter().filter(|&member| member != own).collect();
            if others.is_empty() {
                break;
            }
            others.into_iter().for_each(kill);
            sleep(Duration::from_millis(END_POLL_MS));
        }
        Ok(())
    }
}

/// Sends a signal to one process, and to no other of its group: what checks the machine is in that of the work.
pub(super) fn signal(process_id: u32, signal: Signal) -> io::Result<()> {
    let pid = i32::try_from(process_id).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or_else(|| io::Error::new(ErrorKind::InvalidInput, format!("{process_id} is no process id")))?;
    Ok(kill_process(pid, signal)?)
}

fn kill(process_id: u32) {
    if let Err(error) = signal(process_id, Signal::KILL) {
        tracing::debug!(%error, process_id, "a process had ended before it was told");
    }
}

/// The kernel's identity since its start.
pub(super) fn boot() -> io::Result<String> {
    fs::read_to_string(BOOT_PATH).map(|text| text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command, Stdio};
    use std::time::Instant;

    use super::*;

    fn folder(root: &std::path::Path) -> StudyFolder {
        let folder = StudyFolder::new(root.to_owned());
        folder.make().unwrap();
        folder
    }

    /// A process that leads a session with a child in a group of its own, and what a claim says of it.
    fn session() -> (Child, Worker) {
        let script = "sleep 60 & echo ready; wait";
        let mut child = Command::new("setsid").args(["bash", "-mc", script]).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut line).unwrap();
        let process_id = child.id();
        let worker = Worker {
            host: "n1".to_owned(),
            process_id,
            start_ticks: start_ticks(process_id).unwrap(),
            boot: boot().unwrap(),
            machine: host_name(),
            part: None,
        };
        (child, worker)
    }

    fn wait_until(what: &str, done: impl Fn() -> bool) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while !done() {
            assert!(Instant::now() < deadline, "{what}");
            sleep(Duration::from_millis(10));
        }
    }

    #[test]
    fn the_first_claim_holds() {
        let root = tempfile::tempdir().unwrap();
        let folder = folder(root.path());
        assert_eq!(Claim::read(&folder, 7).unwrap(), None);
        let of = |process_id| {
            Claim::Taken(Worker {
                host: "n1".to_owned(),
                process_id,
                start_ticks: 1,
                boot: "b".to_owned(),
                machine: "m".to_owned(),
                part: None,
            })
        };
        assert_eq!(of(1).make(&folder, 7).unwrap(), of(1));
        for later in [of(2), Claim::Withdrawn] {
            assert_eq!(later.make(&folder, 7).unwrap(), of(1));
        }
        assert_eq!(Claim::read(&folder, 7).unwrap(), Some(of(1)));
        assert_eq!(Claim::Withdrawn.make(&folder, 8).unwrap(), Claim::Withdrawn);
        assert_eq!(of(3).make(&folder, 8).unwrap(), Claim::Withdrawn, "what was on its way does not begin");
        let names: Vec<_> = fs::read_dir(folder.job_path("")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert!(!names.iter().any(|name| name.to_string_lossy().contains("claim-")), "{names:?}");
    }

    #[test]
    fn what_a_process_has_started_outlives_it_and_is_found() {
        let (mut child, worker) = session();
        assert_eq!((worker.is_alive().unwrap(), worker.session().unwrap().len()), (true, 2));
        let earlier = Worker { start_ticks: worker.start_ticks - 1, ..worker.clone() };
        assert_eq!((earlier.is_alive().unwrap(), earlier.session().unwrap().len()), (false, 0), "another process of that id");
        let of_another_boot = Worker { boot: "x".to_owned(), ..worker.clone() };
        assert_eq!((of_another_boot.is_alive().unwrap(), of_another_boot.session().unwrap().len()), (false, 0));
        child.kill().unwrap();
        child.wait().unwrap();
        assert_eq!((worker.is_alive().unwrap(), worker.session().unwrap().len()), (false, 1));
        worker.end().unwrap();
        wait_until("its session ends", || worker.session().unwrap().is_empty());
    }

    #[test]
    fn of_several_who_claim_at_once_one_has_it_and_all_know_who() {
        let root = tempfile::tempdir().unwrap();
        let folder = folder(root.path());
        for batch in 1..=50 {
            let claimers: Vec<_> = (0..8)
                .map(|index| {
                    let folder = folder.clone();
                    let worker = Worker {
                        host: "n1".to_owned(),
                        process_id: index,
                        start_ticks: 1,
                        boot: "b".to_owned(),
                        machine: "m".to_owned(),
                        part: None,
                    };
                    let claim = if index == 7 { Claim::Withdrawn } else { Claim::Taken(worker) };
                    std::thread::spawn(move || claim.make(&folder, batch).unwrap())
                })
                .collect();
            let held: Vec<Claim> = claimers.into_iter().map(|claimer| claimer.join().unwrap()).collect();
            assert!(held.iter().all(|claim| *claim == held[0]), "{held:?}");
            assert_eq!(Claim::read(&folder, batch).unwrap().as_ref(), Some(&held[0]));
        }
    }
}
