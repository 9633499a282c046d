//! A checked recipe as YAML that reads back to the same recipe.

use std::fmt::Write as _;

use serde_json::{Map, Value};

use crate::recipe::Recipe;

/// Spaces of one level.
const INDENT_SPACES: usize = 2;

impl Recipe {
    /// The recipe as YAML; [`load`](crate::load()) reads it back to an equal recipe.
    pub fn to_yaml(&self) -> String {
        let mut text = String::new();
        if let Value::Object(map) = self.json() {
            write_map(&mut text, &map, 0);
        }
        text
    }
}

fn write_map(text: &mut String, map: &Map<String, Value>, indent: usize) {
    for (key, value) in map {
        push_spaces(text, indent);
        text.push_str(&scalar_text(key));
        text.push(':');
        write_value(text, value, indent);
    }
}

/// Writes what follows a `key:` or a `-`, line break included.
fn write_value(text: &mut String, value: &Value, indent: usize) {
    match value {
        Value::Object(map) if !map.is_empty() => {
            text.push('\n');
            write_map(text, map, indent + INDENT_SPACES);
        }
        Value::Array(items) if !items.is_empty() => {
            text.push('\n');
            write_list(text, items, indent + INDENT_SPACES);
        }
        single => {
            text.push(' ');
            match single {
                Value::String(string) => text.push_str(&scalar_text(string)),
                // `null`, `true`, a number, `[]` and `{}` are the same in JSON and YAML.
                other => text.push_str(&other.to_string()),
            }
            text.push('\n');
        }
    }
}

fn write_list(text: &mut String, items: &[Value], indent: usize) {
    for item in items {
        push_spaces(text, indent);
        text.push('-');
        match item {
            Value::Object(map) if !map.is_empty() => {
                // The first key stands on the line of the dash: a map indented by two, less its first two spaces.
                let mut inner = String::new();
                write_map(&mut inner, map, indent + INDENT_SPACES);
                text.push(' ');
                text.push_str(inner.trim_start_matches(' '));
            }
            other => write_value(text, other, indent),
        }
    }
}

fn push_spaces(text: &mut String, count: usize) {
    text.extend(std::iter::repeat_n(' ', count));
}

/// A string as a YAML scalar: plain where no reader can take it for anything else, else in double quotes.
fn scalar_text(string: &str) -> String {
    if is_plain(string) {
        return string.to_owned();
    }
    let mut quoted = String::new();
    for character in Value::from(string).to_string().chars() {
        // JSON leaves these as they are; YAML takes them for line breaks or does not allow them.
        match character {
            '\u{7f}'..='\u{9f}' | '\u{2028}' | '\u{2029}' | '\u{feff}' | '\u{fffe}' | '\u{ffff}' => {
                // Writing to a string cannot fail.
                let _ = write!(quoted, "\\u{:04x}", u32::from(character));
            }
            other => quoted.push(other),
        }
    }
    quoted
}

/// Words that some YAML reader takes for a boolean, a null or a number.
const RESERVED_WORDS: [&str; 13] = ["null", "true", "false", "yes", "no", "on", "off", "y", "n", "inf", "infinity", "nan", "_"];

fn is_plain(string: &str) -> bool {
    let starts_well = string.starts_with(|first: char| first.is_ascii_alphabetic() || first == '_' || first == '/');
    let all_plain = string.chars().all(|character| character.is_ascii_alphanumeric() || "_-./".contains(character));
    starts_well && all_plain && !RESERVED_WORDS.contains(&string.to_ascii_lowercase().as_str())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::Arc;

    use proptest::prelude::{ProptestConfig, prop_assert_eq, proptest};
    use serde_json::json;

    use super::*;
    use crate::tree::{self, Origin};

    fn written(value: &Value) -> String {
        let mut text = String::new();
        write_map(&mut text, value.as_object().unwrap(), 0);
        text
    }

    fn read_back(text: &str) -> Value {
        let origin = Arc::new(Origin::File { shown: "r.yaml".to_owned(), folder: PathBuf::from("/") });
        tree::parse(text, &origin).unwrap().json()
    }

    #[test]
    fn the_text_is_laid_out_in_blocks() {
        let value = json!({"a": 1, "b": {"c": [], "d": {}}, "e": [{"f": "x", "g": ["y y", "80_10_10"]}, 0.5], "h": "yes"});
        let expected = "a: 1\nb:\n  c: []\n  d: {}\ne:\n  - f: x\n    g:\n      - \"y y\"\n      - \"80_10_10\"\n  - 0.5\nh: \"yes\"\n";
        assert_eq!(written(&value), expected);
        assert_eq!(read_back(expected), value);
    }

    #[test]
    fn numbers_read_back_exactly() {
        let value = json!({"a": 1e-8, "b": 0.1, "c": 160_000.0, "d": u64::MAX, "e": -3, "f": 1e300});
        assert_eq!(read_back(&written(&value)), value);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

        #[test]
        fn strings_read_back_exactly(string in "[ -~\\n\\t\u{7f}-\u{ff}\u{2028}一-三😀]{0,24}") {
            let value = json!({"key": [string.as_str()], "map": {string.as_str(): 1}});
            prop_assert_eq!(read_back(&written(&value)), value);
        }
    }
}
