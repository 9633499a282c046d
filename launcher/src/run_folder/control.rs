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
    /// The coordinator's private key, for a successor and for `cloze join`; `None` without TLS.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_key: Option<RunKey>,
    /// URL of the dashboard; `None` where it is switched off.
    pub dashboard: Option<String>,
    /// Process id of the controller.
    pub process_id: u32,
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
                .hint("remove it; workers that still look for their controller then leave by themselves")
        })?;
        Ok(Some(file))
    }

    /// The key that workers are given, where there is one.
    pub fn coordinator_key(&self) -> anyhow::Result<Option<PinnedKey>> {
        self.tls_key.as_ref().map(RunKey::pinned).transpose()
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
            tls_key: None,
            dashboard: Some("http://127.0.0.1:4243/".to_owned()),
            process_id: 7,
        };
        file.write(&paths).unwrap();
        assert_eq!(ControlFile::read(&paths).unwrap(), Some(file.clone()));
        assert!(!fs::read_to_string(paths.control()).unwrap().contains("tls_key"), "an earlier program reads it too");
        assert_eq!(fs::metadata(paths.control()).unwrap().permissions().mode() & 0o777, 0o600);
        let text: serde_json::Value = serde_json::from_slice(&fs::read(paths.control()).unwrap()).unwrap();
        assert_eq!((&text["address"], &text["token"]), (&"127.0.0.1:4242".into(), &"token".into()));
        let secured = ControlFile { tls_key: Some(RunKey::random().unwrap()), ..file };
        secured.write(&paths).unwrap();
        assert_eq!(ControlFile::read(&paths).unwrap().unwrap().coordinator_key().unwrap(), secured.coordinator_key().unwrap());
        assert!(secured.coordinator_key().unwrap().is_some());
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
