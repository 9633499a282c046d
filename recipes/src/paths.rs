//! Paths in a recipe: relative ones become absolute, against the folder of whoever states them.

use std::path::{Component, Path, PathBuf};

use crate::failure::{Failure, FailureKind};

/// The path as an absolute one. `folder` must be canonical: then a leading `..` is the parent that the file system means.
pub(crate) fn resolve(folder: &Path, stated: &str) -> PathBuf {
    let stated = Path::new(stated);
    if stated.is_absolute() {
        return stated.to_path_buf();
    }
    let mut resolved = folder.to_path_buf();
    // A `..` after a name stays as it is: the name may be a link, and only the file system knows its parent.
    let mut leading = true;
    for component in stated.components() {
        match component {
            Component::CurDir => {}
            Component::ParentDir if leading => {
                resolved.pop();
            }
            other => {
                leading = false;
                resolved.push(other);
            }
        }
    }
    resolved
}

/// The folder without links and relative parts; it must exist and its name must be UTF-8, because a recipe is.
pub(crate) fn canonical_folder(folder: &Path) -> anyhow::Result<PathBuf> {
    let folder = if folder.as_os_str().is_empty() { Path::new(".") } else { folder };
    let canonical = folder
        .canonicalize()
        .map_err(|error| Failure::new(FailureKind::Recipe, "cannot find the folder of the recipe").at(folder.display()).because(error))?;
    if canonical.to_str().is_none() {
        let failure = Failure::new(FailureKind::Recipe, "cannot write the folder into a recipe").at(canonical.display());
        return Err(failure.expected("a folder name in UTF-8").into());
    }
    Ok(canonical)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn relative_paths_start_at_the_folder() {
        let table = [
            ("corpus", "/a/b/corpus"),
            ("./corpus/x.json", "/a/b/corpus/x.json"),
            ("../corpus", "/a/corpus"),
            ("../../corpus", "/corpus"),
            ("../../../corpus", "/corpus"),
            ("link/../corpus", "/a/b/link/../corpus"),
            ("/else/where", "/else/where"),
        ];
        for (stated, expected) in table {
            assert_eq!(resolve(Path::new("/a/b"), stated), PathBuf::from(expected), "{stated}");
        }
    }
}
