//! The stages of a sweep by content hash: what several trials need is there once.

use std::collections::BTreeMap;

use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::study::Trial;

/// Most earlier stages of one trial, one after another.
const MAX_DEPTH: usize = 16;

/// One trial of the graph.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    /// What it computes.
    pub trial: Trial,
    /// Whether the sweep asks for it; otherwise something starts from it.
    pub wanted: bool,
    /// Whether something starts from it, so that its model is exported.
    pub is_stage: bool,
    /// Its earlier stage.
    pub parent: Option<usize>,
}

/// All trials of a sweep and their earlier stages, each once, stages before what starts from them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Graph {
    /// The trials.
    pub nodes: Vec<Node>,
}

impl Graph {
    /// Puts trials together. Fails with kind `Recipe` where two trials compute the same, naming both.
    pub fn new(trials: Vec<Trial>) -> Result<Self, Failure> {
        let mut graph = Self::default();
        let mut places = BTreeMap::new();
        for trial in trials {
            let parameters = parameters_text(&trial);
            let (place, is_new) = graph.insert(trial, &mut places, 0)?;
            let node = &mut graph.nodes[place];
            if node.wanted && !is_new {
                return Err(Failure::new(FailureKind::Recipe, "two trials of the sweep are the same")
                    .at(&node.trial.recipe.name)
                    .found(format!("{} and {parameters}", parameters_text(&node.trial)))
                    .hint("take one of them out of `sweep`, or give the sweep `seeds`"));
            }
            node.wanted = true;
        }
        Ok(graph)
    }

    /// Adds a trial and its earlier stages; returns its place, and whether it is new.
    fn insert(&mut self, mut trial: Trial, places: &mut BTreeMap<String, usize>, depth: usize) -> Result<(usize, bool), Failure> {
        if let Some(&place) = places.get(&trial.hash) {
            return Ok((place, false));
        }
        if depth > MAX_DEPTH {
            return Err(Failure::new(FailureKind::Recipe, "too many stages one after another")
                .at(&trial.recipe.name)
                .expected(format!("at most {MAX_DEPTH}")));
        }
        let parent = match trial.parent.take() {
            None => None,
            Some(stage) => {
                trial.parent = Some(stage.clone());
                let (place, _) = self.insert(*stage, places, depth + 1)?;
                self.nodes[place].is_stage = true;
                Some(place)
            }
        };
        let place = self.nodes.len();
        places.insert(trial.hash.clone(), place);
        self.nodes.push(Node { trial, wanted: false, is_stage: false, parent });
        Ok((place, true))
    }

    /// Trials that the sweep asks for.
    pub fn wanted(&self) -> impl Iterator<Item = &Node> {
        self.nodes.iter().filter(|node| node.wanted)
    }

    /// Different data preparations.
    pub fn num_preparations(&self) -> usize {
        let hashes: std::collections::BTreeSet<&str> = self.nodes.iter().map(|node| node.trial.data_hash.as_str()).collect();
        hashes.len()
    }
}

/// Swept keys and values in one line; `seed N` where nothing is swept.
pub fn parameters_text(trial: &Trial) -> String {
    let mut parts: Vec<String> = trial.parameters.iter().map(|(key, value)| format!("{key}={}", plain(value))).collect();
    parts.push(format!("seed={}", trial.recipe.seed));
    parts.join(" ")
}

/// A value as a user writes it.
pub fn plain(value: &serde_json::Value) -> String {
    match value {
        serde_json::Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sample::recipe;

    fn trial(hash: &str, data_hash: &str, parent: Option<Trial>) -> Trial {
        let (hash, data_hash) = (hash.to_owned(), data_hash.to_owned());
        let parameters = vec![("train.steps".to_owned(), hash.len().into())];
        Trial { parameters, recipe: recipe(), hash, data_hash, data_seed: 1, parent: parent.map(Box::new) }
    }

    #[test]
    fn stages_are_shared_by_hash() {
        let stage = || trial("stage", "d1", Some(trial("base", "d1", None)));
        let trials =
            vec![trial("a", "d1", Some(stage())), trial("b", "d2", Some(stage())), trial("c", "d1", Some(trial("base", "d1", None)))];
        let graph = Graph::new(trials).unwrap();
        let found: Vec<_> = graph.nodes.iter().map(|node| (node.trial.hash.as_str(), node.wanted, node.is_stage, node.parent)).collect();
        let expected = [
            ("base", false, true, None),
            ("stage", false, true, Some(0)),
            ("a", true, false, Some(1)),
            ("b", true, false, Some(1)),
            ("c", true, false, Some(0)),
        ];
        assert_eq!(found, expected);
        assert_eq!((graph.wanted().count(), graph.num_preparations()), (3, 2));
    }

    #[test]
    fn a_trial_can_be_the_stage_of_another() {
        for wanted_first in [true, false] {
            let mut trials = vec![trial("a", "d", None), trial("b", "d", Some(trial("a", "d", None)))];
            if !wanted_first {
                trials.reverse();
            }
            let graph = Graph::new(trials).unwrap();
            assert_eq!(graph.nodes.len(), 2);
            let first = &graph.nodes[0];
            assert_eq!((first.trial.hash.as_str(), first.wanted, first.is_stage), ("a", true, true));
        }
    }

    #[test]
    fn equal_trials_are_refused_by_name() {
        let failure = Graph::new(vec![trial("a", "d", None), trial("a", "d", None)]).unwrap_err();
        assert_eq!(failure.kind, FailureKind::Recipe);
        assert_eq!(failure.found.unwrap(), "train.steps=1 seed=1 and train.steps=1 seed=1");
    }
}
