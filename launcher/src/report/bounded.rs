//! Files from outside, read whole and within a bound.

use std::fs::{self, File};
use std::io::{ErrorKind, Read as _};
use std::path::Path;

use cloze_recipes::failure::{Failure, FailureKind};
use serde::de::DeserializeOwned;

/// The content of a file; `None` where there is none. Fails with kind `Damaged` on one that is too large or no plain file, and with kind
/// `Storage` when it cannot be read.
pub fn read(path: &Path, max_bytes: u64) -> Result<Option<Vec<u8>>, Failure> {
    let unreadable = |error: std::io::Error| Failure::new(FailureKind::Storage, "a file cannot be read").at(path.display()).because(error);
    // Whoever opens a pipe waits for its writer.
    match fs::metadata(path) {
        Ok(metadata) if !metadata.is_file() => return Err(Failure::new(FailureKind::Damaged, "no plain file").at(path.display())),
        Ok(_) => {}
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::NotADirectory) => return Ok(None),
        Err(error) => return Err(unreadable(error)),
    }
    let mut bytes = Vec::new();
    File::open(path).and_then(|file| file.take(max_bytes + 1).read_to_end(&mut bytes)).map_err(unreadable)?;
    if bytes.len() as u64 > max_bytes {
        let failure = Failure::new(FailureKind::Damaged, "a file is too large").at(path.display());
        return Err(failure.expected(format!("at most {max_bytes} bytes")));
    }
    Ok(Some(bytes))
}

/// The same as JSON of a type. Fails with kind `Damaged` too where it is none.
pub fn read_json<T: DeserializeOwned>(path: &Path, max_bytes: u64) -> Result<Option<T>, Failure> {
    let Some(bytes) = read(path, max_bytes)? else { return Ok(None) };
    serde_json::from_slice(&bytes)
        .map(Some)
        .map_err(|error| Failure::new(FailureKind::Damaged, "a file is not what it should be").at(path.display()).because(error))
}

/// A failure as one line, for a report's notes.
pub fn note(failure: &Failure) -> String {
    let parts = [Some(&failure.what), failure.cause.as_ref()];
    let words: Vec<&str> = parts.into_iter().flatten().map(String::as_str).collect();
    let place = failure.place.as_deref().unwrap_or("somewhere");
    let expected = failure.expected.as_ref().map_or_else(String::new, |expected| format!(", expected {expected}"));
    format!("{place}: {}{expected}; passed over", words.join(": "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_too_large_or_no_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.json");
        assert_eq!(read(&path, 4).unwrap(), None);
        fs::write(&path, "12345").unwrap();
        let failure = read(&path, 4).unwrap_err();
        assert_eq!((failure.kind, failure.expected.as_deref()), (FailureKind::Damaged, Some("at most 4 bytes")));
        assert_eq!(read_json::<u32>(&path, 5).unwrap(), Some(12_345));
        assert!(note(&read_json::<String>(&path, 5).unwrap_err()).contains("a.json: a file is not what it should be: invalid type"));
        assert_eq!(read(folder.path(), 4).unwrap_err().what, "no plain file");
        assert_eq!(read(&path.join("below"), 4).unwrap(), None);
    }
}
