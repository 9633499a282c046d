//! What an earlier controller left behind, and what a new one does about it.

use std::collections::BTreeSet;
use std::fmt;
use std::net::SocketAddr;
use std::time::{Duration, Instant as StdInstant};

use anyhow::Context as _;
use cloze_recipes::failure::{Failure, FailureKind};
use rustix::process::Signal;
use tokio::time::{Instant, sleep};

use super::crew::KILL_TIMEOUT_S;
use super::record::{ProcessRecord, all, elsewhere, living};
use crate::run_folder::{ControlFile, RunPaths};

/// Interval at which killed processes are looked for.
const KILL_POLL_MS: u64 = 20;

/// What a controller that was killed left.
#[derive(Debug, Default)]
pub(super) struct Legacy {
    /// Where its workers look for it.
    pub control: Option<ControlFile>,
    /// Its workers on this host that still live.
    pub living: Vec<ProcessRecord>,
    /// Its workers on other hosts, of which nobody here can tell whether they live.
    pub elsewhere: Vec<ProcessRecord>,
    /// Workers that `cloze join` has started, on any host.
    pub joined: Vec<ProcessRecord>,
}

/// What the new controller is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Wanted<'a> {
    /// Slots of the run.
    pub workers: u32,
    /// Slots whose processes the controller starts itself.
    pub local_workers: u32,
    /// Hash of the whole recipe.
    pub recipe_hash: &'a str,
    /// Where the coordinator is to listen, if that was said.
    pub bind: Option<SocketAddr>,
}

/// What is done with what was left.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Adoption {
    /// Nothing is left; start anew.
    Fresh,
    /// Listen where the earlier controller did, and wait for its workers to come back.
    TakeOver,
    /// End the living workers and start anew.
    Replace,
    /// Leave everything as it is and do not begin.
    Refuse,
}

/// Why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum AdoptionReason {
    /// No worker of this run lives.
    NobodyLeft,
    /// Workers live, or may live on other hosts.
    MayComeBack,
    /// They belong to a run of another size.
    OtherSize {
        /// Its slots.
        slots: u32,
    },
    /// They were started with other values of the recipe.
    OtherRecipe,
    /// Nothing says where they look for their controller.
    NoControl,
    /// The coordinator is to listen elsewhere.
    OtherAddress,
    /// The address is taken.
    AddressTaken,
    /// The earlier controller ran on another host and was killed; its workers there may train on.
    OtherHost {
        /// The host.
        host: String,
    },
}

impl Legacy {
    /// Looks for what an earlier controller left. Processes of `cloze join` are not its own.
    pub(super) fn find(paths: &RunPaths) -> anyhow::Result<Self> {
        let mut living = living(paths)?;
        living.retain(|record| !record.by_join);
        let mut joined = all(paths)?;
        joined.retain(|record| record.by_join);
        Ok(Self { control: ControlFile::read(paths)?, living, elsewhere: elsewhere(paths)?, joined })
    }

    /// The failure of a controller that must not begin because of workers on other hosts.
    pub(super) fn refusal(&self, paths: &RunPaths) -> Failure {
        let hosts: BTreeSet<&str> = self.elsewhere.iter().map(|record| record.host.as_str()).collect();
        let hosts = hosts.into_iter().collect::<Vec<_>>().join(", ");
        let slots: Vec<String> = self.elsewhere.iter().map(|record| record.worker.to_string()).collect();
        Failure::new(FailureKind::Environment, format!("workers of host {hosts} may still live"))
            .at(paths.processes().display())
            .expected("no worker of an earlier controller that cannot be reached from here")
            .found(format!("control.json, and records of workers on {hosts}: {}", slots.join(", ")))
            .hint(format!("resume the run on {hosts}; where that host is gone, remove `processes/worker-N.json` of these workers first"))
    }

    /// Kills the living workers and waits until they are gone.
    pub(super) async fn end_living(&mut self) -> anyhow::Result<()> {
        for record in &self.living {
            record.signal(Signal::KILL).with_context(|| format!("kill worker process {}", record.process_id))?;
        }
        let deadline = Instant::now() + Duration::from_secs(KILL_TIMEOUT_S);
        while let Some(record) = self.living.iter().find(|record| record.is_alive()) {
            if Instant::now() >= deadline {
                return Err(Failure::new(FailureKind::Environment, "a worker of the earlier controller does not end")
                    .at(format!("process {}", record.process_id))
                    .found(format!("alive {KILL_TIMEOUT_S} s after SIGKILL"))
                    .hint("it hangs in the kernel, for instance on a network file system; look at its state in `ps`")
                    .into());
            }
            sleep(Duration::from_millis(KILL_POLL_MS)).await;
        }
        self.living.clear();
        Ok(())
    }
}

/// Forgets an earlier controller and its workers, for a caller who knows that all of them were ended, wherever they ran. What lives on
/// this host all the same is killed.
pub(crate) fn forget_earlier(paths: &RunPaths) -> anyhow::Result<()> {
    ControlFile::remove(paths)?;
    let left = living(paths)?;
    for record in &left {
        record.signal(Signal::KILL).with_context(|| format!("kill worker process {}", record.process_id))?;
    }
    let deadline = StdInstant::now() + Duration::from_secs(KILL_TIMEOUT_S);
    while left.iter().any(ProcessRecord::is_alive) && StdInstant::now() < deadline {
        std::thread::sleep(Duration::from_millis(KILL_POLL_MS));
    }
    all(paths)?.iter().try_for_each(|record| ProcessRecord::remove(paths, record.worker))
}

/// Decides what becomes of what was left.
pub(super) fn decide_adoption(legacy: &Legacy, wanted: &Wanted<'_>) -> (Adoption, AdoptionReason) {
    let end_unless_nobody = |reason| {
        if legacy.living.is_empty() { (Adoption::Fresh, AdoptionReason::NobodyLeft) } else { (Adoption::Replace, reason) }
    };
    if legacy.control.is_some()
        && let Some(record) = legacy.elsewhere.first()
    {
        return (Adoption::Refuse, AdoptionReason::OtherHost { host: record.host.clone() });
    }
    let does_not_fit = |record: &&ProcessRecord| record.slots != wanted.workers || record.worker >= wanted.local_workers;
    // A slot of `cloze join` that is to be filled here is one that fits no more.
    let is_taken_back = |record: &&ProcessRecord| record.slots != wanted.workers || record.worker < wanted.local_workers;
    if let Some(record) = legacy.living.iter().find(does_not_fit).or_else(|| legacy.joined.iter().find(is_taken_back)) {
        return (Adoption::Replace, AdoptionReason::OtherSize { slots: record.slots });
    }
    // Those of `cloze join` would be refused as well, and could not be told where to turn to: another token tells them.
    if legacy.living.iter().chain(&legacy.joined).any(|record| record.recipe_hash != wanted.recipe_hash) {
        return (Adoption::Replace, AdoptionReason::OtherRecipe);
    }
    let Some(control) = &legacy.control else { return end_unless_nobody(AdoptionReason::NoControl) };
    if wanted.bind.is_some_and(|bind| !allows(bind, control.address)) {
        return end_unless_nobody(AdoptionReason::OtherAddress);
    }
    if legacy.living.is_empty() && wanted.local_workers == wanted.workers {
        return (Adoption::Fresh, AdoptionReason::NobodyLeft);
    }
    (Adoption::TakeOver, AdoptionReason::MayComeBack)
}

/// Whether an address that was asked for leaves room for this one; port 0 is any port.
fn allows(wanted: SocketAddr, address: SocketAddr) -> bool {
    wanted == address || (wanted.port() == 0 && wanted.ip() == address.ip())
}

impl fmt::Display for AdoptionReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NobodyLeft => f.write_str("no worker of the earlier controller lives"),
            Self::MayComeBack => f.write_str("workers of the earlier controller may come back"),
            Self::OtherSize { slots } => {
                write!(f, "they belong to a run of {slots} workers, or to slots that are not started here any more")
            }
            Self::OtherRecipe => f.write_str("they were started with other values of the recipe"),
            Self::NoControl => f.write_str("control.json is gone, so nobody knows where they look for their controller"),
            Self::OtherAddress => f.write_str("they look for their controller at another address than `--listen` names"),
            Self::OtherHost { host } => write!(f, "workers of the earlier controller may still live on {host}"),
            Self::AddressTaken => f.write_str("the address at which they look for their controller is taken"),
        }
    }
}

#[cfg(test)]
mod tests {
    use cloze_cluster::Secret;

    use super::*;

    fn record(worker: u32, slots: u32) -> ProcessRecord {
        ProcessRecord {
            worker,
            slots,
            process_id: 1,
            start_ticks: 1,
            host: "h".to_owned(),
            recipe_hash: "l".to_owned(),
            by_join: false,
            log_start: 0,
        }
    }

    fn control() -> ControlFile {
        let address = SocketAddr::from(([127, 0, 0, 1], 4242));
        ControlFile { address, token: Secret::new("token"), tls: None, dashboard: None, process_id: 7, local_workers: None }
    }

    #[test]
    fn workers_of_cloze_join_come_back_to_the_same_recipe_only() {
        let wanted = Wanted { workers: 2, local_workers: 1, recipe_hash: "l", bind: None };
        let changed = Wanted { recipe_hash: "other", ..wanted };
        let (all, more) = (Wanted { local_workers: 2, ..wanted }, Wanted { workers: 3, ..wanted });
        let cases = [
            ("the same", vec![record(0, 2)], wanted, Adoption::TakeOver, AdoptionReason::MayComeBack),
            ("the same, nobody here", vec![], wanted, Adoption::TakeOver, AdoptionReason::MayComeBack),
            ("their slot is filled here now", vec![record(0, 2)], all, Adoption::Replace, AdoptionReason::OtherSize { slots: 2 }),
            ("more slots", vec![], more, Adoption::Replace, AdoptionReason::OtherSize { slots: 2 }),
            ("another", vec![record(0, 2)], changed, Adoption::Replace, AdoptionReason::OtherRecipe),
            ("another, nobody here", vec![], changed, Adoption::Replace, AdoptionReason::OtherRecipe),
        ];
        for (name, living, wanted, adoption, reason) in cases {
            let joined = vec![ProcessRecord { by_join: true, host: "far".to_owned(), ..record(1, 2) }];
            let legacy = Legacy { control: Some(control()), living, elsewhere: Vec::new(), joined };
            assert_eq!(decide_adoption(&legacy, &wanted), (adoption, reason), "{name}");
        }
    }

    #[test]
    fn what_is_left_is_taken_over_where_it_fits() {
        let wanted = Wanted { workers: 2, local_workers: 2, recipe_hash: "l", bind: None };
        let elsewhere = Wanted { bind: Some(SocketAddr::from(([127, 0, 0, 1], 5000))), ..wanted };
        let same = Wanted { bind: Some(control().address), ..wanted };
        let any_port = Wanted { bind: Some(SocketAddr::from(([127, 0, 0, 1], 0))), ..wanted };
        let changed = Wanted { recipe_hash: "other", ..wanted };
        let partly = Wanted { local_workers: 1, ..wanted };
        let both = || vec![record(0, 2), record(1, 2)];
        let far = |worker| ProcessRecord { host: "far".to_owned(), ..record(worker, 2) };
        let other_host = || AdoptionReason::OtherHost { host: "far".to_owned() };
        let cases = [
            ("nothing", None, vec![], wanted, Adoption::Fresh, AdoptionReason::NobodyLeft),
            ("killed together with its workers", Some(control()), vec![], wanted, Adoption::Fresh, AdoptionReason::NobodyLeft),
            ("workers on other hosts", Some(control()), vec![], partly, Adoption::TakeOver, AdoptionReason::MayComeBack),
            ("all live", Some(control()), both(), wanted, Adoption::TakeOver, AdoptionReason::MayComeBack),
            ("one lives", Some(control()), vec![record(1, 2)], wanted, Adoption::TakeOver, AdoptionReason::MayComeBack),
            ("the same address", Some(control()), both(), same, Adoption::TakeOver, AdoptionReason::MayComeBack),
            ("any port of the same host", Some(control()), both(), any_port, Adoption::TakeOver, AdoptionReason::MayComeBack),
            ("another address", Some(control()), both(), elsewhere, Adoption::Replace, AdoptionReason::OtherAddress),
            ("another address, nobody left", Some(control()), vec![], elsewhere, Adoption::Fresh, AdoptionReason::NobodyLeft),
            ("another recipe", Some(control()), both(), changed, Adoption::Replace, AdoptionReason::OtherRecipe),
            ("another recipe, nobody left", Some(control()), vec![], changed, Adoption::Fresh, AdoptionReason::NobodyLeft),
            ("no control file", None, both(), wanted, Adoption::Replace, AdoptionReason::NoControl),
            ("on another host", Some(control()), vec![far(0), far(1)], wanted, Adoption::Refuse, other_host()),
            ("on another host too", Some(control()), vec![record(0, 2), far(1)], wanted, Adoption::Refuse, other_host()),
            ("on another host, elsewhere", Some(control()), vec![far(0)], elsewhere, Adoption::Refuse, other_host()),
            ("ended in order on another host", None, vec![far(0)], wanted, Adoption::Fresh, AdoptionReason::NobodyLeft),
            ("another size", Some(control()), vec![record(0, 3)], wanted, Adoption::Replace, AdoptionReason::OtherSize { slots: 3 }),
            ("a slot of others now", Some(control()), both(), partly, Adoption::Replace, AdoptionReason::OtherSize { slots: 2 }),
        ];
        for (name, control, records, wanted, adoption, reason) in cases {
            let (elsewhere, living) = records.into_iter().partition(|record| record.host == "far");
            let legacy = Legacy { control, living, elsewhere, joined: Vec::new() };
            assert_eq!(decide_adoption(&legacy, &wanted), (adoption, reason), "{name}");
        }
    }
}
