//! The columns that a record may have, and how they become one [`Record`].
//!
//! Corpora name the same thing differently; where a record has several of the names, the first in the list counts.

use std::borrow::Cow;
use std::fmt;

use cloze_recipes::failure::{Failure, FailureKind};
use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

const INPUTS: &[&str] = &["inputs"];
const TARGETS: &[&str] = &["targets"];
const TASKS: &[&str] = &["task_name", "_task_name", "task", "_task"];
const SOURCES: &[&str] = &["task_source", "_task_source"];
const TEMPLATES: &[&str] = &["template_type", "_template_type", "template", "_template", "template_idx", "_template_idx"];
/// Every name that is read; all other columns are skipped.
pub(super) const COLUMNS: [&str; NUM_COLUMNS] = [
    INPUTS[0],
    TARGETS[0],
    TASKS[0],
    TASKS[1],
    TASKS[2],
    TASKS[3],
    SOURCES[0],
    SOURCES[1],
    TEMPLATES[0],
    TEMPLATES[1],
    TEMPLATES[2],
    TEMPLATES[3],
    TEMPLATES[4],
    TEMPLATES[5],
];
const NUM_COLUMNS: usize = 14;

/// One record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record<'a> {
    /// The prompt.
    pub inputs: Cow<'a, str>,
    /// The answer, as it stands in the file.
    pub targets: Cow<'a, str>,
    /// Name of the task; `None` leaves it to the source or the file name.
    pub task: Option<Cow<'a, str>>,
    /// Where the task comes from, such as `Flan2021`.
    pub source: Option<Cow<'a, str>>,
    /// Template type or number.
    pub template: Option<Cow<'a, str>>,
}

/// A column's value, as far as records need it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) enum Value<'a> {
    #[default]
    Absent,
    Text(Cow<'a, str>),
    Number(String),
    List(Vec<Cow<'a, str>>),
    Other(&'static str),
}

/// The values of [`COLUMNS`] in one row.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Fields<'a>(pub(super) [Value<'a>; NUM_COLUMNS]);

/// Parses one line of a jsonl file. The failure lacks the place, which the caller knows.
pub(super) fn parse_line(line: &[u8]) -> Result<Record<'_>, Failure> {
    let text = std::str::from_utf8(line).map_err(|error| {
        Failure::new(FailureKind::Input, "text is not UTF-8")
            .expected("UTF-8")
            .found(format!("byte 0x{:02x} at column {}", line[error.valid_up_to()], error.valid_up_to() + 1))
            .hint("convert the file to UTF-8, or repair or remove the line")
    })?;
    let fields: Fields = serde_json::from_str(text).map_err(|error| {
        Failure::new(FailureKind::Input, "line is not a JSON object")
            .expected("one JSON object a line, with `inputs` and `targets`")
            .found(excerpt(text))
            // The parser counts lines inside the line, so that only its column means something here.
            .because(format!("column {}: {}", error.column(), error.to_string().split(" at line ").next().unwrap_or_default()))
            .hint("the file may be cut off; get it again, or repair or remove the line")
    })?;
    fields.into_record()
}

impl<'a> Fields<'a> {
    /// Makes the record, or says which column is missing or of the wrong kind.
    pub(super) fn into_record(mut self) -> Result<Record<'a>, Failure> {
        Ok(Record {
            inputs: self.required(INPUTS)?,
            targets: self.required(TARGETS)?,
            task: self.optional(TASKS)?,
            source: self.optional(SOURCES)?,
            template: self.optional(TEMPLATES)?,
        })
    }

    fn required(&mut self, names: &[&str]) -> Result<Cow<'a, str>, Failure> {
        let name = names[0];
        let wrong = |found: String| {
            Failure::new(FailureKind::Input, format!("record has no usable `{name}`"))
                .expected(format!("`{name}`: a string, or a list with one string"))
                .found(found)
                .hint(
                    "records need the columns `inputs` and `targets`; repair or remove the record, or take the file out of `data.sources`",
                )
        };
        match self.take(names) {
            Value::Text(text) => Ok(text),
            Value::List(mut texts) if texts.len() == 1 => Ok(texts.remove(0)),
            Value::List(texts) => Err(wrong(format!("a list of {} strings", texts.len()))),
            Value::Absent => Err(wrong(format!("no `{name}`"))),
            Value::Number(number) => Err(wrong(format!("the number {number}"))),
            Value::Other(kind) => Err(wrong(kind.to_owned())),
        }
    }

    fn optional(&mut self, names: &[&str]) -> Result<Option<Cow<'a, str>>, Failure> {
        match self.take(names) {
            Value::Absent => Ok(None),
            Value::Text(text) => Ok(Some(text)),
            Value::Number(number) => Ok(Some(Cow::Owned(number))),
            Value::List(_) | Value::Other(_) => Err(Failure::new(FailureKind::Input, format!("record has no usable `{}`", names[0]))
                .expected(format!("a string or a number in {}", names.join(", ")))
                .hint("repair or remove the record")),
        }
    }

    /// The first of `names` that has a value.
    fn take(&mut self, names: &[&str]) -> Value<'a> {
        let columns = names.iter().filter_map(|name| column_index(name));
        for column in columns {
            let value = std::mem::take(&mut self.0[column]);
            if value != Value::Absent {
                return value;
            }
        }
        Value::Absent
    }
}

fn column_index(name: &str) -> Option<usize> {
    COLUMNS.iter().position(|column| *column == name)
}

/// The start of a line, for a message.
fn excerpt(text: &str) -> String {
    const MAX_CHARACTERS: usize = 80;
    let start: String = text.chars().take(MAX_CHARACTERS).collect();
    if start.len() < text.len() { format!("{start}…") } else { start }
}

impl<'de: 'a, 'a> Deserialize<'de> for Fields<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(FieldsVisitor)
    }
}

struct FieldsVisitor;

impl<'de> Visitor<'de> for FieldsVisitor {
    type Value = Fields<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Fields<'de>, A::Error> {
        let mut fields = Fields::default();
        while let Some(ColumnName(column)) = map.next_key()? {
            match column {
                Some(column) => fields.0[column] = map.next_value()?,
                None => {
                    map.next_value::<IgnoredAny>()?;
                }
            }
        }
        Ok(fields)
    }
}

/// Index of a key in [`COLUMNS`]; looked up without copying the key.
struct ColumnName(Option<usize>);

impl<'de> Deserialize<'de> for ColumnName {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct NameVisitor;
        impl Visitor<'_> for NameVisitor {
            type Value = ColumnName;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a key")
            }
            fn visit_str<E>(self, name: &str) -> Result<ColumnName, E> {
                Ok(ColumnName(column_index(name)))
            }
        }
        deserializer.deserialize_str(NameVisitor)
    }
}

impl<'de: 'a, 'a> Deserialize<'de> for Value<'a> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Value<'de>, E> {
        Ok(Value::Text(Cow::Borrowed(text)))
    }

    fn visit_str<E>(self, text: &str) -> Result<Value<'de>, E> {
        Ok(Value::Text(Cow::Owned(text.to_owned())))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Value<'de>, E> {
        Ok(Value::Number(number.to_string()))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Value<'de>, E> {
        Ok(Value::Number(number.to_string()))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Value<'de>, E> {
        Ok(Value::Number(number.to_string()))
    }

    fn visit_bool<E>(self, _: bool) -> Result<Value<'de>, E> {
        Ok(Value::Other("a boolean"))
    }

    fn visit_unit<E>(self) -> Result<Value<'de>, E> {
        Ok(Value::Absent)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value<'de>, A::Error> {
        let mut texts = Vec::new();
        let mut only_texts = true;
        while let Some(item) = items.next_element::<Value>()? {
            match item {
                Value::Text(text) => texts.push(text),
                _ => only_texts = false,
            }
        }
        Ok(if only_texts { Value::List(texts) } else { Value::Other("a list of something else than strings") })
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value<'de>, A::Error> {
        while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
        Ok(Value::Other("an object"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn all_names_of_the_columns_are_read_and_the_first_wins() {
        let cases = [
            (r#"{"inputs":"q","targets":"a","task_name":"t","task":"other","template_type":"zs"}"#, Some("t"), None, Some("zs")),
            (r#"{"_task_name":"t","_task_source":"P3","_template_idx":3,"inputs":"q","targets":["a"]}"#, Some("t"), Some("P3"), Some("3")),
            (r#"{"inputs":"q","targets":"a","task":null,"x":{"y":[1]}}"#, None, None, None),
            (r#"{"inputs":"q","targets":"a","template":"z","template_idx":1,"task":"k"}"#, Some("k"), None, Some("z")),
        ];
        for (line, task, source, template) in cases {
            let record = parse_line(line.as_bytes()).unwrap();
            assert_eq!((record.inputs.as_ref(), record.targets.as_ref()), ("q", "a"), "{line}");
            assert_eq!(record.task.as_deref(), task, "{line}");
            assert_eq!(record.source.as_deref(), source, "{line}");
            assert_eq!(record.template.as_deref(), template, "{line}");
        }
    }

    #[test]
    fn bad_records_say_what_is_wrong() {
        let cases: [(&[u8], &str, &str); 8] = [
            (br#"{"inputs":"q"}"#, "record has no usable `targets`", "no `targets`"),
            (br#"{"targets":"a"}"#, "record has no usable `inputs`", "no `inputs`"),
            (br#"{"inputs":"q","targets":[]}"#, "record has no usable `targets`", "a list of 0 strings"),
            (br#"{"inputs":"q","targets":["a","b"]}"#, "record has no usable `targets`", "a list of 2 strings"),
            (br#"{"inputs":"q","targets":5}"#, "record has no usable `targets`", "the number 5"),
            (br#"{"inputs":{"a":1},"targets":"a"}"#, "record has no usable `inputs`", "an object"),
            (br#"{"inputs":"q","tar"#, "line is not a JSON object", r#"{"inputs":"q","tar"#),
            (b"{\"inputs\":\"\xff\"}", "text is not UTF-8", "byte 0xff at column 12"),
        ];
        for (line, what, found) in cases {
            let failure = parse_line(line).unwrap_err();
            assert_eq!(failure.kind, FailureKind::Input);
            assert_eq!(failure.what, what);
            assert_eq!(failure.found.as_deref(), Some(found));
            assert!(failure.hint.is_some());
        }
    }

    #[test]
    fn text_without_escapes_is_not_copied() {
        let record = parse_line(br#"{"inputs":"plain","targets":"a\nb"}"#).unwrap();
        assert!(matches!(record.inputs, Cow::Borrowed("plain")));
        assert!(matches!(record.targets, Cow::Owned(_)));
    }

    proptest! {
        #[test]
        fn any_text_survives_json(inputs in any::<String>(), targets in any::<String>()) {
            let line = serde_json::json!({ "inputs": &inputs, "targets": &targets }).to_string();
            let record = parse_line(line.as_bytes()).unwrap();
            prop_assert_eq!(record.inputs.as_ref(), inputs.as_str());
            prop_assert_eq!(record.targets.as_ref(), targets.as_str());
        }

        #[test]
        fn any_bytes_end_in_a_record_or_a_failure(bytes in prop::collection::vec(any::<u8>(), 0..60)) {
            let _ = parse_line(&bytes);
        }
    }
}
