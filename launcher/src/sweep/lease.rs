//! One live controller for a journal in a bucket, where there are no file locks.
//!
//! A lease is an object with a number, made under the condition that there is none of that number yet, so that of two controllers that
//! want the next one only one gets it. Its holder renews it by writing it again, and leaves when it finds a newer one. Whoever finds the
//! newest lease too old takes the next number. Times are those of the hosts' clocks, so a lease from the future is named and not judged.

use std::collections::BTreeMap;
use std::fmt;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use anyhow::Context as _;
use cloze_cluster::host::host_name;
use cloze_data::store::{self, ConditionalPut, Store};
use cloze_recipes::failure::{Failure, FailureKind};
use serde::{Deserialize, Serialize};

use super::claim::boot;
use crate::run_folder::storage;

/// A lease that was not renewed for longer than this is over, in seconds. Longer than a controller is busy with one submission, which
/// does not renew: 120 s for it and 2 x 30 s to look for its job, after up to 20 s without a renewal.
pub const LEASE_S: f64 = 300.0;

/// A lease is renewed when it is this old, in seconds; it leaves several tries before it is over.
const RENEW_S: f64 = 20.0;

/// Difference of two hosts' clocks that is ignored, in seconds.
pub const MAX_CLOCK_SKEW_S: f64 = 10.0;

/// Folder of the leases.
const FOLDER: &str = "leases";

/// Largest lease, in bytes.
const MAX_LEASE_BYTES: u64 = 4096;

/// What a lease says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Text {
    /// `process 7 of host`.
    holder: String,
    /// Unix time of the last renewal, in seconds.
    renewed: f64,
    /// The lock that its holder has beside the lease.
    #[serde(default)]
    home: Option<Home>,
}

/// The lock of a study folder, as one file under one kernel. There is one holder of it, so a lease of the same home is that of a controller
/// that has gone before whoever holds the lock now.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Home {
    boot: String,
    device: u64,
    inode: u64,
}

impl Home {
    /// That of this lock, which must be there.
    pub fn of(lock: &Path) -> Result<Self, Failure> {
        let failed = |error: &std::io::Error| storage("look at a lock", lock, error);
        let found = std::fs::metadata(lock).map_err(|error| failed(&error))?;
        Ok(Self { boot: boot().map_err(|error| failed(&error))?, device: found.dev(), inode: found.ino() })
    }
}

/// What somebody who lives by the lease of a home sees in the newest one.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Sight {
    /// A controller of this home has it, and renewed it at this Unix time, in seconds.
    Ours(f64),
    /// Another controller has it, or nobody has it any more.
    Theirs(String),
    /// There is none: it was given back, or the place of the journal is out of reach for a moment and lists nothing.
    Nobodys,
}

impl Sight {
    /// Looks at the newest lease of a journal.
    pub(super) fn look(store: &Store, home: &Home) -> anyhow::Result<Self> {
        Ok(Self::of(newest(store)?.map(|(_, text)| text), home))
    }

    fn of(newest: Option<Text>, home: &Home) -> Self {
        match newest {
            Some(text) if is_own(Some(&text), home) => Self::Ours(text.renewed),
            Some(text) => Self::Theirs(text.holder),
            None => Self::Nobodys,
        }
    }
}

/// A lease that this process holds.
#[derive(Debug)]
pub struct Lease {
    store: Store,
    number: u64,
    holder: String,
    home: Home,
    follows: bool,
    renewed: f64,
}

/// What the newest lease means for somebody who wants the next.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Judgement {
    /// It may be taken.
    Free,
    /// Its holder lives, or did this many seconds ago.
    Held(u64),
    /// It is from the future, by this many seconds.
    Future(u64),
}

fn judge(now: f64, newest: Option<&Text>, home: Option<&Home>) -> Judgement {
    // Its controller held the very lock that whoever asks holds now.
    if home.is_some_and(|home| is_own(newest, home)) {
        return Judgement::Free;
    }
    match newest.map(|text| now - text.renewed) {
        Some(age_s) if age_s < -MAX_CLOCK_SKEW_S => Judgement::Future((-age_s) as u64),
        Some(age_s) if age_s <= LEASE_S => Judgement::Held(age_s.max(0.0) as u64),
        None | Some(_) => Judgement::Free,
    }
}

fn is_own(newest: Option<&Text>, home: &Home) -> bool {
    newest.is_some_and(|text| text.home.as_ref() == Some(home))
}

/// What the lease of a journal says to somebody who only looks.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum LeaseState {
    /// Nobody has it, and the last one gave it back.
    Free,
    /// A controller has it, which lives or did so many seconds ago.
    Held {
        /// `process 7 of host`.
        holder: String,
        /// Seconds since it was renewed.
        renewed_s_ago: u64,
    },
    /// Its controller has not renewed it for so long that another one may take it.
    Over {
        /// `process 7 of host`.
        holder: String,
        /// Seconds since it was renewed.
        renewed_s_ago: u64,
    },
    /// It is from the future, by this host's clock.
    Future {
        /// `process 7 of host`.
        holder: String,
        /// By so many seconds.
        ahead_s: u64,
    },
}

impl LeaseState {
    /// Looks at the lease of the journal at this URL; nothing is written.
    pub fn look(url: &str, now: f64) -> anyhow::Result<Self> {
        let store = store::open(url, &BTreeMap::new())?;
        Ok(Self::of(now, newest(&store)?.map(|(_, text)| text)))
    }

    fn of(now: f64, newest: Option<Text>) -> Self {
        let judgement = judge(now, newest.as_ref(), None);
        let Some(Text { holder, renewed, .. }) = newest else { return Self::Free };
        match judgement {
            Judgement::Free => Self::Over { holder, renewed_s_ago: (now - renewed) as u64 },
            Judgement::Held(renewed_s_ago) => Self::Held { holder, renewed_s_ago },
            Judgement::Future(ahead_s) => Self::Future { holder, ahead_s },
        }
    }

    /// Whether a controller may live.
    pub fn may_live(&self) -> bool {
        matches!(self, Self::Held { .. } | Self::Future { .. })
    }
}

impl fmt::Display for LeaseState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Free => write!(f, "nobody has the lease"),
            Self::Held { holder, renewed_s_ago } => write!(f, "{holder} has the lease, renewed {renewed_s_ago} s ago"),
            Self::Over { holder, renewed_s_ago } => {
                write!(f, "the lease of {holder} is over, since it was renewed {renewed_s_ago} s ago and holds {LEASE_S} s")
            }
            Self::Future { holder, ahead_s } => write!(f, "the lease of {holder} is {ahead_s} s from the future; the clocks differ"),
        }
    }
}

impl Lease {
    /// Takes the lease of a journal, for a controller that holds the lock of this home. Fails with kind `Run` where another controller has it,
    /// `Environment` where a clock is wrong, and `Storage` where the store cannot promise that only one gets it.
    pub fn take(store: &Store, home: Home, now: f64) -> anyhow::Result<Self> {
        if store::probe_conditional_put(store)? != ConditionalPut::Honoured {
            return Err(Failure::new(FailureKind::Storage, "this store cannot promise that a journal has one controller")
                .at(&store.display_url)
                .expected("a store that refuses to create an object that is there")
                .hint("put `--journal` into another store, or leave it out on a disk that all hosts share")
                .into());
        }
        let newest = newest(store)?;
        let text = newest.as_ref().map(|(_, text)| text);
        match judge(now, text, Some(&home)) {
            Judgement::Free => {}
            Judgement::Held(age_s) => return Err(held(store, text, age_s).into()),
            Judgement::Future(ahead_s) => return Err(from_the_future(store, text, ahead_s).into()),
        }
        let number = newest.as_ref().map_or(1, |(number, _)| number + 1);
        let holder = format!("process {} of {}", std::process::id(), host_name());
        let lease = Self { store: store.clone(), number, holder, follows: is_own(text, &home), home, renewed: now };
        if !store::put_if_absent(store, &key(number), lease.text(now)?)? {
            return Err(held(store, None, 0).into());
        }
        if number > 1 {
            store::delete(store, &key(number - 1))?;
        }
        Ok(lease)
    }

    /// Whether a controller of the same home had the lease before and did not give it back, so that trials may live by it.
    pub fn follows(&self) -> bool {
        self.follows
    }

    /// Renews it where it is due. Fails with kind `Run` where another controller has taken over meanwhile.
    pub fn renew(&mut self, now: f64) -> anyhow::Result<()> {
        if (now - self.renewed).abs() < RENEW_S {
            return Ok(());
        }
        match newest(&self.store)? {
            Some((number, _)) if number == self.number => {}
            other => return Err(lost(&self.store, other.as_ref().map(|(_, text)| text.holder.as_str())).into()),
        }
        store::put(&self.store, &key(self.number), self.text(now)?)?;
        self.renewed = now;
        Ok(())
    }

    /// Gives it back.
    pub fn release(self) -> anyhow::Result<()> {
        store::delete(&self.store, &key(self.number))
    }

    fn text(&self, now: f64) -> anyhow::Result<Vec<u8>> {
        serde_json::to_vec(&Text { holder: self.holder.clone(), renewed: now, home: Some(self.home.clone()) }).context("serialise a lease")
    }
}

fn key(number: u64) -> String {
    format!("{FOLDER}/{number:012}.json")
}

/// The newest lease; `None` where there is none.
fn newest(store: &Store) -> anyhow::Result<Option<(u64, Text)>> {
    let numbers = store::list_below(store, FOLDER)?.into_iter().filter_map(|info| {
        let name = info.key.rsplit('/').next()?.strip_suffix(".json")?;
        name.parse::<u64>().ok()
    });
    let Some(number) = numbers.max() else { return Ok(None) };
    let bytes = store::read_all(store, &key(number), MAX_LEASE_BYTES)?;
    let text = serde_json::from_slice(&bytes).map_err(|error| {
        Failure::new(FailureKind::Damaged, "the lease of a journal cannot be read")
            .at(store.url(&key(number)))
            .because(error)
            .hint("remove it once no controller of this sweep lives")
    })?;
    Ok(Some((number, text)))
}

fn held(store: &Store, text: Option<&Text>, age_s: u64) -> Failure {
    let holder = text.map_or("another controller, since a moment ago", |text| text.holder.as_str());
    Failure::new(FailureKind::Run, "another controller has this sweep")
        .at(store.url(FOLDER))
        .found(format!("{holder}, {age_s} s ago"))
        .hint(format!("stop it with `cloze sweep cancel` or Ctrl-C; after one that was killed, wait until its lease is over ({LEASE_S} s)"))
}

fn from_the_future(store: &Store, text: Option<&Text>, ahead_s: u64) -> Failure {
    Failure::new(FailureKind::Environment, "the lease of this sweep is from the future")
        .at(store.url(FOLDER))
        .expected(format!("clocks that differ by at most {MAX_CLOCK_SKEW_S} s"))
        .found(format!("{ahead_s} s ahead of this host, by {}", text.map_or("another controller", |text| text.holder.as_str())))
        .hint("set the clocks of both hosts, by NTP for instance; remove the lease once no controller of this sweep lives")
}

fn lost(store: &Store, holder: Option<&str>) -> Failure {
    Failure::new(FailureKind::Run, "another controller has taken this sweep over")
        .at(store.url(FOLDER))
        .found(holder.unwrap_or("no lease"))
        .hint("this one could not renew its lease for too long; its jobs go on and the other one collects them, its trials on this machine end")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn failure(result: anyhow::Result<Lease>) -> Failure {
        result.unwrap_err().downcast().unwrap()
    }

    fn home(inode: u64) -> Home {
        Home { boot: "b".to_owned(), device: 1, inode }
    }

    #[test]
    fn ages_decide() {
        let of = |renewed| Text { holder: "process 1 of a".to_owned(), renewed, home: Some(home(1)) };
        let cases = [
            (None, Judgement::Free),
            (Some(of(1000.0)), Judgement::Held(0)),
            (Some(of(1008.0)), Judgement::Held(0)),
            (Some(of(701.0)), Judgement::Held(299)),
            (Some(of(699.0)), Judgement::Free),
            (Some(of(1020.0)), Judgement::Future(20)),
        ];
        for (text, expected) in cases {
            assert_eq!(judge(1000.0, text.as_ref(), Some(&home(2))), expected, "{text:?}");
            assert_eq!(judge(1000.0, text.as_ref(), Some(&home(1))), Judgement::Free, "whoever has its lock follows at once: {text:?}");
            let state = LeaseState::of(1000.0, text.clone());
            assert_eq!(state.may_live(), !matches!(expected, Judgement::Free), "{text:?}");
            assert!(text.is_none_or(|text| state.to_string().contains(&text.holder)), "{state}");
        }
    }

    #[test]
    fn a_journal_has_one_controller() {
        let folder = tempfile::tempdir().unwrap();
        let store = store::open(&folder.path().display().to_string(), &BTreeMap::new()).unwrap();
        let mut first = Lease::take(&store, home(1), 1000.0).unwrap();
        let url = folder.path().display().to_string();
        let holder = format!("process {} of {}", std::process::id(), host_name());
        assert_eq!(LeaseState::look(&url, 1050.0).unwrap(), LeaseState::Held { holder: holder.clone(), renewed_s_ago: 50 });
        assert_eq!(LeaseState::look(&url, 1301.0).unwrap(), LeaseState::Over { holder, renewed_s_ago: 301 });
        let second = failure(Lease::take(&store, home(2), 1050.0));
        assert_eq!((second.kind, second.what.as_str()), (FailureKind::Run, "another controller has this sweep"));
        assert_eq!(second.found.unwrap(), format!("process {} of {}, 50 s ago", std::process::id(), host_name()));
        first.renew(1060.0).unwrap();
        assert_eq!(failure(Lease::take(&store, home(2), 1100.0)).kind, FailureKind::Run);
        let behind = failure(Lease::take(&store, home(2), 900.0));
        assert_eq!((behind.kind, behind.what.as_str()), (FailureKind::Environment, "the lease of this sweep is from the future"));
        // The first stays away for too long; the one that takes over is found by it.
        let other = Lease::take(&store, home(2), 1361.0).unwrap();
        let lost = first.renew(1370.0).unwrap_err().downcast::<Failure>().unwrap();
        assert_eq!(lost.what, "another controller has taken this sweep over");
        let sights = [1, 2].map(|inode| Sight::look(&store, &home(inode)).unwrap());
        let holder = format!("process {} of {}", std::process::id(), host_name());
        assert_eq!(sights, [Sight::Theirs(holder), Sight::Ours(1361.0)]);
        let other = {
            drop(other);
            // It was killed, and who comes after it in the same folder need not wait.
            Lease::take(&store, home(2), 1365.0).unwrap()
        };
        assert_eq!(Sight::look(&store, &home(2)).unwrap(), Sight::Ours(1365.0));
        other.release().unwrap();
        assert_eq!(Sight::look(&store, &home(2)).unwrap(), Sight::Nobodys);
        assert_eq!(LeaseState::look(&url, 1371.0).unwrap().to_string(), "nobody has the lease");
        Lease::take(&store, home(1), 1371.0).unwrap();
    }
}
