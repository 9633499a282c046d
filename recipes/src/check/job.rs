//! What ends in the script of a job: container, modules, variables and lines of shell, of a recipe and of a cluster file.
//!
//! All of it is written into scripts line by line, so nothing may hold a line break or another control character; and scripts lie in run
//! folders, so nothing may be a secret.

use std::collections::BTreeMap;

use super::Context;
use crate::raw::ContainerRaw;
use crate::study::Container;
use crate::tree::shortened;

/// Longest text that ends in a script, in bytes.
const MAX_TEXT_BYTES: usize = 4096;
/// Most entries of a list or map of this kind.
const MAX_ENTRIES: usize = 256;

/// Words of a variable's name that make it a secret, where they stand between `_`.
const SECRET_WORDS: [&str; 8] = ["SECRET", "SECRETS", "TOKEN", "PASSWORD", "PASSWD", "PASSPHRASE", "CREDENTIAL", "CREDENTIALS"];
/// And pairs of words that do.
const SECRET_PAIRS: [[&str; 2]; 4] = [["API", "KEY"], ["ACCESS", "KEY"], ["PRIVATE", "KEY"], ["ACCOUNT", "KEY"]];

pub(super) fn container(context: &mut Context<'_>, raw: ContainerRaw) -> Container {
    word(context, &["container", "image"], &raw.image);
    entries(context, &["container", "mounts"], raw.mounts.len());
    for (index, mount) in raw.mounts.iter().enumerate() {
        let number = index.to_string();
        let keys = ["container", "mounts", &number];
        word(context, &keys, mount);
        let parts: Vec<&str> = mount.split(':').collect();
        if !(2..=3).contains(&parts.len()) || parts.iter().any(|part| part.is_empty()) || mount.contains(',') {
            context.mismatch_in(&keys, format!("`{}`", shortened(mount)), "`SRC:DST` or `SRC:DST:FLAGS`, without commas");
        }
    }
    Container { image: raw.image, mounts: raw.mounts }
}

pub(super) fn modules(context: &mut Context<'_>, modules: &[String]) {
    entries(context, &["modules"], modules.len());
    for (index, module) in modules.iter().enumerate() {
        word(context, &["modules", &index.to_string()], module);
    }
}

pub(super) fn setup(context: &mut Context<'_>, lines: &[String]) {
    entries(context, &["setup"], lines.len());
    for (index, line) in lines.iter().enumerate() {
        text(context, &["setup", &index.to_string()], line);
    }
}

pub(super) fn environment(context: &mut Context<'_>, variables: &BTreeMap<String, String>) {
    entries(context, &["environment"], variables.len());
    for (name, value) in variables {
        let keys = ["environment", name.as_str()];
        if !is_variable(name) {
            context.mismatch_in(&keys, format!("`{}`", shortened(name)), "letters, digits and `_`, the first no digit");
        } else if is_secret(name) {
            context.problem_in(&keys, "a secret does not belong into this file; set it in the environment that the program is started in");
        }
        text(context, &keys, value);
    }
}

/// A text of one line without control characters.
pub(super) fn text(context: &mut Context<'_>, keys: &[&str], stated: &str) {
    if stated.chars().any(char::is_control) {
        context.mismatch_in(keys, format!("`{}`", shortened(stated)), "one line without control characters");
    } else if stated.len() > MAX_TEXT_BYTES {
        context.mismatch_in(keys, format!("{} bytes", stated.len()), format!("at most {MAX_TEXT_BYTES}"));
    }
}

/// A text that a command line takes as one argument and not as an option, without quotes.
pub(super) fn word(context: &mut Context<'_>, keys: &[&str], stated: &str) {
    let forbidden = |character: char| character.is_control() || character.is_whitespace() || "\"'\\`$;".contains(character);
    if stated.starts_with('-') || stated.contains(forbidden) || stated.len() > MAX_TEXT_BYTES {
        let expected = "one word without blanks, quotes, `$`, `;` and control characters, the first character not `-`";
        context.mismatch_in(keys, format!("`{}`", shortened(stated)), expected);
    }
}

/// A bound on the length of a list or map.
pub(super) fn entries(context: &mut Context<'_>, keys: &[&str], count: usize) {
    if count > MAX_ENTRIES {
        context.mismatch_in(keys, count, format!("at most {MAX_ENTRIES}"));
    }
}

fn is_variable(name: &str) -> bool {
    let starts_well = name.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_');
    starts_well && name.chars().all(|character| character.is_ascii_alphanumeric() || character == '_')
}

/// Whether the name is one of a secret; `TOKENIZERS_PARALLELISM` is not.
fn is_secret(name: &str) -> bool {
    let upper = name.to_ascii_uppercase();
    let words: Vec<&str> = upper.split('_').collect();
    let pair = |window: &[&str]| SECRET_PAIRS.iter().any(|pair| pair == window);
    words.iter().any(|word| SECRET_WORDS.contains(word) || word.ends_with("PASSWORD")) || words.windows(2).any(pair)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_are_known_by_their_names() {
        let table = [
            ("HF_TOKEN", true),
            ("AWS_SECRET_ACCESS_KEY", true),
            ("aws_access_key_id", true),
            ("OPENAI_API_KEY", true),
            ("PGPASSWORD", true),
            ("DB_PASSWORD", true),
            ("TOKENIZERS_PARALLELISM", false),
            ("NCCL_SOCKET_IFNAME", false),
            ("KEYBOARD", false),
        ];
        for (name, expected) in table {
            assert_eq!(is_secret(name), expected, "{name}");
        }
    }

    #[test]
    fn variables_have_names_that_a_shell_takes() {
        for (name, expected) in [("A", true), ("_a1", true), ("1A", false), ("A-B", false), ("A B", false), ("", false)] {
            assert_eq!(is_variable(name), expected, "{name}");
        }
    }
}
