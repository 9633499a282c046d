//! The JSON Schemas of a recipe file and of a cluster file, made from the raw types, for editors and for the validation.

use crate::raw::{RecipeRaw, SiteRaw};

/// The JSON Schema (draft 2020-12) of a recipe file, indented.
pub fn schema_json() -> String {
    format!("{:#}", schema())
}

/// The JSON Schema (draft 2020-12) of a cluster file, indented.
pub fn site_schema_json() -> String {
    format!("{:#}", site_schema())
}

/// The schema of a cluster file as a value.
pub(crate) fn site_schema() -> serde_json::Value {
    schemars::schema_for!(SiteRaw).to_value()
}

/// The schema of a recipe file as a value.
pub(crate) fn schema() -> serde_json::Value {
    schemars::schema_for!(RecipeRaw).to_value()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Keywords that the validation obeys, and those that only describe.
    const KNOWN_KEYWORDS: [&str; 22] = [
        "$schema",
        "$defs",
        "$ref",
        "additionalProperties",
        "anyOf",
        "const",
        "default",
        "description",
        "enum",
        "exclusiveMaximum",
        "exclusiveMinimum",
        "format",
        "items",
        "maxItems",
        "maximum",
        "minItems",
        "minLength",
        "minimum",
        "oneOf",
        "properties",
        "required",
        "type",
    ];

    #[test]
    fn the_schema_uses_only_keywords_that_the_validation_knows() {
        let schema = schema();
        for (name, definition) in schema["$defs"].as_object().unwrap() {
            visit(definition, name);
        }
        visit(&schema, "recipe");
    }

    fn visit(schema: &serde_json::Value, path: &str) {
        let Some(keywords) = schema.as_object() else { return };
        for (keyword, value) in keywords {
            assert!(keyword == "title" || KNOWN_KEYWORDS.contains(&keyword.as_str()), "{path}: {keyword}");
            for inner in inner_schemas(keyword, value) {
                visit(inner, path);
            }
        }
    }

    fn inner_schemas<'schema>(keyword: &str, value: &'schema serde_json::Value) -> Vec<&'schema serde_json::Value> {
        match keyword {
            "properties" => value.as_object().unwrap().values().collect(),
            "items" | "additionalProperties" => vec![value],
            "anyOf" | "oneOf" => value.as_array().unwrap().iter().collect(),
            _ => Vec::new(),
        }
    }

    #[test]
    fn every_key_is_described() {
        let schema = schema();
        let definitions = schema["$defs"].as_object().unwrap().values().chain([&schema]);
        for definition in definitions {
            for (key, property) in definition["properties"].as_object().into_iter().flatten() {
                assert!(property["description"].is_string(), "{key} has no description: {property}");
            }
        }
    }

    #[test]
    fn the_text_is_the_schema() {
        let parsed: serde_json::Value = serde_json::from_str(&schema_json()).unwrap();
        assert_eq!(parsed, schema());
    }
}
