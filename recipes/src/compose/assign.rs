//! Changing single values of a tree: by another tree, by a key path.

use std::sync::Arc;

use super::{EXTENDS, PROFILES};
use crate::tree::{self, Entry, MAX_DEPTH_LEVELS, Node, Origin, Place, Scalar, Value};

/// The section of the earlier stage.
pub(crate) const AFTER: &str = "after";
/// What the section itself holds; every other key below it is one of the earlier stage's recipe.
const AFTER_KEYS: [&str; 2] = ["recipe", SET];
/// Changes of the earlier stage, by key path.
const SET: &str = "set";

/// Lays a tree over another: maps merge key by key, everything else replaces.
pub(super) fn merge(base: &mut Node, over: Node) {
    let place = over.place;
    match (&mut base.value, over.value) {
        (Value::Map(entries), Value::Map(stated)) => {
            for entry in stated {
                match entries.iter_mut().find(|earlier| earlier.key == entry.key) {
                    Some(earlier) => {
                        earlier.place = entry.place;
                        merge(&mut earlier.node, entry.node);
                    }
                    None => entries.push(entry),
                }
            }
        }
        (slot, value) => {
            *slot = value;
            base.place = place;
        }
    }
}

/// Applies one `key.path=value`; the error is the key path, as far as it can be told, and the message.
pub(super) fn apply_override(root: &mut Node, text: &str, origin: &Arc<Origin>) -> Result<(), (String, String)> {
    let Some((key_path, value)) = text.split_once('=') else {
        return Err((String::new(), "expected `key.path=value`".to_owned()));
    };
    let key_path = key_path.trim();
    let wrong = |message: String| (key_path.to_owned(), message);
    let place = Place::start(origin);
    let value = if value.trim().is_empty() {
        Node { place: place.clone(), value: Value::Scalar(Scalar::Null) }
    } else {
        tree::parse(value, origin).map_err(|error| wrong(error.message))?
    };
    assign(root, key_path, &place, value).map_err(wrong)
}

/// Lays a value over what stands at a key path; what is absent on the way is made, at `place`.
///
/// A key path below `after` that is not one of that section's own keys changes the earlier stage: it is added to `after.set`.
pub(crate) fn assign(root: &mut Node, key_path: &str, place: &Place, value: Node) -> Result<(), String> {
    let segments: Vec<&str> = key_path.split('.').collect();
    if segments.iter().any(|segment| segment.is_empty()) || segments.len() > MAX_DEPTH_LEVELS {
        return Err("expected keys joined by dots, such as `train.steps`".to_owned());
    }
    match segments.as_slice() {
        [EXTENDS, ..] => return Err("a base is named in the recipe file, not by an override".to_owned()),
        [PROFILES, ..] => return Err("a profile is stated in the recipe file; choose it with `--profile`".to_owned()),
        [AFTER, key, ..] if !AFTER_KEYS.contains(key) => {
            let stage_key = segments[1..].join(".");
            let set = step(step(root, AFTER, place)?, SET, place)?;
            return lay(set, &[&stage_key], place, value);
        }
        _ => {}
    }
    lay(root, &segments, place, value)
}

fn lay(root: &mut Node, segments: &[&str], place: &Place, value: Node) -> Result<(), String> {
    let mut slot = root;
    for segment in segments {
        slot = step(slot, segment, place)?;
    }
    merge(slot, value);
    Ok(())
}

/// The value below a key or list index; an absent key is made.
fn step<'tree>(node: &'tree mut Node, segment: &str, place: &Place) -> Result<&'tree mut Node, String> {
    if node.is_null() {
        node.value = Value::Map(Vec::new());
    }
    match &mut node.value {
        Value::Map(entries) => {
            let index = entries.iter().position(|entry| entry.key == segment).unwrap_or(entries.len());
            if index == entries.len() {
                let unset = Node { place: place.clone(), value: Value::Scalar(Scalar::Null) };
                entries.push(Entry { key: segment.to_owned(), place: place.clone(), node: unset });
            }
            Ok(&mut entries[index].node)
        }
        Value::List(items) => {
            let count = items.len();
            let index = segment.parse::<usize>().unwrap_or(usize::MAX);
            items.get_mut(index).ok_or_else(|| format!("found `{segment}`, expected the index of an item, from 0, in a list of {count}"))
        }
        Value::Scalar(scalar) => Err(format!("found {scalar}, expected a map or a list that has `{segment}`")),
    }
}
