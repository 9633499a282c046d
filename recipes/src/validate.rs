//! The composed tree against the JSON Schema: every unknown key, missing key, wrong type and broken bound, with its place.
//!
//! Only the keywords that occur in our schema are obeyed; a test of `schema` fails when another one appears there.

use serde_json::{Map, Value as Json};

use crate::problem::Problems;
use crate::tree::{Entry, Node, Place, Scalar, Value};

/// A definition may stand for another one this often.
const MAX_REFERENCES: usize = 8;
/// Stands for a schema that is not there.
static NOTHING: Json = Json::Null;

/// Adds to `problems` whatever in the tree does not fit the schema.
pub(crate) fn validate(root: &Node, schema: &Json, problems: &mut Problems) {
    let mut walk = Walk { root_schema: schema, problems };
    walk.node(root, schema, &Spot { path: String::new(), key: &root.place });
}

/// Where in the recipe the walk is.
struct Spot<'tree> {
    /// Keys from the root, joined by dots.
    path: String,
    /// Place of the key whose value is looked at.
    key: &'tree Place,
}

struct Walk<'run> {
    root_schema: &'run Json,
    problems: &'run mut Problems,
}

impl<'run> Walk<'run> {
    fn node(&mut self, node: &Node, schema: &'run Json, spot: &Spot<'_>) {
        let schema = self.resolved(schema);
        if *schema == Json::Bool(true) {
            return;
        }
        match (&node.value, type_of(schema)) {
            (Value::Map(entries), "object") => self.map(entries, schema, spot),
            (Value::List(items), "array") => self.list(node, items, schema, spot),
            (Value::Scalar(scalar), _) if fits(scalar, schema) => {}
            _ => self.mismatch(node, schema, spot),
        }
    }

    fn map(&mut self, entries: &[Entry], schema: &'run Json, spot: &Spot<'_>) {
        let properties = schema.get("properties").and_then(Json::as_object);
        // Keys that an unknown key was probably meant to be: they are not reported as missing too.
        let mut meant: Vec<&str> = Vec::new();
        for entry in entries {
            let inner = Spot { path: joined(&spot.path, &entry.key), key: &entry.place };
            let property = properties.and_then(|properties| properties.get(&entry.key));
            match property.or_else(|| schema.get("additionalProperties").filter(|any| **any != Json::Bool(false))) {
                // `null` unsets a key, so that its default holds.
                Some(_) if entry.node.is_null() => {}
                Some(property) => self.node(&entry.node, property, &inner),
                None => meant.extend(self.unknown_key(entry, properties, &inner)),
            }
        }
        for name in schema.get("required").and_then(Json::as_array).into_iter().flatten().filter_map(Json::as_str) {
            let stated = entries.iter().any(|entry| entry.key == name && !entry.node.is_null());
            if !stated && !meant.contains(&name) {
                let property = properties.and_then(|properties| properties.get(name)).unwrap_or(&NOTHING);
                let message = format!("missing, expected {}", expected(self.resolved(property)));
                self.problems.push(spot.key, &joined(&spot.path, name), message);
            }
        }
    }

    /// Reports the key; answers with the known key that it was probably meant to be.
    fn unknown_key(&mut self, entry: &Entry, properties: Option<&'run Map<String, Json>>, spot: &Spot<'_>) -> Option<&'run str> {
        let known = || properties.into_iter().flat_map(Map::keys).map(String::as_str);
        let meant = nearest(&entry.key, known());
        let message = match meant {
            Some(known) => format!("unknown key; did you mean `{known}`?"),
            None => format!("unknown key; known keys: {}", quoted(known(), ", ")),
        };
        self.problems.push(&entry.place, &spot.path, message);
        meant
    }

    fn list(&mut self, node: &Node, items: &[Node], schema: &'run Json, spot: &Spot<'_>) {
        let count = items.len() as u64;
        let too_few = schema.get("minItems").and_then(Json::as_u64).is_some_and(|min| count < min);
        let too_many = schema.get("maxItems").and_then(Json::as_u64).is_some_and(|max| count > max);
        if too_few || too_many {
            self.mismatch(node, schema, spot);
        }
        let Some(inner) = schema.get("items") else { return };
        for (index, item) in items.iter().enumerate() {
            self.node(item, inner, &Spot { path: joined(&spot.path, &index.to_string()), key: &item.place });
        }
    }

    fn mismatch(&mut self, node: &Node, schema: &Json, spot: &Spot<'_>) {
        let mut message = format!("found {node}, expected {}", expected(schema));
        let number_or_bool = matches!(node.value, Value::Scalar(Scalar::Bool(_) | Scalar::Integer(_) | Scalar::Float(_)));
        if number_or_bool && type_of(schema) == "string" && choices(schema).is_empty() {
            message.push_str(" (put it in quotes)");
        }
        self.problems.push(&node.place, &spot.path, message);
    }

    fn resolved(&self, schema: &'run Json) -> &'run Json {
        resolved(self.root_schema, schema)
    }
}

/// Whether the schema has a place for a key path; in a list its segments are numbers.
pub(crate) fn knows(root_schema: &Json, key_path: &str) -> bool {
    let mut schema = resolved(root_schema, root_schema);
    for segment in key_path.split('.') {
        let inner = match type_of(schema) {
            _ if *schema == Json::Bool(true) => return true,
            "object" => {
                schema.get("properties").and_then(|properties| properties.get(segment)).or_else(|| schema.get("additionalProperties"))
            }
            "array" if segment.parse::<usize>().is_ok() => schema.get("items"),
            _ => None,
        };
        match inner {
            Some(inner) if *inner != Json::Bool(false) => schema = resolved(root_schema, inner),
            _ => return false,
        }
    }
    true
}

/// Follows `$ref`, and of `anyOf` takes the alternative that is not `null`.
fn resolved<'schema>(root_schema: &'schema Json, schema: &'schema Json) -> &'schema Json {
    let mut schema = schema;
    for _ in 0..MAX_REFERENCES {
        if let Some(name) = schema.get("$ref").and_then(Json::as_str) {
            let pointer = name.trim_start_matches('#');
            schema = root_schema.pointer(pointer).unwrap_or(&NOTHING);
        } else if let Some(alternatives) = schema.get("anyOf").and_then(Json::as_array) {
            let not_null = alternatives.iter().find(|alternative| alternative.get("type").is_none_or(|of| of != "null"));
            schema = not_null.unwrap_or(&NOTHING);
        } else {
            break;
        }
    }
    schema
}

/// The one type of the schema that is not `null`; empty where it states none.
fn type_of(schema: &Json) -> &str {
    let stated = match schema.get("type") {
        Some(Json::Array(types)) => types.iter().filter_map(Json::as_str).find(|name| *name != "null"),
        Some(one) => one.as_str(),
        None if schema.get("oneOf").is_some() => Some("string"),
        None => None,
    };
    stated.unwrap_or("")
}

fn fits(scalar: &Scalar, schema: &Json) -> bool {
    match (scalar, type_of(schema)) {
        (Scalar::Bool(_), "boolean") => true,
        (Scalar::Integer(value), "integer") => {
            lower_bound(schema).is_none_or(|min| *value >= min) && upper_bound(schema).is_none_or(|max| *value <= max)
        }
        (Scalar::Integer(value), "number") => fits_number(*value as f64, schema),
        (Scalar::Float(value), "number") => fits_number(*value, schema),
        (Scalar::Text(text), "string") => {
            let choices = choices(schema);
            let long_enough = schema.get("minLength").and_then(Json::as_u64).is_none_or(|min| text.chars().count() as u64 >= min);
            long_enough && (choices.is_empty() || choices.contains(&text.as_str()))
        }
        _ => false,
    }
}

fn fits_number(value: f64, schema: &Json) -> bool {
    let bound = |keyword: &str| schema.get(keyword).and_then(Json::as_f64);
    bound("minimum").is_none_or(|min| value >= min)
        && bound("maximum").is_none_or(|max| value <= max)
        && bound("exclusiveMinimum").is_none_or(|min| value > min)
        && bound("exclusiveMaximum").is_none_or(|max| value < max)
}

/// The least integer that the schema allows.
fn lower_bound(schema: &Json) -> Option<i128> {
    schema.get("minimum").and_then(Json::as_i64).map(i128::from)
}

/// The greatest integer that the schema, or else the type behind it, allows.
fn upper_bound(schema: &Json) -> Option<i128> {
    stated_upper_bound(schema).or_else(|| match schema.get("format").and_then(Json::as_str) {
        Some("uint32") => Some(i128::from(u32::MAX)),
        Some("uint64") => Some(i128::from(u64::MAX)),
        _ => None,
    })
}

fn stated_upper_bound(schema: &Json) -> Option<i128> {
    schema.get("maximum").and_then(Json::as_u64).map(i128::from)
}

/// The words that the schema allows; empty where any text will do.
fn choices(schema: &Json) -> Vec<&str> {
    let mut words = words_of(schema);
    for alternative in schema.get("oneOf").and_then(Json::as_array).into_iter().flatten() {
        words.extend(words_of(alternative));
    }
    words
}

fn words_of(schema: &Json) -> Vec<&str> {
    let several = schema.get("enum").and_then(Json::as_array).into_iter().flatten();
    several.chain(schema.get("const")).filter_map(Json::as_str).collect()
}

/// What the schema asks for, as the end of a sentence.
fn expected(schema: &Json) -> String {
    match type_of(schema) {
        "object" => "a map".to_owned(),
        "array" => expected_list(schema),
        "boolean" => "true or false".to_owned(),
        "integer" => expected_integer(schema),
        "number" => expected_number(schema),
        _ => expected_text(schema),
    }
}

fn expected_list(schema: &Json) -> String {
    let bound = |keyword: &str| schema.get(keyword).and_then(Json::as_u64);
    match (bound("minItems"), bound("maxItems")) {
        (Some(min), Some(max)) if min == max => format!("a list of {min}"),
        (Some(min), _) => format!("a list of at least {min}"),
        _ => "a list".to_owned(),
    }
}

fn expected_integer(schema: &Json) -> String {
    match (lower_bound(schema), stated_upper_bound(schema)) {
        (Some(min), Some(max)) if min == max => min.to_string(),
        (Some(min), Some(max)) => format!("an integer from {min} to {max}"),
        (Some(min), None) => format!("an integer of at least {min}"),
        _ => "an integer".to_owned(),
    }
}

fn expected_number(schema: &Json) -> String {
    let bound = |keyword: &str| schema.get(keyword).and_then(Json::as_f64);
    let lower = bound("minimum").map(|min| format!("of at least {min}")).or(bound("exclusiveMinimum").map(|min| format!("above {min}")));
    let upper = bound("maximum").map(|max| format!("at most {max}")).or(bound("exclusiveMaximum").map(|max| format!("below {max}")));
    match (bound("minimum"), bound("maximum"), lower, upper) {
        (Some(min), Some(max), _, _) => format!("a number from {min} to {max}"),
        (_, _, Some(lower), Some(upper)) => format!("a number {lower} and {upper}"),
        (_, _, Some(one), None) | (_, _, None, Some(one)) => format!("a number {one}"),
        _ => "a number".to_owned(),
    }
}

fn expected_text(schema: &Json) -> String {
    let choices = choices(schema);
    match choices.as_slice() {
        [] if schema.get("minLength").is_some() => "a text that is not empty".to_owned(),
        [] => "a text".to_owned(),
        [one] => format!("`{one}`"),
        [first @ .., last] => format!("{} or `{last}`", quoted(first.iter().copied(), ", ")),
    }
}

fn quoted<'word>(words: impl Iterator<Item = &'word str>, between: &str) -> String {
    words.map(|word| format!("`{word}`")).collect::<Vec<_>>().join(between)
}

fn joined(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// The known word with the fewest edits to the stated one, if at most about a third of its letters differ.
pub fn nearest<'word>(stated: &str, known: impl Iterator<Item = &'word str>) -> Option<&'word str> {
    let edits_max = stated.chars().count().div_ceil(3);
    let distances = known.map(|word| (strsim::damerau_levenshtein(stated, word), word));
    distances.filter(|(edits, _)| *edits <= edits_max).min_by_key(|(edits, _)| *edits).map(|(_, word)| word)
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::sync::Arc;

    use super::*;
    use crate::schema::schema;
    use crate::tree::{self, Origin};

    fn problems(text: &str) -> Vec<String> {
        let origin = Arc::new(Origin::File { shown: "r.yaml".to_owned(), folder: PathBuf::from("/") });
        let root = tree::parse(text, &origin).unwrap();
        let mut problems = Problems::default();
        validate(&root, &schema(), &mut problems);
        problems.into_failure("r.yaml").what.lines().skip(1).map(str::to_owned).collect()
    }

    const HEAD: &str = "version: 1\nname: x\nmodel: {preset: tiny, tokenizer: t}\ndata: {sources: [{url: u}], output: o}\n";
    const TRAIN: &str = "train: {steps: 1, batch_examples: 1, micro_batch_tokens: 1, learning_rate: 1}\n";

    #[test]
    fn a_right_recipe_has_no_problems() {
        assert_eq!(problems(&format!("{HEAD}{TRAIN}")), Vec::<String>::new());
        let full = "seed: null\nobjective: {masking: 80_10_10, auxiliary: none}\ncheckpoint: {url: null, options: {region: x}}\n";
        assert_eq!(problems(&format!("{HEAD}{TRAIN}{full}")), Vec::<String>::new());
    }

    #[test]
    fn each_kind_of_problem_has_its_words() {
        let table = [
            ("seed: -1", "r.yaml:6:7: seed: found -1, expected an integer of at least 0"),
            ("seed: 1.5", "r.yaml:6:7: seed: found 1.5, expected an integer of at least 0"),
            ("sed: 1", "r.yaml:6:1: sed: unknown key; did you mean `seed`?"),
            ("evaluation: x", "r.yaml:6:13: evaluation: found `x`, expected a list"),
            ("cluster: [1]", "r.yaml:6:10: cluster: found a list of 1, expected a map"),
            (
                "cluster: {zzz: 1}",
                "r.yaml:6:11: cluster.zzz: unknown key; known keys: `max_restarts`, `heartbeat_timeout_ms`, `collective_timeout_ms`, `min_workers`, `replacement_wait_s`, `coordinator_grace_s`, `hang`, `exclude_host_after`, `retries_per_step`, `tls`",
            ),
            (
                "cluster: {heartbeat_timeout_ms: 1}",
                "r.yaml:6:33: cluster.heartbeat_timeout_ms: found 1, expected an integer from 100 to 3600000",
            ),
            (
                "checkpoint: {options: {allow_http: true}}",
                "r.yaml:6:36: checkpoint.options.allow_http: found true, expected a text (put it in quotes)",
            ),
            ("checkpoint: {url: \"\"}", "r.yaml:6:19: checkpoint.url: found ``, expected a text that is not empty"),
            ("objective: {auxiliary: clm}", "r.yaml:6:24: objective.auxiliary: found `clm`, expected `none`, `mlm` or `dummy_mlm`"),
            ("objective: {auxiliary_ratio: 2}", "r.yaml:6:30: objective.auxiliary_ratio: found 2, expected a number from 0 to 1"),
            (
                "objective: {mask_probability: 0}",
                "r.yaml:6:31: objective.mask_probability: found 0, expected a number above 0 and at most 1",
            ),
        ];
        for (line, expected) in table {
            assert_eq!(problems(&format!("{HEAD}{TRAIN}{line}\n")), [expected], "{line}");
        }
    }

    #[test]
    fn missing_keys_are_at_their_map_and_not_reported_twice() {
        let text = format!("{HEAD}train:\n  step: 5\n  batch_exampels: 1\n  micro_batch_tokens: 1\n");
        let expected = [
            "r.yaml:6:3: train.step: unknown key; did you mean `steps`?",
            "r.yaml:7:3: train.batch_exampels: unknown key; did you mean `batch_examples`?",
            "r.yaml:5:1: train.learning_rate: missing, expected a number above 0 and at most 10",
        ];
        assert_eq!(problems(&text), expected);
    }

    #[test]
    fn lists_are_bounded_and_their_items_checked() {
        let line = "train: {steps: 1, batch_examples: 1, micro_batch_tokens: 1, learning_rate: 1, betas: [0.9]}\n";
        assert_eq!(problems(&format!("{HEAD}{line}")), ["r.yaml:5:86: train.betas: found a list of 1, expected a list of 2"]);
        let line = "evaluation: [{name: a, files: [f, 3], labels: [{value: x}, {value: 1}]}]";
        let expected = [
            "r.yaml:6:35: evaluation.0.files.1: found 3, expected a text that is not empty (put it in quotes)",
            "r.yaml:6:68: evaluation.0.labels.1.value: found 1, expected a text that is not empty (put it in quotes)",
        ];
        assert_eq!(problems(&format!("{HEAD}{TRAIN}{line}\n")), expected);
    }

    #[test]
    fn the_nearest_word_is_near() {
        let known = ["learning_rate", "epochs", "steps", "url"];
        let table =
            [("lerning_rate", Some("learning_rate")), ("epoch", Some("epochs")), ("lr", None), ("banana", None), ("ulr", Some("url"))];
        for (stated, expected) in table {
            assert_eq!(nearest(stated, known.into_iter()), expected, "{stated}");
        }
    }
}
