//! Profiles: maps that are laid over the recipe when they are asked for by name.

use super::assign::merge;
use super::{EXTENDS, PROFILES};
use crate::failure::{Failure, FailureKind};
use crate::problem::Problems;
use crate::tree::{Entry, Node, Value};
use crate::validate::nearest;

/// Most profiles of one recipe; each is checked like a recipe of its own.
const MAX_PROFILES: usize = 32;

/// A profile that was asked for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProfileChoice<'name> {
    /// Its name.
    pub(crate) name: &'name str,
    /// Whether a recipe without it is wrong; an earlier stage need not have it.
    pub(crate) required: bool,
}

/// The names of the recipe's profiles, in order; those that are unset with `null` are not there.
pub(crate) fn profile_names(root: &Node) -> Vec<&str> {
    let Some(Value::Map(entries)) = root.get(PROFILES).map(|node| &node.value) else { return Vec::new() };
    entries.iter().filter(|entry| !entry.node.is_null()).map(|entry| entry.key.as_str()).collect()
}

/// What no profile may say, whether it is asked for or not.
pub(super) fn check_profiles(root: &Node, problems: &mut Problems) {
    let Some(profiles) = root.get(PROFILES) else { return };
    let names = profile_names(root);
    if names.len() > MAX_PROFILES {
        let message = format!("found {} profiles, expected at most {MAX_PROFILES}", names.len());
        problems.push(root.place_at([PROFILES]), PROFILES, message);
    }
    for name in names {
        for (key, message) in [
            (EXTENDS, "a profile does not extend a recipe; the recipe does"),
            (PROFILES, "a profile holds no profiles"),
            ("version", "the version is the recipe's, whatever the profile"),
        ] {
            if profiles.get(name).and_then(|profile| profile.get(key)).is_some() {
                problems.push(profiles.place_at([name, key]), &format!("{PROFILES}.{name}.{key}"), message);
            }
        }
    }
}

/// Lays the profile over the recipe. Fails where a required one is not there.
pub(super) fn apply_profile(root: &mut Node, choice: ProfileChoice<'_>) -> Result<(), Failure> {
    let profile = root.get(PROFILES).and_then(|profiles| profiles.get(choice.name)).cloned();
    match profile {
        Some(Node { place, value: Value::Map(entries) }) => {
            let kept: Vec<Entry> = entries.into_iter().filter(|entry| ![EXTENDS, PROFILES].contains(&entry.key.as_str())).collect();
            merge(root, Node { place, value: Value::Map(kept) });
            Ok(())
        }
        None if choice.required => Err(unknown_profile(root, choice.name)),
        // What is not a map is reported by the schema.
        _ => Ok(()),
    }
}

fn unknown_profile(root: &Node, name: &str) -> Failure {
    let names = profile_names(root);
    let failure = Failure::new(FailureKind::Recipe, format!("the recipe has no profile `{}`", crate::tree::shortened(name)))
        .at(root.place_at([PROFILES]).file());
    if let Some(meant) = nearest(name, names.iter().copied()) {
        return failure.hint(format!("did you mean `{meant}`?"));
    }
    let known = if names.is_empty() { "none".to_owned() } else { format!("`{}`", names.join("`, `")) };
    failure.found(format!("profiles: {known}"))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::compose::compose;

    const TEXT: &str = "a: {x: 1, y: 2}\nlist: [1, 2]\nb: 3
profiles:
  toy: {a: {x: 9}, list: [7], b: null}
  gone: null
";

    fn composed(text: &str, choice: Option<ProfileChoice<'_>>, overrides: &[&str]) -> (anyhow::Result<Node>, Problems) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("r.yaml");
        std::fs::write(&path, text).unwrap();
        let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
        let mut problems = Problems::default();
        let root = compose(&path, &overrides, choice, Path::new("/current"), &mut problems);
        (root, problems)
    }

    fn merged(choice: Option<ProfileChoice<'_>>, overrides: &[&str]) -> String {
        let (root, problems) = composed(TEXT, choice, overrides);
        assert!(problems.is_empty(), "{}", problems.into_failure("r.yaml"));
        let mut root = root.unwrap();
        if let Value::Map(entries) = &mut root.value {
            entries.retain(|entry| entry.key != PROFILES);
        }
        root.json().to_string()
    }

    #[test]
    fn a_profile_lies_between_the_file_and_the_overrides() {
        let toy = ProfileChoice { name: "toy", required: true };
        assert_eq!(merged(None, &[]), r#"{"a":{"x":1,"y":2},"list":[1,2],"b":3}"#);
        assert_eq!(merged(Some(toy), &[]), r#"{"a":{"x":9,"y":2},"list":[7]}"#);
        assert_eq!(merged(Some(toy), &["a.x=5", "b=4"]), r#"{"a":{"x":5,"y":2},"list":[7],"b":4}"#);
        let other = ProfileChoice { name: "other", required: false };
        assert_eq!(merged(Some(other), &[]), merged(None, &[]), "an earlier stage need not have the profile");
    }

    #[test]
    fn a_profile_that_is_not_there_is_told_with_those_that_are() {
        let table = [("toi", "hint: did you mean `toy`?"), ("paper", "found: profiles: `toy`"), ("gone", "found: profiles: `toy`")];
        for (name, expected) in table {
            let (root, _) = composed(TEXT, Some(ProfileChoice { name, required: true }), &[]);
            let text = root.unwrap_err().to_string();
            assert!(text.starts_with(&format!("the recipe has no profile `{name}`\n")), "{text}");
            assert!(text.contains("r.yaml\n") && text.contains(expected), "{text}");
        }
    }

    #[test]
    fn what_no_profile_may_say_is_a_problem() {
        let (_, problems) = composed("a: 1\nprofiles:\n  toy: {extends: b.yaml, profiles: {}, version: 1}\n", None, &[]);
        let text = problems.into_failure("r.yaml").what;
        for expected in ["r.yaml:3:18: profiles.toy.extends: a profile does not extend", ": profiles.toy.profiles: a profile holds no"] {
            assert!(text.contains(expected), "{text}");
        }
        let (_, problems) = composed("a: 1\n", None, &["profiles.toy.a=1"]);
        let text = problems.into_failure("r.yaml").what;
        assert!(text.ends_with("profiles.toy.a: a profile is stated in the recipe file; choose it with `--profile`"), "{text}");
    }
}
