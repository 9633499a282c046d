//! A copy of the newest checkpoint on a local disk, so that a restart need not fetch it. Never needed, and never trusted: what is read
//! from here has the size and the hash that the manifest states.

use std::fs::{self, File};
use std::io::{self, Read as _, Write as _};
use std::path::{Path, PathBuf};

use bytes::Bytes;

use super::manifest::{ManifestFile, folder, is_file_name, step_of_folder};

/// Begins the names of the cache's own folders: a cache that is put into a folder of checkpoints must not take them for its own.
const PREFIX: &str = "cached-";

/// Copies of one checkpoint's files.
#[derive(Debug)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// A cache in a folder, which is made when something is written.
    pub fn new(folder: PathBuf) -> Self {
        Self { folder }
    }

    /// The copy of a file, if there is one and it is what the manifest states.
    pub fn read(&self, step: u64, file: &ManifestFile) -> Option<Bytes> {
        if !is_file_name(&file.name) {
            return None;
        }
        let path = self.step_folder(step).join(&file.name);
        let content = match read_file(&path, file.size) {
            Ok(content) => content?,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => {
                tracing::warn!(file = %path.display(), %error, "cached file of a checkpoint cannot be read");
                return None;
            }
        };
        if blake3::hash(&content).to_hex().as_str() == file.blake3 {
            return Some(content.into());
        }
        tracing::warn!(file = %path.display(), "cached file of a checkpoint is damaged; the store's is taken");
        None
    }

    /// Keeps a copy of a file. Where that fails, for instance for want of space, the step's other copies go too, with a warning.
    pub fn write(&self, step: u64, name: &str, pieces: &[Bytes]) {
        let step_folder = self.step_folder(step);
        if let Err(error) = write_file(&step_folder, name, pieces) {
            tracing::warn!(folder = %step_folder.display(), %error, "checkpoint not cached; a restart will fetch it from the store");
            remove(&step_folder);
        }
    }

    /// Removes the copies of all other checkpoints, and what interrupted writes have left of this one.
    pub fn keep_only(&self, step: u64) {
        let Ok(entries) = fs::read_dir(&self.folder) else { return };
        for entry in entries.flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            match name.strip_prefix(PREFIX).and_then(step_of_folder) {
                Some(other) if other != step => remove(&entry.path()),
                Some(_) => remove_hidden(&entry.path()),
                None => {}
            }
        }
    }

    fn step_folder(&self, step: u64) -> PathBuf {
        self.folder.join(format!("{PREFIX}{}", folder(step)))
    }
}

/// The content of a file of this size; `None` where it has another one.
fn read_file(path: &Path, size: u64) -> io::Result<Option<Vec<u8>>> {
    let file = File::open(path)?;
    if file.metadata()?.len() != size {
        return Ok(None);
    }
    let mut content = Vec::with_capacity(size as usize);
    file.take(size).read_to_end(&mut content)?;
    Ok(Some(content))
}

/// Writes under a hidden name first. Nothing is flushed to the disk: after a crash the hash tells.
fn write_file(step_folder: &Path, name: &str, pieces: &[Bytes]) -> io::Result<()> {
    fs::create_dir_all(step_folder)?;
    let partial = step_folder.join(format!(".{name}.{}", std::process::id()));
    let mut file = File::create(&partial)?;
    for piece in pieces {
        file.write_all(piece)?;
    }
    fs::rename(partial, step_folder.join(name))
}

fn remove(folder: &Path) {
    if let Err(error) = fs::remove_dir_all(folder)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(folder = %folder.display(), %error, "old cached checkpoint cannot be removed");
    }
}

fn remove_hidden(folder: &Path) {
    let Ok(entries) = fs::read_dir(folder) else { return };
    for entry in entries.flatten().filter(|entry| entry.file_name().to_string_lossy().starts_with('.')) {
        // Another process of this machine may have done the same.
        drop(fs::remove_file(entry.path()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, content: &[u8]) -> ManifestFile {
        ManifestFile { name: name.to_owned(), size: content.len() as u64, blake3: blake3::hash(content).to_hex().to_string() }
    }

    #[test]
    fn only_what_the_manifest_states_is_found() {
        let place = tempfile::tempdir().unwrap();
        let cache = Cache::new(place.path().join("cache"));
        let good = file("model.safetensors", b"weights");
        assert_eq!(cache.read(3, &good), None);
        cache.write(3, &good.name, &[Bytes::from_static(b"wei"), Bytes::from_static(b"ghts")]);
        assert_eq!(cache.read(3, &good).unwrap(), "weights");
        assert_eq!(cache.read(4, &good), None);
        for other in [file("model.safetensors", b"WEIGHTS"), file("model.safetensors", b"weight"), file("../x", b"")] {
            assert_eq!(cache.read(3, &other), None, "{}", other.name);
        }
        fs::write(place.path().join("cache/cached-step-000000000003/model.safetensors"), "weighty").unwrap();
        assert_eq!(cache.read(3, &good), None);
    }

    #[test]
    fn one_checkpoint_is_kept_and_foreign_files_stay() {
        let place = tempfile::tempdir().unwrap();
        let cache = Cache::new(place.path().to_owned());
        for step in [1, 2, 3] {
            cache.write(step, "a", &[Bytes::from_static(b"a")]);
        }
        fs::write(place.path().join("cached-step-000000000002/.b.77"), "half").unwrap();
        fs::create_dir(place.path().join("step-000000000001")).unwrap();
        fs::write(place.path().join("notes"), "").unwrap();
        cache.keep_only(2);
        let names = |path: &Path| {
            let mut names: Vec<_> = fs::read_dir(path).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
            names.sort();
            names
        };
        assert_eq!(names(place.path()), ["cached-step-000000000002", "notes", "step-000000000001"]);
        assert_eq!(names(&place.path().join("cached-step-000000000002")), ["a"]);
        Cache::new(place.path().join("none")).keep_only(1);
    }

    #[test]
    fn a_cache_that_cannot_be_written_is_no_failure() {
        let place = tempfile::tempdir().unwrap();
        fs::write(place.path().join("file"), "").unwrap();
        let cache = Cache::new(place.path().join("file"));
        cache.write(1, "a", &[Bytes::from_static(b"a")]);
        assert_eq!(cache.read(1, &file("a", b"a")), None);
    }
}
