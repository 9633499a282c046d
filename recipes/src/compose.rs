//! One tree from a recipe file, the files that it extends, a profile, and the overrides of the command line.

mod assign;
mod profile;

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::failure::{Failure, FailureKind};
use crate::paths;
use crate::problem::Problems;
use crate::tree::{self, MAX_RECIPE_BYTES, Node, Origin, Place, Scalar, Value};

pub(crate) use assign::{AFTER, assign};
pub(crate) use profile::{ProfileChoice, profile_names};

/// Longest chain of files that extend each other.
const MAX_EXTENDS_FILES: usize = 16;
/// The key that names the base; it is gone from the composed tree.
const EXTENDS: &str = "extends";
/// The key of the profiles; they stay in the composed tree.
pub(crate) const PROFILES: &str = "profiles";
/// What messages call a recipe file.
const RECIPE: &str = "recipe";

/// Reads the file, merges it over its bases, the profile over it and the overrides over that.
///
/// Fails on a file that is missing, too large, not UTF-8 or not YAML, on files that extend each other in a circle, and on a profile that is
/// asked for and not there. What is wrong with an override or a profile goes to `problems`.
pub(crate) fn compose(
    path: &Path,
    overrides: &[String],
    profile: Option<ProfileChoice<'_>>,
    current_folder: &Path,
    problems: &mut Problems,
) -> anyhow::Result<Node> {
    let mut root = read(path, &path.display().to_string(), &mut Vec::new())?;
    profile::check_profiles(&root, problems);
    if let Some(choice) = profile {
        profile::apply_profile(&mut root, choice)?;
    }
    for text in overrides {
        let origin = Arc::new(Origin::Override { text: text.clone(), folder: current_folder.to_path_buf() });
        if let Err((key_path, message)) = assign::apply_override(&mut root, text, &origin) {
            problems.push(&Place::start(&origin), &key_path, message);
        }
    }
    Ok(root)
}

/// Reads one file and, first, what it extends. `chain` holds the files that wait for this one.
fn read(path: &Path, shown: &str, chain: &mut Vec<PathBuf>) -> anyhow::Result<Node> {
    let text = read_text(path, shown, RECIPE)?;
    check_chain(path, shown, chain)?;
    let mut root = parse_map(path, shown, &text, RECIPE)?;
    let Some(base) = take_base(&mut root)? else { return Ok(root) };
    let folder = root.place.folder().to_path_buf();
    let shown_base = Path::new(shown).parent().unwrap_or(Path::new("")).join(&base);
    let mut merged = read(&folder.join(&base), &shown_base.display().to_string(), chain)?;
    assign::merge(&mut merged, root);
    Ok(merged)
}

/// Reads a file that extends no other; `noun` is what messages call it.
pub(crate) fn read_alone(path: &Path, noun: &str) -> anyhow::Result<Node> {
    let shown = path.display().to_string();
    let text = read_text(path, &shown, noun)?;
    parse_map(path, &shown, &text, noun)
}

/// The text as a tree whose root is a map.
fn parse_map(path: &Path, shown: &str, text: &str, noun: &str) -> anyhow::Result<Node> {
    let folder = paths::canonical_folder(path.parent().unwrap_or(Path::new(".")))?;
    let origin = Arc::new(Origin::File { shown: shown.to_owned(), folder });
    let root = tree::parse(text, &origin).map_err(|error| {
        Failure::new(FailureKind::Recipe, format!("cannot read the {noun} as YAML")).at(error.place).because(error.message)
    })?;
    if !matches!(root.value, Value::Map(_)) {
        let failure = Failure::new(FailureKind::Recipe, format!("a {noun} is a map of keys")).at(shown);
        return Err(failure.expected("a map").found(root).into());
    }
    Ok(root)
}

/// The whole file as text, if it is small enough and UTF-8.
fn read_text(path: &Path, shown: &str, noun: &str) -> anyhow::Result<String> {
    let unreadable = |error: std::io::Error| Failure::new(FailureKind::Recipe, format!("cannot read the {noun}")).at(shown).because(error);
    let mut bytes = Vec::new();
    let file = File::open(path).map_err(unreadable)?;
    file.take(MAX_RECIPE_BYTES as u64 + 1).read_to_end(&mut bytes).map_err(unreadable)?;
    if bytes.len() > MAX_RECIPE_BYTES {
        let failure = Failure::new(FailureKind::Recipe, format!("the {noun} is too large")).at(shown);
        return Err(failure.expected(format!("at most {MAX_RECIPE_BYTES} bytes")).into());
    }
    let text = String::from_utf8(bytes).map_err(|error| {
        let place = format!("{shown}, byte {}", error.utf8_error().valid_up_to());
        Failure::new(FailureKind::Recipe, format!("the {noun} is not UTF-8")).at(place)
    })?;
    Ok(text)
}

/// Refuses a file that waits for itself, and a chain beyond the bound; else adds the file to the chain.
fn check_chain(path: &Path, shown: &str, chain: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let file = path.canonicalize().map_err(|error| Failure::new(FailureKind::Recipe, "cannot read the recipe").at(shown).because(error))?;
    if chain.contains(&file) {
        let names: Vec<String> = chain.iter().chain([&file]).map(|file| file.display().to_string()).collect();
        let failure = Failure::new(FailureKind::Recipe, "recipes extend each other in a circle").at(shown);
        return Err(failure.found(names.join(" -> ")).into());
    }
    if chain.len() >= MAX_EXTENDS_FILES {
        let failure = Failure::new(FailureKind::Recipe, "too many recipes extend each other").at(shown);
        return Err(failure.expected(format!("at most {MAX_EXTENDS_FILES} files")).into());
    }
    chain.push(file);
    Ok(())
}

/// Takes `extends` out of the map; `None` where it is absent or unset.
fn take_base(root: &mut Node) -> anyhow::Result<Option<String>> {
    let Value::Map(entries) = &mut root.value else { return Ok(None) };
    let Some(index) = entries.iter().position(|entry| entry.key == EXTENDS) else { return Ok(None) };
    let node = entries.remove(index).node;
    match node.value {
        Value::Scalar(Scalar::Null) => Ok(None),
        Value::Scalar(Scalar::Text(base)) if !base.is_empty() => Ok(Some(base)),
        _ => {
            let failure = Failure::new(FailureKind::Recipe, "cannot tell what the recipe extends").at(&node.place);
            Err(failure.expected("the path of a recipe, relative to this file").found(&node).into())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn composed(files: &[(&str, &str)], overrides: &[&str]) -> (anyhow::Result<Node>, Problems) {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
        let mut problems = Problems::default();
        let root = compose(&folder.path().join(files[0].0), &overrides, None, Path::new("/current"), &mut problems);
        (root, problems)
    }

    fn json(files: &[(&str, &str)], overrides: &[&str]) -> String {
        let (root, problems) = composed(files, overrides);
        assert!(problems.is_empty(), "{}", problems.into_failure("r.yaml"));
        root.unwrap().json().to_string()
    }

    #[test]
    fn maps_merge_lists_replace_and_null_unsets() {
        let base = ("sub/base.yaml", "a: {x: 1, y: 2}\nlist: [1, 2]\ngone: 3\n");
        let child = ("child.yaml", "extends: sub/base.yaml\na: {y: 5, z: 6}\nlist: [7]\ngone: null\n");
        assert_eq!(json(&[child, base], &[]), r#"{"a":{"x":1,"y":5,"z":6},"list":[7]}"#);
    }

    #[test]
    fn a_chain_is_relative_to_each_file_and_places_keep_their_file() {
        let files = [
            ("child.yaml", "extends: one/middle.yaml\na: 1\n"),
            ("one/middle.yaml", "extends: ../two/base.yaml\nb: 2\n"),
            ("two/base.yaml", "c: 3\npath: here\n"),
        ];
        let (root, _) = composed(&files, &[]);
        let root = root.unwrap();
        assert_eq!(root.json().to_string(), r#"{"c":3,"path":"here","b":2,"a":1}"#);
        assert!(root.place_of("path").folder().ends_with("two"));
        assert!(root.place_of("b").to_string().ends_with("one/middle.yaml:2:4"), "{}", root.place_of("b"));
    }

    #[test]
    fn a_circle_is_refused() {
        let (root, _) = composed(&[("a.yaml", "extends: b.yaml\n"), ("b.yaml", "extends: a.yaml\n")], &[]);
        let error = root.unwrap_err();
        let failure = error.downcast_ref::<Failure>().unwrap();
        assert_eq!(failure.what, "recipes extend each other in a circle");
        assert_eq!(failure.found.as_ref().unwrap().matches(" -> ").count(), 2);
    }

    #[test]
    fn unreadable_files_are_failures_with_a_place() {
        let table: [(&[(&str, &str)], &str, &str); 4] = [
            (&[("a.yaml", "extends: none.yaml\n")], "cannot read the recipe", "none.yaml"),
            (&[("a.yaml", "a: 1\nb: [\n")], "cannot read the recipe as YAML", "a.yaml:"),
            (&[("a.yaml", "- 1\n")], "a recipe is a map of keys", "a.yaml"),
            (&[("a.yaml", "extends: 3\n")], "cannot tell what the recipe extends", "a.yaml:1:10"),
        ];
        for (files, what, place) in table {
            let error = composed(files, &[]).0.unwrap_err();
            let failure = error.downcast_ref::<Failure>().unwrap();
            assert_eq!(failure.what, what);
            assert!(failure.place.as_ref().unwrap().contains(place), "{failure}");
        }
    }

    #[test]
    fn overrides_replace_make_and_unset() {
        let file = ("r.yaml", "a: {x: 1, y: 2}\nlist: [{k: 1}, {k: 2}]\n");
        let table = [
            ("a.x=5", r#"{"a":{"x":5,"y":2},"list":[{"k":1},{"k":2}]}"#),
            ("a.x=", r#"{"a":{"y":2},"list":[{"k":1},{"k":2}]}"#),
            ("a.x=null", r#"{"a":{"y":2},"list":[{"k":1},{"k":2}]}"#),
            ("list.1.k=7", r#"{"a":{"x":1,"y":2},"list":[{"k":1},{"k":7}]}"#),
            ("list=[3]", r#"{"a":{"x":1,"y":2},"list":[3]}"#),
            ("new.deep=\"[x]\"", r#"{"a":{"x":1,"y":2},"list":[{"k":1},{"k":2}],"new":{"deep":"[x]"}}"#),
            ("a={x: 9}", r#"{"a":{"x":9,"y":2},"list":[{"k":1},{"k":2}]}"#),
        ];
        for (text, expected) in table {
            assert_eq!(json(&[file], &[text]), expected, "{text}");
        }
    }

    #[test]
    fn wrong_overrides_are_problems_that_quote_them() {
        let file = ("r.yaml", "a: {x: 1}\nlist: [1]\n");
        let table = [
            ("a.x", "--set a.x: expected `key.path=value`"),
            ("a..x=1", "--set a..x=1: a..x: expected keys joined by dots, such as `train.steps`"),
            ("a.x.y=1", "--set a.x.y=1: a.x.y: found 1, expected a map or a list that has `y`"),
            ("list.1=1", "--set list.1=1: list.1: found `1`, expected the index of an item, from 0, in a list of 1"),
            ("extends=b.yaml", "--set extends=b.yaml: extends: a base is named in the recipe file, not by an override"),
        ];
        for (text, expected) in table {
            let (_, problems) = composed(&[file], &[text]);
            assert_eq!(problems.into_failure("r.yaml").what, format!("1 problem in r.yaml\n{expected}"), "{text}");
        }
    }
}
