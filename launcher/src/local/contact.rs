//! How workers reach their coordinator: what its controller keeps for that, and how `cloze join` finds out.

use std::net::SocketAddr;
use std::time::Duration;

use cloze_cluster::{PinnedKey, RunKey, Secret};
use cloze_recipes::failure::{Failure, FailureKind};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::run_folder::{ControlFile, RunPaths, TlsKeys};

/// Longest wait for one connection to the coordinator.
const CONNECT_TIMEOUT_S: u64 = 2;

/// How a worker reaches its coordinator.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Contact {
    /// `host:port` on which it listens.
    pub coordinator: String,
    /// The run's token.
    pub token: Secret,
    /// The key that it proves to hold; `None` speaks in clear.
    pub key: Option<PinnedKey>,
}

/// What a controller knows by itself, and hands on in parts.
#[derive(Clone, Debug)]
pub(super) struct Credentials {
    /// The run's token.
    pub token: Secret,
    /// The coordinator's private key; `None` speaks in clear.
    pub key: Option<RunKey>,
}

impl Credentials {
    /// Draws them for a run with or without TLS.
    pub(super) fn fresh(tls: bool) -> anyhow::Result<Self> {
        let key = if tls { Some(RunKey::random()?) } else { None };
        Ok(Self { token: Secret::random()?, key })
    }

    /// Those of an earlier controller, whose workers know no others. Fails with kind `Damaged` when they are not those of such a run.
    pub(super) fn of(control: &ControlFile, tls: bool) -> Result<Self, Failure> {
        if control.tls.is_some() != tls {
            let said = |is_there: bool| if is_there { "a `tls`" } else { "no `tls`" };
            return Err(Failure::new(FailureKind::Damaged, "control.json is not that of this run")
                .expected(format!("{}, as the recipe's `cluster.tls` says", said(tls)))
                .found(said(!tls))
                .hint("is it a copy from another run? a controller that lives has written its own"));
        }
        Ok(Self { token: control.token.clone(), key: control.tls.as_ref().map(|keys| keys.private_key.clone()) })
    }

    /// What control.json keeps of the key.
    pub(super) fn kept(&self) -> anyhow::Result<Option<TlsKeys>> {
        self.key.clone().map(TlsKeys::of).transpose()
    }

    /// What workers are given.
    pub(super) fn contact(&self, address: SocketAddr) -> anyhow::Result<Contact> {
        let key = self.key.as_ref().map(RunKey::pinned).transpose()?;
        Ok(Contact { coordinator: address.to_string(), token: self.token.clone(), key })
    }
}

/// What `cloze join` is told of the coordinator, by its user and by the recipe.
#[derive(Debug, Default)]
pub(super) struct StatedContact {
    /// `host:port`.
    pub coordinator: Option<String>,
    /// The run's token.
    pub token: Option<Secret>,
    /// The coordinator's key.
    pub key: Option<PinnedKey>,
    /// The recipe wants TLS, so that there must be a key.
    pub tls: bool,
}

/// Address, token and key of the coordinator, once it can be reached there.
pub(super) async fn reach(paths: &RunPaths, stated: &StatedContact) -> anyhow::Result<Contact> {
    let contact = find(paths, stated)?;
    let connected = match timeout(Duration::from_secs(CONNECT_TIMEOUT_S), TcpStream::connect(&contact.coordinator)).await {
        Ok(connected) => connected.map(drop).map_err(|error| error.to_string()),
        Err(_) => Err(format!("no answer within {CONNECT_TIMEOUT_S} s")),
    };
    match connected {
        Ok(()) => Ok(contact),
        Err(error) => Err(Failure::new(FailureKind::Environment, "the coordinator cannot be reached")
            .at(contact.coordinator)
            .because(error)
            .hint("the controller must listen on an address of its host: `cloze train --listen ADDRESS`, or name it with --coordinator")
            .into()),
    }
}

/// What was not said is read from control.json.
fn find(paths: &RunPaths, stated: &StatedContact) -> anyhow::Result<Contact> {
    if stated.key.is_some() && !stated.tls {
        return Err(Failure::new(FailureKind::Mismatch, "this run speaks in clear, and CLOZE_COORDINATOR_KEY is set")
            .at(paths.root().display())
            .hint("unset it: it is the key of another run")
            .into());
    }
    let place = stated.coordinator.as_ref().zip(stated.token.as_ref());
    if let Some((coordinator, token)) = place
        && (stated.key.is_some() || !stated.tls)
    {
        return Ok(Contact { coordinator: coordinator.clone(), token: token.clone(), key: stated.key });
    }
    let file = match ControlFile::read(paths) {
        Ok(Some(file)) => file,
        // Whoever says address and token does so because this host cannot read the file.
        Ok(None) if place.is_some() => return Err(keyless(paths).into()),
        Err(error) if place.is_some() => return Err(keyless(paths).because(format!("{error:#}")).into()),
        Ok(None) => return Err(uncontrolled(paths).into()),
        Err(error) => return Err(error),
    };
    let known = Credentials::of(&file, stated.tls)?.contact(file.address)?;
    Ok(Contact {
        coordinator: stated.coordinator.clone().unwrap_or(known.coordinator),
        token: stated.token.clone().unwrap_or(known.token),
        key: stated.key.or(known.key),
    })
}

fn keyless(paths: &RunPaths) -> Failure {
    Failure::new(FailureKind::Mismatch, "this run speaks TLS, and the coordinator's key is not known here")
        .at(paths.control().display())
        .hint("set CLOZE_COORDINATOR_KEY to `tls.coordinator_key` of the control.json on the controller's host")
}

fn uncontrolled(paths: &RunPaths) -> Failure {
    Failure::new(FailureKind::Environment, "this run has no controller")
        .at(paths.control().display())
        .hint("start `cloze train` or `cloze resume` first, and join while it lives; both need to see the same run folder")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn address() -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 4242))
    }

    fn written(paths: &RunPaths, credentials: &Credentials) {
        let (token, tls) = (credentials.token.clone(), credentials.kept().unwrap());
        ControlFile { address: address(), token, tls, dashboard: None, process_id: 1, local_workers: None }.write(paths).unwrap();
    }

    #[test]
    fn what_was_not_said_comes_from_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let paths = RunPaths::new(folder.path().to_owned());
        for tls in [false, true] {
            let credentials = Credentials::fresh(tls).unwrap();
            written(&paths, &credentials);
            let known = credentials.contact(address()).unwrap();
            assert_eq!(known.key.is_some(), tls);
            assert_eq!(find(&paths, &StatedContact { tls, ..StatedContact::default() }).unwrap(), known);
            let elsewhere = Some("elsewhere:1".to_owned());
            let told =
                find(&paths, &StatedContact { coordinator: elsewhere.clone(), token: Some(Secret::new("t")), key: None, tls }).unwrap();
            assert_eq!(told, Contact { coordinator: "elsewhere:1".to_owned(), token: Secret::new("t"), key: known.key });
        }
        // With everything said, no file is needed.
        ControlFile::remove(&paths).unwrap();
        let key = Some(RunKey::random().unwrap().pinned().unwrap());
        let stated = StatedContact { coordinator: Some("a:1".to_owned()), token: Some(Secret::new("t")), key, tls: true };
        assert_eq!(find(&paths, &stated).unwrap().key, key);
        let keyless = find(&paths, &StatedContact { key: None, ..stated }).unwrap_err().downcast::<Failure>().unwrap();
        assert_eq!(keyless.kind, FailureKind::Mismatch, "a run with TLS is never joined without a key");
        assert!(keyless.hint.unwrap().contains("CLOZE_COORDINATOR_KEY"));
        let foreign =
            find(&paths, &StatedContact { key, tls: false, ..StatedContact::default() }).unwrap_err().downcast::<Failure>().unwrap();
        assert_eq!(foreign.what, "this run speaks in clear, and CLOZE_COORDINATOR_KEY is set");
        let nobody = find(&paths, &StatedContact::default()).unwrap_err().downcast::<Failure>().unwrap();
        assert_eq!(nobody.what, "this run has no controller");
    }

    #[test]
    fn a_file_without_the_key_of_a_run_with_one_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let paths = RunPaths::new(folder.path().to_owned());
        for tls in [false, true] {
            written(&paths, &Credentials::fresh(!tls).unwrap());
            let failure = find(&paths, &StatedContact { tls, ..StatedContact::default() }).unwrap_err().downcast::<Failure>().unwrap();
            assert_eq!(failure.kind, FailureKind::Damaged);
            assert_eq!(failure.found.as_deref(), Some(if tls { "no `tls`" } else { "a `tls`" }));
        }
    }
}
