//! Values of swept keys in tables and lines: long ones shortened, as far as they still differ from the others of their key.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use super::graph::plain;

/// Longest values that are shown, in characters: the first at which all values of a key can be told apart. Beyond the last they are whole.
const LENGTHS: [usize; 4] = [32, 64, 128, 256];

/// How long the values of each key are shown.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct ShortValues(BTreeMap<String, usize>);

impl ShortValues {
    /// For tables and lines that show these keys and values.
    pub(super) fn of<'a>(values: impl Iterator<Item = (&'a String, &'a Value)>) -> Self {
        let mut by_key: BTreeMap<&String, BTreeMap<String, &Value>> = BTreeMap::new();
        for (key, value) in values {
            by_key.entry(key).or_default().insert(value.to_string(), value);
        }
        let length = |values: &BTreeMap<String, &Value>| {
            let is_enough =
                |&length: &usize| values.values().map(|value| short(value, length)).collect::<BTreeSet<_>>().len() == values.len();
            LENGTHS.into_iter().find(is_enough).unwrap_or(usize::MAX)
        };
        Self(by_key.into_iter().map(|(key, values)| (key.clone(), length(&values))).collect())
    }

    /// A value of a key.
    pub(super) fn text(&self, key: &str, value: &Value) -> String {
        short(value, self.0.get(key).copied().unwrap_or(LENGTHS[0]))
    }

    /// Keys and values of a point, and its seed, in one line.
    pub(super) fn point<'a>(&self, values: impl Iterator<Item = (&'a String, &'a Value)>, seed: u64) -> String {
        let parts = values.map(|(key, value)| format!("{key}={}", self.text(key, value)));
        parts.chain([format!("seed={seed}")]).collect::<Vec<_>>().join(" ")
    }
}

/// A value in about so many characters: of a list its first elements and how many more there are, of other long values both ends.
fn short(value: &Value, length: usize) -> String {
    let text = plain(value);
    if text.chars().count() <= length {
        return text;
    }
    match value {
        Value::Array(items) if items.len() > 1 => {
            let items: Vec<String> = items.iter().map(|item| cut(&item.to_string(), length)).collect();
            // Brackets, and a number with its signs.
            let mut used = 5;
            let fits = |item: &&String| {
                used += item.chars().count() + 1;
                used <= length
            };
            let num_shown = items.iter().take_while(fits).count().clamp(1, items.len() - 1);
            format!("[{},+{}]", items[..num_shown].join(","), items.len() - num_shown)
        }
        _ => cut(&text, length),
    }
}

/// Both ends of a text that is too long: paths often differ in the last part only.
fn cut(text: &str, length: usize) -> String {
    let num_chars = text.chars().count();
    if num_chars <= length {
        return text.to_owned();
    }
    let (head, tail) = (length / 2, length - length / 2 - 1);
    text.chars().take(head).chain(['…']).chain(text.chars().skip(num_chars - tail)).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The texts of some values of one key.
    fn texts(values: &[Value]) -> Vec<String> {
        let key = "data.only".to_owned();
        let short = ShortValues::of(values.iter().map(|value| (&key, value)));
        values.iter().map(|value| short.text(&key, value)).collect()
    }

    #[test]
    fn a_long_list_is_its_first_elements_and_a_number() {
        let tasks: Vec<String> = (0..30).map(|number| format!("^task_{number}")).collect();
        let found = texts(&[json!(tasks[..10]), json!(tasks[..30]), json!(["^task_0"]), json!(tasks[..10])]);
        let expected = [r#"["^task_0","^task_1",+8]"#, r#"["^task_0","^task_1",+28]"#, r#"["^task_0"]"#, r#"["^task_0","^task_1",+8]"#];
        assert_eq!(found, expected);
    }

    #[test]
    fn values_stay_as_long_as_it_takes_to_tell_them_apart() {
        let list = |odd: usize, last: &str| {
            let item = |number| if number == odd { last.to_owned() } else { format!("^task_{number}") };
            json!((0..12).map(item).collect::<Vec<String>>())
        };
        let found = texts(&[list(4, "^a"), list(4, "^b")]);
        assert_ne!(found[0], found[1]);
        assert!(found.iter().all(|text| text.chars().count() <= 80 && text.ends_with(']') && text.contains(",+")), "{found:?}");
        let path = |name: &str| json!(format!("/{}/{name}", "data".repeat(20)));
        assert_eq!(texts(&[path("a"), path("b")]), ["/datadatadatadat…adatadatadata/a", "/datadatadatadat…adatadatadata/b"]);
        let middle = |name: &str| json!(format!("{}{name}{}", "x".repeat(200), "y".repeat(200)));
        assert_eq!(texts(&[middle("a"), middle("b")]), [middle("a"), middle("b")].map(|value| plain(&value)), "whole");
        assert_eq!(texts(&[json!(0.5), json!("short"), json!(null)]), ["0.5", "short", "null"]);
    }
}
