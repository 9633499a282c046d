//! `control.json`: where the live controller of a run can be reached, with what token and, by TLS, with what key.

use std::fs;
use std::io;
use std::net::SocketAddr;

use anyhow::Context as _;
use cloze_cluster::{PinnedKey, RunKey, Secret};
use cloze_recipes::failure::{Failure, FailureKind};
use serde::{Deserialize, Serialize};

use super::files::{SECRET, remove_if_there, storage, write_whole};
use super::paths::RunPaths;

/// What `control.json` says. It is there while a controller lives, and after one that was killed, for its successor.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControlFile {
    /// Where the coordinator listens.
    pub address: SocketAddr,
    /// The run's token.
    pub token: Secret,
    /// The coordinator's keys; `None` without TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls: Option<TlsKeys>,
    /// URL of the dashboard; `None` where it is switched off.
    pub dashboard: Option<String>,
    /// Process id of the controller.
    pub process_id: u32,
    /// Slots whose workers it starts itself, from 0; the others come by `cloze join`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local_workers: Option<u32>,
}

/// Both halves of the coordinator's key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsKeys {
    /// For a successor, whose workers know no other key.
    pub private_key: RunKey,
    /// What workers are given. Beside the private half for those who hand it on to a host that does not see this file.
    pub coordinator_key: PinnedKey,
}

impl TlsKeys {
    /// Derives the public half. Fails with kind `Damaged` when this is no key.
    pub(crate) fn of(private_key: RunKey) -> anyhow::Result<Self> {
        let coordinator_key = private_key.pinned()?;
        Ok(Self { private_key, coordinator_key })
    }
}

impl ControlFile {
    /// Reads the file; `None` when there is none, as after a run that ended.
    pub fn read(paths: &RunPaths) -> anyhow::Result<Option<Self>> {
        let path = paths.control();
        let text = match fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(storage("read control.json", &path, &error).into()),
        };
        let file = serde_json::from_slice(&text).map_err(|error| {
            Failure::new(FailureKind::Damaged, "control.json cannot be read")
                .at(path.display())
                .because(error)
                .hint("without it, workers that still live are ended, and the run goes on from its newest checkpoint")
        })?;
        Ok(Some(file))
    }

    /// Writes the file whole, so that only its owner can read it.
    pub(crate) fn write(&self, paths: &RunPaths) -> anyhow::Result<()> {
        let text = serde_json::to_vec_pretty(self).context("serialise control.json")?;
        write_whole(&paths.control(), &text, SECRET)
    }

    /// Removes the file.
    pub(crate) fn remove(paths: &RunPaths) -> anyhow::Result<()> {
        let path = paths.control();
        remove_if_there(&path).map_err(|error| storage("remove control.json", &path, &error).into())
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    #[test]
    fn is_for_its_owner_only_and_is_read_back() {
        let folder = tempfile::tempdir().unwrap();
        let paths = RunPaths::new(folder.path().to_owned());
        assert_eq!(ControlFile::read(&paths).unwrap(), None);
        let file = ControlFile {
            address: SocketAddr::from(([127, 0, 0, 1], 4242)),
            token: Secret::new("token"),
            tls: None,
            dashboard: Some("http://127.0.0.1:4243/".to_owned()),
            process_id: 7,
            local_workers: None,
        };
        file.write(&paths).unwrap();
        assert_eq!(ControlFile::read(&paths).unwrap(), Some(file.clone()));
        assert!(!fs::read_to_string(paths.control()).unwrap().contains("tls"), "an earlier program reads it too");
        assert_eq!(fs::metadata(paths.control()).unwrap().permissions().mode() & 0o777, 0o600);
        let text: serde_json::Value = serde_json::from_slice(&fs::read(paths.control()).unwrap()).unwrap();
        assert_eq!((&text["address"], &text["token"]), (&"127.0.0.1:4242".into(), &"token".into()));
        let keys = TlsKeys::of(RunKey::random().unwrap()).unwrap();
        let secured = ControlFile { tls: Some(keys.clone()), ..file };
        secured.write(&paths).unwrap();
        assert_eq!(ControlFile::read(&paths).unwrap(), Some(secured));
        let text: serde_json::Value = serde_json::from_slice(&fs::read(paths.control()).unwrap()).unwrap();
        assert_eq!(text["tls"]["coordinator_key"], keys.coordinator_key.to_string());
        assert_eq!(fs::metadata(paths.control()).unwrap().permissions().mode() & 0o777, 0o600);
        ControlFile::remove(&paths).unwrap();
        assert_eq!(ControlFile::read(&paths).unwrap(), None);
    }

    #[test]
    fn a_damaged_file_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let paths = RunPaths::new(folder.path().to_owned());
        fs::write(paths.control(), "{").unwrap();
        let failure = ControlFile::read(&paths).unwrap_err().downcast::<Failure>().unwrap();
        assert_eq!(failure.kind, FailureKind::Damaged);
    }
}
