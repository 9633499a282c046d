//! What a user is told when an object store fails.

use std::error::Error;
use std::time::Instant;

use cloze_recipes::failure::{Failure, FailureKind};

use super::Store;
use super::location::StoreKind;

/// Longest cause that is shown, in characters; some stores answer with whole pages.
const MAX_CAUSE_CHARACTERS: usize = 800;

/// Turns a store's error into a failure with url, operation, elapsed time and hint; `operation` is a verb phrase.
///
/// A missing object is of kind input, everything else of kind storage.
pub fn explain(store: &Store, operation: &str, key: &str, started: Instant, error: &object_store::Error) -> Failure {
    let (kind, what, hint) = classify(store, error);
    let cause: String = with_causes(error).chars().take(MAX_CAUSE_CHARACTERS).collect();
    Failure::new(kind, format!("failed to {operation}: {what}"))
        .at(store.url(key))
        .because(format!("{cause} (after {:.1} s)", started.elapsed().as_secs_f64()))
        .hint(hint)
}

const WRITTEN_MEANWHILE_HINT: &str = "let its writer finish, then run the same command again";

/// What a user is told when an object is not the one any more that was looked up.
pub(super) fn changed_meanwhile(url: &str) -> Failure {
    Failure::new(FailureKind::Storage, "failed to read object: the object changed meanwhile").at(url).hint(WRITTEN_MEANWHILE_HINT)
}

/// What a user is told when a store delivers less of an object than it has announced.
pub(super) fn shorter_than_said(url: &str, expected_bytes: usize, found_bytes: usize) -> Failure {
    Failure::new(FailureKind::Storage, "object is shorter than the store said")
        .at(url)
        .expected(format!("{expected_bytes} bytes"))
        .found(format!("{found_bytes} bytes"))
        .hint(WRITTEN_MEANWHILE_HINT)
}

fn classify(store: &Store, error: &object_store::Error) -> (FailureKind, &'static str, &'static str) {
    use object_store::Error as StoreError;
    let disk_full = causes(error).any(|cause| {
        cause
            .downcast_ref::<std::io::Error>()
            .is_some_and(|error| matches!(error.kind(), std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded))
    });
    // A list call hands refusals on without their kind; the answer's status is in the text of a cause.
    let answered = |status: &str| causes(error).any(|cause| cause.to_string().contains(status));
    let refused = !store.is_local() && (answered("403 Forbidden") || answered("401 Unauthorized"));
    let absent = !store.is_local() && answered("404 Not Found");
    let refused_hint = match store.kind {
        StoreKind::Bucket(cloud) => cloud.refused_hint(),
        StoreKind::Folder | StoreKind::Other => "check the permissions",
    };
    match error {
        _ if refused => (FailureKind::Storage, "access refused", refused_hint),
        _ if absent => (FailureKind::Input, "no such bucket or object", "check the bucket, the prefix and the endpoint"),
        _ if disk_full => (FailureKind::Storage, "no space left on the disk", "free space there; what was finished is kept"),
        StoreError::NotFound { .. } if store.is_local() => (FailureKind::Input, "no such file", "check the path"),
        StoreError::NotFound { .. } => (FailureKind::Input, "no such bucket or object", "check the bucket, the prefix and the endpoint"),
        StoreError::PermissionDenied { .. } | StoreError::Unauthenticated { .. } => (FailureKind::Storage, "access refused", refused_hint),
        StoreError::Precondition { .. } | StoreError::NotModified { .. } => {
            (FailureKind::Storage, "the object changed meanwhile", WRITTEN_MEANWHILE_HINT)
        }
        StoreError::AlreadyExists { .. } => {
            (FailureKind::Storage, "the object exists already", "is another program writing to the same place?")
        }
        _ if store.is_local() => (FailureKind::Storage, "the file system refused", "check the path and its permissions"),
        _ => (
            FailureKind::Storage,
            "the object store did not answer as it should",
            "check the endpoint, the network and the credentials, then run the same command again; finished work is kept",
        ),
    }
}

/// An error with all its causes in one line; causes whose text is already there are left out.
pub(super) fn with_causes(error: &(dyn Error + 'static)) -> String {
    let mut text = String::new();
    for cause in causes(error) {
        let cause = cause.to_string();
        if !text.contains(&cause) {
            if !text.is_empty() {
                text.push_str(": ");
            }
            text.push_str(cause.trim());
        }
    }
    text
}

/// An error and everything beneath it, outermost first.
pub(super) fn causes<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    std::iter::successors(Some(error), |&error| error.source())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::io;

    use super::*;

    fn generic(source: io::Error) -> object_store::Error {
        object_store::Error::Generic { store: "LocalFileSystem", source: Box::new(source) }
    }

    #[test]
    fn errors_are_sorted_by_what_the_user_can_do() {
        let store = super::super::open("/data", &BTreeMap::new()).unwrap();
        let missing = || Box::new(io::Error::new(io::ErrorKind::NotFound, "gone"));
        let cases = [
            (object_store::Error::NotFound { path: "a".into(), source: missing() }, FailureKind::Input, "no such file"),
            (object_store::Error::PermissionDenied { path: "a".into(), source: missing() }, FailureKind::Storage, "access refused"),
            (generic(io::Error::new(io::ErrorKind::StorageFull, "full")), FailureKind::Storage, "no space left on the disk"),
            (generic(io::Error::other("odd")), FailureKind::Storage, "the file system refused"),
        ];
        for (error, kind, what) in cases {
            let failure = explain(&store, "read object", "a", Instant::now(), &error);
            assert_eq!(failure.kind, kind);
            assert_eq!(failure.what, format!("failed to read object: {what}"));
            assert_eq!(failure.place.as_deref(), Some("/data/a"));
        }
    }

    #[test]
    fn causes_are_kept_once() {
        let error = generic(io::Error::other("socket closed"));
        assert_eq!(with_causes(&error).matches("socket closed").count(), 1);
    }
}
