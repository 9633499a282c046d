//! The points of a sweep: what each changes in the recipe.

use serde_json::Value as Json;

use super::draw::draw;
use super::{Space, Sweep};
use crate::tree::{Node, Place};

/// One key, the value that it is to have, and the places in the recipe that say so.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Change {
    pub(super) key: String,
    pub(super) key_place: Place,
    pub(super) value: Json,
    pub(super) place: Place,
}

/// A point of a sweep with one seed.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Point {
    pub(super) changes: Vec<Change>,
    /// `None` leaves the recipe's own seed.
    pub(super) seed: Option<u64>,
}

/// Changes that are made together.
type Choice = Vec<Change>;

/// Every point with every seed: the seeds change fastest, then the last part of the space.
///
/// `root` is the composed recipe, for the places of the values.
pub(super) fn points(sweep: &Sweep, root: &Node) -> Vec<Point> {
    let mut combinations: Vec<Choice> = vec![Vec::new()];
    for axis in axes(&sweep.space, root) {
        let longer = |chosen: &Choice| axis.iter().map(|choice| [chosen.as_slice(), choice].concat()).collect::<Vec<_>>();
        combinations = combinations.iter().flat_map(longer).collect();
    }
    let seeds: Vec<Option<u64>> = if sweep.seeds.is_empty() { vec![None] } else { sweep.seeds.iter().copied().map(Some).collect() };
    let with_seeds = |changes: Choice| seeds.iter().map(|seed| Point { changes: changes.clone(), seed: *seed }).collect::<Vec<_>>();
    combinations.into_iter().flat_map(with_seeds).collect()
}

/// The parts of the space whose product the points are, in order; each holds at least one choice.
fn axes(space: &Space, root: &Node) -> Vec<Vec<Choice>> {
    let place = |keys: &[&str]| root.place_at(["sweep"].iter().chain(keys).copied()).clone();
    // A list stands at its key, a value of it at itself.
    let change = |key: &str, value: &Json, keys: &[&str]| {
        let key_end = keys.iter().position(|known| *known == key).map_or(keys.len(), |index| index + 1);
        Change { key: key.to_owned(), key_place: place(&keys[..key_end]), value: value.clone(), place: place(keys) }
    };
    let mut axes: Vec<Vec<Choice>> = Vec::new();
    for (key, values) in &space.grid {
        let numbered = values.iter().enumerate();
        axes.push(numbered.map(|(index, value)| vec![change(key, value, &["grid", key, &index.to_string()])]).collect());
    }
    for (group_index, group) in space.paired.iter().enumerate() {
        let length = group.iter().map(|(_, values)| values.len()).min().unwrap_or(0);
        let group_number = group_index.to_string();
        let choice = |index: usize| {
            let keys = group.iter().map(|(key, values)| (key, &values[index]));
            keys.map(|(key, value)| change(key, value, &["paired", &group_number, key, &index.to_string()])).collect()
        };
        axes.push((0..length).map(choice).collect());
    }
    if !space.list.is_empty() {
        let numbered = space.list.iter().enumerate();
        let choice = |(index, arm): (usize, &Vec<(String, Json)>)| {
            arm.iter().map(|(key, value)| change(key, value, &["list", &index.to_string(), key])).collect()
        };
        axes.push(numbered.map(choice).collect());
    }
    if let Some(random) = &space.random {
        let drawn = |number: u32| {
            let keys = random.keys.iter().map(|(key, distribution)| (key, draw(distribution, random.seed, key, u64::from(number))));
            keys.map(|(key, value)| change(key, &value, &["random", "keys", key])).collect()
        };
        axes.push((0..random.samples).map(drawn).collect());
    }
    axes
}

impl Point {
    /// The point as a message shows it: `key=value, key=value, seed 3`.
    pub(super) fn shown(&self) -> String {
        let changes = self.changes.iter().map(|change| format!("{}={}", change.key, crate::tree::shortened(&change.value.to_string())));
        let all: Vec<String> = changes.chain(self.seed.map(|seed| format!("seed {seed}"))).collect();
        if all.is_empty() { "the recipe as it is".to_owned() } else { all.join(", ") }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::study::{Distribution, Metric, RandomSpace, Score};

    fn sweep(space: Space, seeds: &[u64]) -> Sweep {
        let metric = Metric { task: None, score: Score::Loss };
        Sweep { space, seeds: seeds.to_vec(), concurrency: 1, pack: 1, metric, early_stopping: None }
    }

    fn values(keys: &[(&str, Json)]) -> Vec<(String, Vec<Json>)> {
        keys.iter().map(|(key, values)| ((*key).to_owned(), values.as_array().unwrap().clone())).collect()
    }

    fn arm(keys: &[(&str, Json)]) -> Vec<(String, Json)> {
        keys.iter().map(|(key, value)| ((*key).to_owned(), value.clone())).collect()
    }

    /// What the points look like, in order.
    fn shown(space: Space, seeds: &[u64]) -> Vec<String> {
        let root = Node::from_json(&json!({}), &Place::for_test("r.yaml", 1, 1));
        let sweep = sweep(space, seeds);
        let points = points(&sweep, &root);
        assert_eq!(points.len() as u64, sweep.num_trials(), "the number is known without the points");
        points.iter().map(Point::shown).collect()
    }

    #[test]
    fn each_part_alone() {
        assert_eq!(shown(Space::default(), &[]), ["the recipe as it is"]);
        assert_eq!(shown(Space::default(), &[4, 5]), ["seed 4", "seed 5"]);
        let grid = Space { grid: values(&[("a", json!([1, 2])), ("b", json!(["x", null]))]), ..Space::default() };
        assert_eq!(shown(grid, &[]), ["a=1, b=\"x\"", "a=1, b=null", "a=2, b=\"x\"", "a=2, b=null"]);
        let paired = Space { paired: vec![values(&[("a", json!([1, 2])), ("b", json!([3, 4]))])], ..Space::default() };
        assert_eq!(shown(paired, &[]), ["a=1, b=3", "a=2, b=4"]);
        let list = Space { list: vec![arm(&[]), arm(&[("a", json!(1)), ("b", json!(2))])], ..Space::default() };
        assert_eq!(shown(list, &[]), ["the recipe as it is", "a=1, b=2"]);
    }

    #[test]
    fn parts_are_multiplied_and_the_seeds_change_fastest() {
        let space = Space {
            grid: values(&[("g", json!([1, 2]))]),
            paired: vec![values(&[("p", json!([3, 4])), ("q", json!([5, 6]))]), values(&[("r", json!([7]))])],
            list: vec![arm(&[("l", json!(8))]), arm(&[("m", json!(9))])],
            random: Some(RandomSpace { samples: 2, seed: 1, keys: vec![("z".to_owned(), Distribution::Choice(vec![json!(0)]))] }),
        };
        assert_eq!(space.keys(), ["g", "p", "q", "r", "l", "m", "z"]);
        let points = shown(space, &[1, 2]);
        assert_eq!(points.len(), 2 * 2 * 2 * 2 * 2);
        assert_eq!(points[0], "g=1, p=3, q=5, r=7, l=8, z=0, seed 1");
        assert_eq!(points[1], "g=1, p=3, q=5, r=7, l=8, z=0, seed 2");
        assert_eq!(points[4], "g=1, p=3, q=5, r=7, m=9, z=0, seed 1");
        assert_eq!(points[31], "g=2, p=4, q=6, r=7, m=9, z=0, seed 2");
    }

    #[test]
    fn a_random_point_depends_only_on_its_number() {
        let space = |samples| Space {
            random: Some(RandomSpace { samples, seed: 3, keys: vec![("z".to_owned(), Distribution::Uniform(0.0, 1.0))] }),
            ..Space::default()
        };
        let (few, many) = (shown(space(3), &[]), shown(space(9), &[]));
        assert_eq!(few[..], many[..3]);
        assert_eq!(many.iter().collect::<std::collections::BTreeSet<_>>().len(), 9);
    }

    #[test]
    fn changes_know_where_they_are_stated() {
        let origin = std::sync::Arc::new(crate::tree::Origin::File { shown: "r.yaml".to_owned(), folder: "/f".into() });
        let text = "sweep:\n  grid: {train.steps: [1, 2]}\n  list: [{a.b: 1}]\n";
        let root = crate::tree::parse(text, &origin).unwrap();
        let space = Space { grid: values(&[("train.steps", json!([1, 2]))]), list: vec![arm(&[("a.b", json!(1))])], ..Space::default() };
        let points = points(&sweep(space, &[]), &root);
        let places: Vec<String> = points[1].changes.iter().map(|change| change.place.to_string()).collect();
        assert_eq!(places, ["r.yaml:2:27", "r.yaml:3:16"]);
        assert_eq!(points[1].changes[0].key_place.to_string(), "r.yaml:2:10");
    }
}
