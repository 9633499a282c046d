//! Trees as JSON and back.

use serde_json::Value as Json;

use super::{Entry, Node, Place, Scalar, Value};

impl Node {
    /// The tree without its places; keys that are unset with `null` are left out.
    pub(crate) fn json(&self) -> Json {
        match &self.value {
            Value::Scalar(scalar) => scalar.json(),
            Value::List(items) => items.iter().map(Self::json).collect(),
            Value::Map(entries) => {
                let kept = entries.iter().filter(|entry| !entry.node.is_null());
                Json::Object(kept.map(|entry| (entry.key.clone(), entry.node.json())).collect())
            }
        }
    }

    /// The tree without its places, and with the keys that are unset with `null`: where a map says what is to be changed elsewhere.
    pub(crate) fn json_with_nulls(&self) -> Json {
        match &self.value {
            Value::Scalar(scalar) => scalar.json(),
            Value::List(items) => items.iter().map(Self::json_with_nulls).collect(),
            Value::Map(entries) => Json::Object(entries.iter().map(|entry| (entry.key.clone(), entry.node.json_with_nulls())).collect()),
        }
    }

    /// A tree of which every part stands at one place.
    pub(crate) fn from_json(value: &Json, place: &Place) -> Self {
        let value = match value {
            Json::Array(items) => Value::List(items.iter().map(|item| Self::from_json(item, place)).collect()),
            Json::Object(map) => Value::Map(map.iter().map(|(key, value)| Entry::from_json(key, value, place)).collect()),
            Json::Null => Value::Scalar(Scalar::Null),
            Json::Bool(value) => Value::Scalar(Scalar::Bool(*value)),
            Json::String(text) => Value::Scalar(Scalar::Text(text.clone())),
            Json::Number(number) => Value::Scalar(Scalar::from_number(number)),
        };
        Self { place: place.clone(), value }
    }
}

impl Entry {
    fn from_json(key: &str, value: &Json, place: &Place) -> Self {
        Self { key: key.to_owned(), place: place.clone(), node: Node::from_json(value, place) }
    }
}

impl Scalar {
    fn json(&self) -> Json {
        match self {
            Self::Null => Json::Null,
            Self::Bool(value) => (*value).into(),
            Self::Integer(value) => match u64::try_from(*value) {
                Ok(unsigned) => unsigned.into(),
                Err(_) => i64::try_from(*value).map_or(Json::Null, Json::from),
            },
            Self::Float(value) => (*value).into(),
            Self::Text(value) => value.as_str().into(),
        }
    }

    fn from_number(number: &serde_json::Number) -> Self {
        let integer = number.as_u64().map(i128::from).or(number.as_i64().map(i128::from));
        // A JSON number that is no 64-bit integer is a finite float.
        integer.map_or_else(|| Self::Float(number.as_f64().unwrap_or_default()), Self::Integer)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn json_comes_back_from_a_tree() {
        let value = json!({"a": [1, -2, 0.5, 1e300, u64::MAX], "b.c": {"d": null, "e": "text"}, "f": true, "g": [null]});
        let node = Node::from_json(&value, &Place::for_test("r.yaml", 3, 5));
        assert_eq!(node.json_with_nulls(), value);
        assert_eq!(node.json()["b.c"], json!({"e": "text"}), "a key that is unset is not there");
        assert_eq!(node.place_at(["b.c", "e"]).to_string(), "r.yaml:3:5");
    }
}
