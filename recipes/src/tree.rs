//! YAML text as a tree in which every key and every value knows its place.

mod json;

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::de::{Deserialize, Deserializer, Error as _, MapAccess, SeqAccess, Visitor};
use serde_saphyr::{DefaultMessageFormatter, DuplicateKeyPolicy, Location, MessageFormatter as _, NonFiniteFloatPolicy, Spanned};

/// Largest recipe text, in bytes: a recipe is written by hand, so anything larger is the wrong file.
pub(crate) const MAX_RECIPE_BYTES: usize = 1 << 20;
/// Deepest nesting of lists and maps; the schema needs 5.
pub(crate) const MAX_DEPTH_LEVELS: usize = 32;
/// Most values in one text, aliases expanded.
const MAX_VALUES: usize = 100_000;
/// Longest string shown in a message, in characters.
const MAX_SHOWN_CHARS: usize = 60;

/// Where a text comes from.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// A recipe file.
    File {
        /// The path as the user would write it.
        shown: String,
        /// Its folder, canonical; paths in the file are relative to it.
        folder: PathBuf,
    },
    /// An override on the command line.
    Override {
        /// `key.path=value`.
        text: String,
        /// The current folder; paths in the override are relative to it.
        folder: PathBuf,
    },
}

/// Where a key or a value was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Place {
    origin: Arc<Origin>,
    /// From 1; 0 where only the file is known.
    line: u64,
    /// From 1, in characters.
    column: u64,
}

/// A value with its place.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Node {
    /// Where the value starts.
    pub(crate) place: Place,
    /// What it is.
    pub(crate) value: Value,
}

/// What a value is.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Value {
    /// A single value.
    Scalar(Scalar),
    /// Values in order.
    List(Vec<Node>),
    /// Keys and values in the order of the text; keys are unique.
    Map(Vec<Entry>),
}

/// One key of a map.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Entry {
    /// The key.
    pub(crate) key: String,
    /// Where the key stands.
    pub(crate) place: Place,
    /// Its value.
    pub(crate) node: Node,
}

/// A single value, typed as in YAML's core schema.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Scalar {
    /// Nothing: unsets a key.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// An integer; wide enough for every 64-bit one, signed or not.
    Integer(i128),
    /// A finite number with a fraction or an exponent.
    Float(f64),
    /// Anything else.
    Text(String),
}

/// YAML that cannot be read.
#[derive(Debug)]
pub(crate) struct SyntaxError {
    /// Where reading stopped.
    pub(crate) place: Place,
    /// Why.
    pub(crate) message: String,
}

/// Reads one YAML document; fails on broken syntax, on a key stated twice and on texts beyond the bounds.
pub(crate) fn parse(text: &str, origin: &Arc<Origin>) -> Result<Node, SyntaxError> {
    let start = Place { origin: Arc::clone(origin), line: 0, column: 0 };
    if text.len() > MAX_RECIPE_BYTES {
        let message = format!("found {} bytes, expected at most {MAX_RECIPE_BYTES}", text.len());
        return Err(SyntaxError { place: start, message });
    }
    let options = serde_saphyr::options! {
        budget: serde_saphyr::budget! { max_depth: MAX_DEPTH_LEVELS, max_nodes: MAX_VALUES },
        duplicate_keys: DuplicateKeyPolicy::Error,
        non_finite_float_policy: NonFiniteFloatPolicy::AsString,
        reject_unsupported_tags: true,
        strict_booleans: true,
        with_snippet: false,
    };
    let source = Source { origin, lines: text.lines().collect() };
    match serde_saphyr::from_str_with_options::<Spanned<Parsed>>(text, options) {
        Ok(root) => Ok(source.node(root)),
        Err(error) => Err(syntax_error(&error, origin)),
    }
}

/// The parser's error with its place, without the parser's own layout.
fn syntax_error(error: &serde_saphyr::Error, origin: &Arc<Origin>) -> SyntaxError {
    let place = Place::new(origin, error.location().unwrap_or(Location::UNKNOWN));
    let message = match error.without_snippet() {
        serde_saphyr::Error::DuplicateMappingKey { key: Some(key), .. } => format!("key `{key}` stands here a second time"),
        other => DefaultMessageFormatter.format_message(other).replace(char::is_control, " "),
    };
    SyntaxError { place, message }
}

/// Turns the parser's locations into places.
struct Source<'text> {
    origin: &'text Arc<Origin>,
    lines: Vec<&'text str>,
}

impl Source<'_> {
    fn node(&self, parsed: Spanned<Parsed>) -> Node {
        let value = match parsed.value {
            Parsed::Scalar(scalar) => Value::Scalar(self.core_scalar(scalar, parsed.defined)),
            Parsed::List(items) => Value::List(items.into_iter().map(|item| self.node(item)).collect()),
            Parsed::Map(entries) => Value::Map(entries.into_iter().map(|(key, value)| self.entry(key, value)).collect()),
        };
        Node { place: Place::new(self.origin, parsed.defined), value }
    }

    fn entry(&self, key: Spanned<String>, value: Spanned<Parsed>) -> Entry {
        Entry { key: key.value, place: Place::new(self.origin, key.defined), node: self.node(value) }
    }

    /// The parser reads `80_10_10` as an integer, as YAML 1.1 did; in the core schema it is text.
    fn core_scalar(&self, scalar: Scalar, location: Location) -> Scalar {
        let Scalar::Integer(_) = scalar else { return scalar };
        let line = self.lines.get((location.line() as usize).wrapping_sub(1)).copied().unwrap_or("");
        let rest = line.chars().skip((location.column() as usize).saturating_sub(1));
        let word: String = rest.take_while(|character| character.is_ascii_alphanumeric() || "+-_".contains(*character)).collect();
        if word.contains('_') { Scalar::Text(word) } else { scalar }
    }
}

/// The tree as the parser gives it.
enum Parsed {
    Scalar(Scalar),
    List(Vec<Spanned<Parsed>>),
    Map(Vec<(Spanned<String>, Spanned<Parsed>)>),
}

impl<'de> Deserialize<'de> for Parsed {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ParsedVisitor)
    }
}

struct ParsedVisitor;

impl<'de> Visitor<'de> for ParsedVisitor {
    type Value = Parsed;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("a YAML value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Parsed, E> {
        Ok(Parsed::Scalar(Scalar::Bool(value)))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Parsed, E> {
        Ok(Parsed::Scalar(Scalar::Integer(i128::from(value))))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Parsed, E> {
        Ok(Parsed::Scalar(Scalar::Integer(i128::from(value))))
    }

    fn visit_f64<E: serde::de::Error>(self, value: f64) -> Result<Parsed, E> {
        if !value.is_finite() {
            return Err(E::custom("a number that is not finite"));
        }
        Ok(Parsed::Scalar(Scalar::Float(value)))
    }

    fn visit_str<E>(self, value: &str) -> Result<Parsed, E> {
        Ok(Parsed::Scalar(Scalar::Text(value.to_owned())))
    }

    fn visit_string<E>(self, value: String) -> Result<Parsed, E> {
        Ok(Parsed::Scalar(Scalar::Text(value)))
    }

    fn visit_unit<E>(self) -> Result<Parsed, E> {
        Ok(Parsed::Scalar(Scalar::Null))
    }

    fn visit_none<E>(self) -> Result<Parsed, E> {
        Ok(Parsed::Scalar(Scalar::Null))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Parsed, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element::<Spanned<Parsed>>()? {
            list.push(item);
        }
        Ok(Parsed::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut entries: A) -> Result<Parsed, A::Error> {
        let mut map: Vec<(Spanned<String>, Spanned<Parsed>)> = Vec::new();
        while let Some((key, value)) = entries.next_entry::<Spanned<String>, Spanned<Parsed>>()? {
            // The parser compares keys as YAML values; `1` and `"1"` are two there and one here.
            if map.iter().any(|(earlier, _)| earlier.value == key.value) {
                return Err(A::Error::custom(format!("key `{}` stands in the map a second time", key.value)));
            }
            map.push((key, value));
        }
        Ok(Parsed::Map(map))
    }
}

impl Place {
    fn new(origin: &Arc<Origin>, location: Location) -> Self {
        Self { origin: Arc::clone(origin), line: location.line(), column: location.column() }
    }

    /// The start of a text.
    pub(crate) fn start(origin: &Arc<Origin>) -> Self {
        Self { origin: Arc::clone(origin), line: 1, column: 1 }
    }

    /// The folder that relative paths written here start from.
    pub(crate) fn folder(&self) -> &Path {
        match &*self.origin {
            Origin::File { folder, .. } | Origin::Override { folder, .. } => folder,
        }
    }

    /// The file or override as the user named it.
    pub(crate) fn file(&self) -> String {
        match &*self.origin {
            Origin::File { shown, .. } => shown.clone(),
            Origin::Override { .. } => self.to_string(),
        }
    }

    /// A place in a file that does not exist.
    #[cfg(test)]
    pub(crate) fn for_test(shown: &str, line: u64, column: u64) -> Self {
        Self { origin: Arc::new(Origin::File { shown: shown.to_owned(), folder: PathBuf::from("/") }), line, column }
    }
}

impl fmt::Display for Place {
    /// `file:line:column`, or `--set key=value`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &*self.origin {
            Origin::File { shown, .. } if self.line == 0 => f.write_str(shown),
            Origin::File { shown, .. } => write!(f, "{shown}:{}:{}", self.line, self.column),
            Origin::Override { text, .. } => write!(f, "--set {}", shortened(text)),
        }
    }
}

impl Node {
    /// The value of a key, if this is a map that has it; a key that is unset with `null` is not there.
    pub(crate) fn get(&self, key: &str) -> Option<&Self> {
        let Value::Map(entries) = &self.value else { return None };
        entries.iter().find(|entry| entry.key == key).map(|entry| &entry.node).filter(|node| !node.is_null())
    }

    /// Whether this is `null`.
    pub(crate) fn is_null(&self) -> bool {
        matches!(self.value, Value::Scalar(Scalar::Null))
    }

    /// The place of a dotted key path: of a single value the value's, of a map or list its key's; of what is absent its nearest parent's.
    pub(crate) fn place_of(&self, path: &str) -> &Place {
        self.place_at(path.split('.'))
    }

    /// [`Self::place_of`] with keys that may have dots in themselves.
    pub(crate) fn place_at<'key>(&self, keys: impl IntoIterator<Item = &'key str>) -> &Place {
        let mut node = self;
        let mut place = &self.place;
        for segment in keys {
            match &node.value {
                Value::Scalar(_) => return place,
                Value::Map(entries) => {
                    let Some(entry) = entries.iter().find(|entry| entry.key == segment) else { return place };
                    node = &entry.node;
                    place = if matches!(node.value, Value::Scalar(_)) { &node.place } else { &entry.place };
                }
                Value::List(items) => {
                    let Some(item) = segment.parse::<usize>().ok().and_then(|index| items.get(index)) else { return place };
                    node = item;
                    place = &item.place;
                }
            }
        }
        place
    }
}

impl fmt::Display for Node {
    /// As a message shows what was found.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.value {
            Value::Scalar(scalar) => write!(f, "{scalar}"),
            Value::List(items) => write!(f, "a list of {}", items.len()),
            Value::Map(_) => f.write_str("a map"),
        }
    }
}

impl fmt::Display for Scalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Null => f.write_str("nothing"),
            Self::Bool(value) => write!(f, "{value}"),
            Self::Integer(value) => write!(f, "{value}"),
            // The debug form keeps the exponent of 1e-8 and the point of 5.0.
            Self::Float(value) => write!(f, "{value:?}"),
            Self::Text(value) => write!(f, "`{}`", shortened(value)),
        }
    }
}

/// The text on one line, cut where it is long.
pub(crate) fn shortened(text: &str) -> String {
    let line = text.replace('\n', "\\n").replace(char::is_control, " ");
    if line.chars().count() <= MAX_SHOWN_CHARS {
        return line;
    }
    line.chars().take(MAX_SHOWN_CHARS - 1).chain(['…']).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin() -> Arc<Origin> {
        Arc::new(Origin::File { shown: "r.yaml".to_owned(), folder: PathBuf::from("/") })
    }

    fn read(text: &str) -> Node {
        parse(text, &origin()).unwrap()
    }

    #[test]
    fn scalars_have_the_types_of_the_core_schema() {
        let table = [
            ("~", Scalar::Null),
            ("null", Scalar::Null),
            ("true", Scalar::Bool(true)),
            ("yes", Scalar::Text("yes".to_owned())),
            ("no", Scalar::Text("no".to_owned())),
            ("12", Scalar::Integer(12)),
            ("-3", Scalar::Integer(-3)),
            ("18446744073709551615", Scalar::Integer(i128::from(u64::MAX))),
            ("1e-3", Scalar::Float(1e-3)),
            ("0.5", Scalar::Float(0.5)),
            (".nan", Scalar::Text(".nan".to_owned())),
            ("\"12\"", Scalar::Text("12".to_owned())),
            ("linear", Scalar::Text("linear".to_owned())),
            ("80_10_10", Scalar::Text("80_10_10".to_owned())),
            ("-1_000 # not a number", Scalar::Text("-1_000".to_owned())),
        ];
        for (text, expected) in table {
            assert_eq!(read(&format!("key: {text}")).get("key").map(|node| node.value.clone()), none_if_null(expected), "{text}");
        }
    }

    fn none_if_null(scalar: Scalar) -> Option<Value> {
        if scalar == Scalar::Null { None } else { Some(Value::Scalar(scalar)) }
    }

    #[test]
    fn keys_and_values_know_their_places() {
        let root = read("a: 1\nb:\n  c: [x, y]\n  d:\n    - e: 2\n");
        let table = [("a", "r.yaml:1:4"), ("b", "r.yaml:2:1"), ("b.c", "r.yaml:3:3"), ("b.c.1", "r.yaml:3:10"), ("b.d.0.e", "r.yaml:5:10")];
        for (path, expected) in table {
            assert_eq!(root.place_of(path).to_string(), expected, "{path}");
        }
        assert_eq!(root.place_of("b.missing").to_string(), "r.yaml:2:1", "an absent key is at its parent");
    }

    #[test]
    fn broken_texts_say_where() {
        let table = [
            ("a: 1\na: 2\n", "r.yaml:2:1", "key `a` stands here a second time"),
            ("a: [1, 2\nb: 3\n", "r.yaml:", ""),
            ("a: 1\n---\nb: 2\n", "r.yaml", ""),
            ("a: *nowhere\n", "r.yaml", ""),
            ("1: x\n\"1\": y\n", "r.yaml", "second time"),
        ];
        for (text, place, message) in table {
            let error = parse(text, &origin()).unwrap_err();
            assert!(error.place.to_string().starts_with(place), "{text:?}: {}", error.place);
            assert!(error.message.contains(message), "{text:?}: {}", error.message);
        }
    }

    #[test]
    fn size_and_depth_are_bounded() {
        let deep = format!("a: {}1{}", "[".repeat(MAX_DEPTH_LEVELS + 1), "]".repeat(MAX_DEPTH_LEVELS + 1));
        assert!(parse(&deep, &origin()).is_err());
        let large = format!("a: \"{}\"", "x".repeat(MAX_RECIPE_BYTES));
        assert!(parse(&large, &origin()).unwrap_err().message.contains("bytes"));
    }

    #[test]
    fn long_and_multi_line_texts_are_shortened() {
        assert_eq!(shortened("a\nb"), "a\\nb");
        assert_eq!(shortened(&"é".repeat(100)).chars().count(), MAX_SHOWN_CHARS);
    }
}
