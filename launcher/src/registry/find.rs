//! Where run folders are.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use cloze_recipes::failure::{Failure, FailureKind};

/// Where runs are looked for when nothing is said: what `cloze train` and what sweeps make.
pub const DEFAULT_ROOTS: [&str; 2] = ["runs", "studies"];

/// Most run folders of one listing.
const MAX_RUNS: usize = 100_000;

/// The run folders of each root: the root itself, the folders in it, those in a folder `runs` of it or of one of its folders, as in a
/// folder of studies, and those of a folder `studies` in it, as in the folder of a cluster. Sorted by path. Fails with kind `Input` on a
/// root that is not there, with kind `Storage` when one cannot be listed, and with kind `Recipe` when there are too many runs.
pub fn find_runs(roots: &[PathBuf]) -> Result<Vec<PathBuf>, Failure> {
    let mut runs = Vec::new();
    for root in roots {
        if is_run(root) {
            runs.push(root.clone());
            continue;
        }
        for folder in folders_in(root)? {
            if is_run(&folder) {
                runs.push(folder);
            } else if folder.ends_with("runs") {
                runs.extend(runs_in(&folder)?);
            } else if folder.join("runs").is_dir() {
                runs.extend(runs_in(&folder.join("runs"))?);
            } else if folder.ends_with("studies") {
                for study in folders_in(&folder)?.iter().map(|study| study.join("runs")).filter(|runs| runs.is_dir()) {
                    runs.extend(runs_in(&study)?);
                }
            }
            if runs.len() > MAX_RUNS {
                let failure = Failure::new(FailureKind::Recipe, "too many runs for one listing").at(root.display());
                return Err(failure.expected(format!("at most {MAX_RUNS}")).hint("name a smaller folder with `--root`"));
            }
        }
    }
    runs.sort();
    runs.dedup();
    Ok(runs)
}

fn runs_in(folder: &Path) -> Result<Vec<PathBuf>, Failure> {
    Ok(folders_in(folder)?.into_iter().filter(|folder| is_run(folder)).collect())
}

fn is_run(folder: &Path) -> bool {
    folder.join("run.json").exists() || folder.join("events.jsonl").exists()
}

fn folders_in(root: &Path) -> Result<Vec<PathBuf>, Failure> {
    let failed = |error: io::Error| {
        let kind = if error.kind() == io::ErrorKind::NotFound { FailureKind::Input } else { FailureKind::Storage };
        Failure::new(kind, "a folder of runs cannot be listed").at(root.display()).because(error)
    };
    let mut folders = Vec::new();
    for entry in fs::read_dir(root).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let is_hidden = entry.file_name().to_string_lossy().starts_with('.');
        if !is_hidden && entry.path().is_dir() {
            folders.push(entry.path());
        }
    }
    folders.sort();
    Ok(folders)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_and_studies_are_found_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let at = |path: &str| root.path().join(path);
        for run in ["runs/a", "runs/b", "studies/s/runs/s-1", "studies/s/runs/s-2", "studies/t/runs/t-1", "runs/.hidden"] {
            fs::create_dir_all(at(run)).unwrap();
            fs::write(at(run).join("run.json"), "{}").unwrap();
        }
        for other in ["runs/empty", "studies/s/data/x", "studies/u"] {
            fs::create_dir_all(at(other)).unwrap();
        }
        fs::write(at("runs/file"), "").unwrap();
        let found = |roots: &[&str]| -> Vec<String> {
            let roots: Vec<PathBuf> = roots.iter().map(|path| at(path)).collect();
            let runs = find_runs(&roots).unwrap();
            runs.iter().map(|run| run.strip_prefix(root.path()).unwrap().display().to_string()).collect()
        };
        let in_studies = ["studies/s/runs/s-1", "studies/s/runs/s-2", "studies/t/runs/t-1"];
        assert_eq!(found(&["runs", "studies"]), [["runs/a", "runs/b"].as_slice(), &in_studies].concat());
        assert_eq!(found(&["studies/s"]), in_studies[..2]);
        assert_eq!(found(&["runs/a", "runs/a"]), ["runs/a"]);
        // The folder of a cluster has both.
        assert_eq!(found(&[""]), [["runs/a", "runs/b"].as_slice(), &in_studies].concat());
        assert_eq!(find_runs(&[at("nowhere")]).unwrap_err().kind, FailureKind::Input);
    }
}
