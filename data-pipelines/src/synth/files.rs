//! The folder of a generated corpus: refusing foreign files, and clearing what a larger corpus has left.

use std::fs;
use std::io;
use std::path::Path;

use cloze_recipes::failure::{Failure, FailureKind};

use crate::files::{create_folder, disk_failure};

/// Files and folders that may stand in the corpus folder.
const TOP_NAMES: [&str; 4] = ["train", "eval", "tokenizer.json", "tokenizer_config.json"];

/// Name of a training file.
pub(crate) fn part_name(number: usize) -> String {
    format!("part-{number:04}.jsonl.gz")
}

/// Makes the corpus folder with `train` and `eval` in it. Fails where it holds anything that a corpus does not.
pub(crate) fn prepare_folder(out: &Path, evaluation_names: &[String]) -> anyhow::Result<()> {
    check_folder(out, |name| TOP_NAMES.contains(&name))?;
    check_folder(&out.join("train"), is_part)?;
    check_folder(&out.join("eval"), |name| evaluation_names.iter().any(|known| known == name))?;
    create_folder(&out.join("train"))?;
    create_folder(&out.join("eval"))?;
    Ok(())
}

/// Removes the training files from number `first` on, which a larger corpus has left.
pub(crate) fn remove_parts_from(train: &Path, first: usize) -> anyhow::Result<()> {
    for name in names_in(train)? {
        let number = name.strip_prefix("part-").and_then(|rest| rest.strip_suffix(".jsonl.gz")).and_then(|digits| digits.parse().ok());
        if number.is_some_and(|number: usize| number >= first) {
            let path = train.join(&name);
            fs::remove_file(&path).map_err(|error| disk_failure("remove file", &path, &error))?;
        }
    }
    Ok(())
}

fn is_part(name: &str) -> bool {
    let digits = name.strip_prefix("part-").and_then(|rest| rest.strip_suffix(".jsonl.gz"));
    digits.is_some_and(|digits| digits.len() >= 4 && digits.bytes().all(|byte| byte.is_ascii_digit()))
}

/// Fails where a folder that exists holds a name that is not allowed; leftovers of an interrupted write are.
fn check_folder(folder: &Path, allowed: impl Fn(&str) -> bool) -> anyhow::Result<()> {
    for name in names_in(folder)? {
        let written = name.strip_suffix(".tmp").unwrap_or(&name);
        if !allowed(written) {
            return Err(Failure::new(FailureKind::Input, "the output folder holds something else")
                .at(folder.display())
                .expected("an empty folder, a new one, or an earlier generated corpus")
                .found(name)
                .hint("choose another folder")
                .into());
        }
    }
    Ok(())
}

/// Names in a folder, sorted; none where it does not exist.
fn names_in(folder: &Path) -> anyhow::Result<Vec<String>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(|error| disk_failure("list folder", folder, &error))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|error| disk_failure("list folder", folder, &error))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort_unstable();
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn foreign_files_are_refused_by_name() {
        let folder = tempfile::tempdir().unwrap();
        let names = ["choice.jsonl".to_owned()];
        prepare_folder(folder.path(), &names).unwrap();
        fs::write(folder.path().join("train/part-0000.jsonl.gz"), "").unwrap();
        fs::write(folder.path().join("train/part-0001.jsonl.gz.tmp"), "").unwrap();
        prepare_folder(folder.path(), &names).unwrap();
        for foreign in ["notes.txt", "train/part-1.jsonl.gz", "eval/other.jsonl", ".git"] {
            let path = folder.path().join(foreign);
            fs::write(&path, "").unwrap();
            let failure = prepare_folder(folder.path(), &names).unwrap_err().downcast::<Failure>().unwrap();
            assert_eq!(failure.kind, FailureKind::Input);
            assert!(foreign.ends_with(failure.found.as_deref().unwrap()));
            fs::remove_file(path).unwrap();
        }
        let file = folder.path().join("train/part-0000.jsonl.gz");
        let failure = prepare_folder(&file, &names).unwrap_err().downcast::<Failure>().unwrap();
        assert_eq!(failure.kind, FailureKind::Storage);
    }

    #[test]
    fn parts_of_a_larger_corpus_go() {
        let folder = tempfile::tempdir().unwrap();
        for number in [0, 1, 2, 12_345] {
            fs::write(folder.path().join(part_name(number)), "").unwrap();
        }
        remove_parts_from(folder.path(), 2).unwrap();
        assert_eq!(names_in(folder.path()).unwrap(), [part_name(0), part_name(1)]);
        assert!(is_part(&part_name(12_345)) && !is_part("part-12.jsonl.gz") && !is_part("part-00a0.jsonl.gz"));
    }
}
