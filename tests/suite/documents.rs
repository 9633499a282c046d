//! What the documents say is there, and what the house rules ask of every file.

use std::ffi::OsStr;
use std::fs;
use std::path::{Path, PathBuf};

use regex::Regex;

use crate::sandbox::{World, repository};

const MAX_FILE_LINES: usize = 600;
const MAX_FUNCTION_LINES: usize = 70;

/// Folders of the repository that hold what was built or written by a run.
const FOREIGN_FOLDERS: [&str; 3] = ["target", "runs", "demo"];

fn text_of(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// Every file of the repository with this extension; hidden folders and those at the top that hold no source are left out.
fn files_with(extension: &str) -> Vec<PathBuf> {
    let mut folders = vec![repository().to_path_buf()];
    let mut found = Vec::new();
    while let Some(folder) = folders.pop() {
        let is_top = folder == repository();
        for entry in fs::read_dir(&folder).expect("list a folder").map(|entry| entry.expect("list a folder")) {
            let name = entry.file_name().to_string_lossy().into_owned();
            let path = entry.path();
            let is_foreign = name.starts_with('.') || (is_top && FOREIGN_FOLDERS.contains(&name.as_str()));
            if path.is_dir() && !is_foreign {
                folders.push(path);
            } else if path.extension().is_some_and(|found| found == extension) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

/// Whether a name in backticks is one of a file or folder.
fn is_path(name: &str) -> bool {
    let extension = Path::new(name).extension().and_then(OsStr::to_str);
    (name.contains('/') && !name.contains("://")) || extension.is_some_and(|found| ["rs", "md", "yaml", "toml", "sh"].contains(&found))
}

#[test]
fn every_path_that_the_architecture_names_exists() {
    let text = text_of(&repository().join("docs/ARCHITECTURE.md"));
    let named = Regex::new(r"`([^`\s]+)`").expect("a regular expression");
    let names = named.captures_iter(&text).map(|found| {
        let (_, [name]) = found.extract();
        name
    });
    let paths: Vec<&str> = names.filter(|name| is_path(name)).collect();
    assert!(paths.len() >= 20, "only {} paths are named", paths.len());
    let missing: Vec<&&str> = paths.iter().filter(|path| !repository().join(path).exists()).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn every_recipe_is_right() {
    let recipes = repository().join("recipes");
    let files: Vec<PathBuf> = files_with("yaml").into_iter().filter(|path| path.starts_with(&recipes)).collect();
    assert!(files.len() >= 2, "{files:?}");
    let world = World::with_corpus(100);
    for file in files {
        world.done(&["check", &file.display().to_string()]);
    }
}

#[test]
fn the_readmes_two_commands_exist() {
    let (readme, makefile) = (text_of(&repository().join("README.md")), text_of(&repository().join("Makefile")));
    for target in ["demo", "test"] {
        assert!(readme.contains(&format!("make {target}")), "README.md does not name `make {target}`");
        assert!(makefile.lines().any(|line| line.starts_with(&format!("{target}:"))), "the Makefile has no target {target}");
    }
}

#[test]
fn source_files_say_what_they_are_and_stay_short() {
    let files = files_with("rs");
    assert!(files.len() > 100, "only {} files were found", files.len());
    let function = Regex::new(r#"^\s*(pub(\([a-z]+\))? )?(const )?(async )?(unsafe )?(extern "C" )?fn "#).expect("a regular expression");
    let mut complaints = Vec::new();
    for file in &files {
        let text = text_of(file);
        let lines: Vec<&str> = text.lines().collect();
        if !text.starts_with("//!") {
            complaints.push(format!("{} does not open with `//!`", file.display()));
        }
        if lines.len() > MAX_FILE_LINES {
            complaints.push(format!("{} has {} lines", file.display(), lines.len()));
        }
        for start in (0..lines.len()).filter(|&line| function.is_match(lines[line])) {
            let length = function_lines(&lines[start..]);
            if length > MAX_FUNCTION_LINES {
                complaints.push(format!("{}:{}: a function of {length} lines", file.display(), start + 1));
            }
        }
    }
    assert!(complaints.is_empty(), "{}", complaints.join("\n"));
}

/// Lines of the function whose first line comes first; formatted code ends it with a brace below its first word.
fn function_lines(lines: &[&str]) -> usize {
    let opening = lines.iter().position(|line| line.ends_with(['{', '}', ';'])).unwrap_or(0);
    if !lines[opening].ends_with('{') {
        return opening + 1;
    }
    let indent = lines[0].len() - lines[0].trim_start().len();
    let end = format!("{:indent$}}}", "");
    lines.iter().position(|line| *line == end).map_or(lines.len(), |last| last + 1)
}
