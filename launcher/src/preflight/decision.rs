//! Who is to blame, pure: measurements and limits in; bad nodes and reasons out.

use std::collections::BTreeMap;

use cloze_recipes::site::Preflight;
use serde::Serialize;

use super::protocol::{Measurements, NodeMeasurement, PairMeasurement};

/// Clocks that differ by more make the times of a run's events and files meaningless.
const MAX_CLOCK_SKEW_S: f64 = 30.0;

/// A node that a run must not use.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct BadNode {
    /// Its name in the list of nodes.
    pub node: String,
    /// What is wrong, all of it.
    pub reason: String,
}

/// The nodes that must not be used, in the order of the measurements.
pub fn decide(measured: &Measurements, limits: &Preflight) -> Vec<BadNode> {
    let mut reasons: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    let usual = Usual { device_s: median(device_seconds(&measured.nodes)), has_time: clocks_agree(&measured.nodes) };
    for node in &measured.nodes {
        let own = own_reasons(node, usual, limits);
        if !own.is_empty() {
            reasons.insert(&node.node, own);
        }
    }
    // A node that could not be asked explains all its links.
    let is_known_bad = |name: &str| measured.nodes.iter().any(|node| node.node == name && node.error.is_some());
    let pairs = measured.pairs.iter().filter(|pair| !is_known_bad(&pair.a) && !is_known_bad(&pair.b)).collect();
    let links = Links { nodes: measured.nodes.iter().map(|node| node.node.as_str()).collect(), pairs };
    for (node, reason) in links.blame(limits.min_bandwidth_share) {
        reasons.entry(node).or_default().push(reason);
    }
    let bad = |node: &str| reasons.get(node).map(|reasons| BadNode { node: node.to_owned(), reason: reasons.join("; ") });
    measured.nodes.iter().filter_map(|node| bad(&node.node)).collect()
}

/// What is odd and no node's fault, as far as anybody can tell.
pub fn warnings(measured: &Measurements) -> Vec<String> {
    let again = measured.pairs.iter().filter_map(|pair| {
        let error = pair.first_error.as_ref()?;
        Some(format!("the link between {} and {} worked only the second time; the first time: {error}", pair.a, pair.b))
    });
    open_clocks(&measured.nodes).into_iter().chain(again).collect()
}

/// Clocks that differ, where nobody can tell which of them are wrong.
fn open_clocks(nodes: &[NodeMeasurement]) -> Option<String> {
    if clocks_agree(nodes) {
        return None;
    }
    let with_skew = |node: &&NodeMeasurement| node.clock_skew_s.is_some();
    let order = |a: &&NodeMeasurement, b: &&NodeMeasurement| a.clock_skew_s.unwrap_or(0.0).total_cmp(&b.clock_skew_s.unwrap_or(0.0));
    let nodes = nodes.iter().filter(with_skew);
    let (first, last) = nodes.clone().min_by(order).zip(nodes.max_by(order))?;
    let apart_s = last.clock_skew_s.unwrap_or(0.0) - first.clock_skew_s.unwrap_or(0.0);
    let (ahead, behind) = (&last.node, &first.node);
    Some(format!("the clock of {ahead} is {apart_s:.0} s ahead of that of {behind}, and too few others say which one is wrong"))
}

/// Whether more than half of the clocks agree with the one in the middle, so that whoever does not is wrong.
fn clocks_agree(nodes: &[NodeMeasurement]) -> bool {
    let skews = nodes.iter().filter_map(|node| node.clock_skew_s);
    let num_agreeing = skews.clone().filter(|skew_s| skew_s.abs() <= MAX_CLOCK_SKEW_S).count();
    num_agreeing * 2 > skews.count() || num_agreeing == 0
}

/// What nodes are compared with.
#[derive(Clone, Copy)]
struct Usual {
    /// Time that the median device takes for a matrix product.
    device_s: Option<f64>,
    /// Whether the median of the clocks is known to be right.
    has_time: bool,
}

/// What is wrong with a node by itself.
fn own_reasons(node: &NodeMeasurement, usual: Usual, limits: &Preflight) -> Vec<String> {
    if let Some(error) = &node.error {
        return vec![error.clone()];
    }
    let mut reasons = Vec::new();
    if let Some(error) = &node.device_error {
        reasons.push(format!("its devices could not be checked: {error}"));
    }
    for device in &node.devices {
        if let Some(error) = &device.error {
            reasons.push(format!("{}: {error}", device.device));
        }
        if let (Some(seconds), Some(median)) = (device.seconds, usual.device_s)
            && seconds > limits.max_slowdown * median
        {
            let times = seconds / median;
            reasons.push(format!("{} takes {times:.1} times as long as the median device for a matrix product", device.device));
        }
    }
    if let Some(error) = &node.store_error {
        reasons.push(format!("checkpoints cannot be stored from here: {error}"));
    }
    if let Some(skew_s) = node.clock_skew_s.filter(|skew_s| usual.has_time && skew_s.abs() > MAX_CLOCK_SKEW_S) {
        let direction = if skew_s > 0.0 { "ahead of" } else { "behind" };
        reasons.push(format!("its clock is {:.0} s {direction} the median of the nodes' clocks", skew_s.abs()));
    }
    reasons
}

fn device_seconds(nodes: &[NodeMeasurement]) -> Vec<f64> {
    nodes.iter().flat_map(|node| &node.devices).filter_map(|device| device.seconds).collect()
}

/// The measured pairs of nodes.
struct Links<'a> {
    /// All nodes, in their order.
    nodes: Vec<&'a str>,
    pairs: Vec<&'a PairMeasurement>,
}

impl<'a> Links<'a> {
    /// Nodes that explain the bad pairs: again and again the one that is in most of those that are left.
    fn blame(&self, min_share: f64) -> Vec<(&'a str, String)> {
        // Where nothing could be measured, only what does not work is bad.
        let usual = self.usual_bandwidth();
        let is_slow = |mbit: f64| usual.is_some_and(|usual| mbit < min_share * usual);
        let mut left: Vec<&PairMeasurement> = self.pairs.iter().copied().filter(|pair| pair.mbit_per_s.is_none_or(is_slow)).collect();
        let mut blamed = Vec::new();
        while let Some(node) = self.most_blamed(&left) {
            let of_node: Vec<&PairMeasurement> = left.iter().copied().filter(|pair| has(pair, node)).collect();
            blamed.push((node, self.reason(node, &of_node, usual.unwrap_or(0.0))));
            left.retain(|pair| !has(pair, node));
        }
        blamed
    }

    /// What a healthy link carries: the median over the nodes of each one's best pair. The median over all pairs would be a bad one as
    /// soon as a third of the nodes are slow.
    fn usual_bandwidth(&self) -> Option<f64> {
        let mut best: BTreeMap<&str, f64> = BTreeMap::new();
        for pair in &self.pairs {
            let Some(mbit) = pair.mbit_per_s else { continue };
            for node in [pair.a.as_str(), pair.b.as_str()] {
                let known = best.entry(node).or_insert(mbit);
                *known = known.max(mbit);
            }
        }
        median(best.into_values().collect())
    }

    /// The node in most of these pairs; of several the slowest, and else the last one, since the first node holds the controller.
    fn most_blamed(&self, left: &[&PairMeasurement]) -> Option<&'a str> {
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for pair in left {
            *counts.entry(&pair.a).or_default() += 1;
            *counts.entry(&pair.b).or_default() += 1;
        }
        let most = counts.values().max()?;
        let candidates = self.nodes.iter().copied().filter(|node| counts.get(node) == Some(most));
        candidates.reduce(|best, node| if self.own_median(node) <= self.own_median(best) { node } else { best })
    }

    /// The median over a node's pairs; a pair that could not be measured carries nothing.
    fn own_median(&self, node: &str) -> f64 {
        median(self.of(node).map(|pair| pair.mbit_per_s.unwrap_or(0.0)).collect()).unwrap_or(0.0)
    }

    fn of(&self, node: &str) -> impl Iterator<Item = &PairMeasurement> {
        self.pairs.iter().copied().filter(move |pair| has(pair, node))
    }

    fn reason(&self, node: &str, bad: &[&PairMeasurement], usual: f64) -> String {
        let num_pairs = self.of(node).count();
        let other = |pair: &PairMeasurement| if pair.a == node { pair.b.clone() } else { pair.a.clone() };
        if let Some((pair, error)) = bad.iter().find_map(|pair| pair.error.as_ref().map(|error| (pair, error))) {
            return format!("{} of its {num_pairs} links do not work; with {}: {error}", bad.len(), other(pair));
        }
        let slowest = bad.iter().filter_map(|pair| pair.mbit_per_s).fold(f64::INFINITY, f64::min);
        format!("{} of its {num_pairs} links are slow: {slowest:.0} Mbit/s, where {usual:.0} Mbit/s are usual", bad.len())
    }
}

fn has(pair: &PairMeasurement, node: &str) -> bool {
    pair.a == node || pair.b == node
}

/// The upper one of two in the middle.
pub(super) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

#[cfg(test)]
mod tests {
    use super::super::protocol::DeviceMeasurement;
    use super::*;

    const LIMITS: Preflight = Preflight { enabled: true, min_bandwidth_share: 0.3, max_slowdown: 3.0, timeout_s: 300 };

    fn node(name: &str) -> NodeMeasurement {
        let device = DeviceMeasurement { device: "cuda:0".into(), error: None, seconds: Some(0.01), gflops: Some(1.0) };
        NodeMeasurement { node: name.into(), devices: vec![device], clock_skew_s: Some(0.0), ..NodeMeasurement::default() }
    }

    /// Nodes by the letters of `names`, and pairs by two letters and what they carry; 0 is a pair that does not work.
    fn measured(names: &str, pairs: &[(&str, f64)]) -> Measurements {
        let nodes = names.chars().map(|name| node(&name.to_string())).collect();
        let pairs = pairs.iter().map(|(names, mbit)| PairMeasurement {
            a: names[..1].into(),
            b: names[1..].into(),
            mbit_per_s: (*mbit > 0.0).then_some(*mbit),
            error: (*mbit == 0.0).then(|| "no route".to_owned()),
            first_error: None,
        });
        Measurements { nodes, pairs: pairs.collect() }
    }

    fn bad(measured: &Measurements) -> String {
        decide(measured, &LIMITS).into_iter().map(|bad| bad.node).collect()
    }

    #[test]
    fn links_are_blamed_on_the_node_that_has_most_bad_ones() {
        let cases: [(&str, &[(&str, f64)], &str); 12] = [
            ("one node alone", &[], ""),
            ("two alike", &[("ab", 900.0)], ""),
            ("two that cannot be compared", &[("ab", 1.0)], ""),
            ("two that do not reach each other", &[("ab", 0.0)], "b"),
            ("three, one slow", &[("ab", 900.0), ("ac", 10.0), ("bc", 10.0)], "c"),
            ("three, the first slow", &[("ab", 10.0), ("ac", 10.0), ("bc", 900.0)], "a"),
            ("just above the share", &[("ab", 900.0), ("ac", 280.0), ("bc", 271.0)], ""),
            ("one link of many", &[("ab", 900.0), ("ac", 900.0), ("bc", 900.0), ("ad", 900.0), ("bd", 900.0), ("cd", 10.0)], "d"),
            ("one that nobody reaches", &[("ab", 900.0), ("ac", 0.0), ("bc", 0.0)], "c"),
            ("two slow of four", &[("ab", 900.0), ("ac", 9.0), ("bc", 9.0), ("ad", 9.0), ("bd", 9.0), ("cd", 9.0)], "cd"),
            ("no pair works", &[("ab", 0.0), ("ac", 0.0), ("bc", 0.0)], "bc"),
            ("not all pairs were measured", &[("ab", 900.0), ("cd", 10.0), ("ac", 900.0), ("bd", 10.0)], "d"),
        ];
        for (what, pairs, expected) in cases {
            assert_eq!(bad(&measured("abcd", pairs)), expected, "{what}");
        }
    }

    #[test]
    fn a_node_is_bad_for_its_own_sake() {
        type Change = fn(&mut NodeMeasurement);
        let cases: [(Change, &str); 7] = [
            (|node| node.error = Some("ssh ended with exit code 255".into()), "ssh ended with exit code 255"),
            (|node| node.device_error = Some("no worker".into()), "its devices could not be checked: no worker"),
            (|node| node.devices[0].error = Some("wrong product".into()), "cuda:0: wrong product"),
            (|node| node.devices[0].seconds = Some(0.031), "cuda:0 takes 3.1 times as long as the median device for a matrix product"),
            (|node| node.store_error = Some("denied".into()), "checkpoints cannot be stored from here: denied"),
            (|node| node.clock_skew_s = Some(-31.0), "its clock is 31 s behind the median of the nodes' clocks"),
            (|node| (node.devices[0].seconds, node.clock_skew_s) = (Some(0.029), Some(29.0)), ""),
        ];
        for (change, expected) in cases {
            let mut measured = measured("abc", &[("ab", 900.0), ("ac", 900.0), ("bc", 900.0)]);
            change(&mut measured.nodes[2]);
            let reasons: Vec<String> = decide(&measured, &LIMITS).into_iter().map(|bad| format!("{} {}", bad.node, bad.reason)).collect();
            let expected = if expected.is_empty() { String::new() } else { format!("c {expected}") };
            assert_eq!(reasons.join(", "), expected);
        }
    }

    #[test]
    fn a_clock_is_wrong_where_most_of_the_others_agree() {
        let cases: [(&[f64], &str, bool); 6] = [
            (&[0.0], "", false),
            (&[0.0, 40.0, 0.5], "b", false),
            (&[-40.0, 0.0, 0.5], "a", false),
            // The one of two that is asked first is no better than the other.
            (&[-40.0, 0.0], "", true),
            (&[-40.0, 0.0, -40.0, 0.0], "", true),
            (&[-40.0, 0.0, 40.0], "", true),
        ];
        for (skews, expected, is_open) in cases {
            let mut measured = measured(&"abcd"[..skews.len()], &[]);
            for (node, &skew_s) in measured.nodes.iter_mut().zip(skews) {
                node.clock_skew_s = Some(skew_s);
            }
            assert_eq!(bad(&measured), expected, "{skews:?}");
            assert_eq!(warnings(&measured).len(), usize::from(is_open), "{skews:?}");
        }
        let mut two = measured("ab", &[]);
        two.nodes[0].clock_skew_s = Some(-40.0);
        let expected = "the clock of b is 40 s ahead of that of a, and too few others say which one is wrong";
        assert_eq!(warnings(&two), [expected]);
        let mut links = measured("ab", &[("ab", 900.0)]);
        links.pairs[0].first_error = Some("no route".to_owned());
        assert_eq!((bad(&links).as_str(), warnings(&links).len()), ("", 1));
    }

    #[test]
    fn what_could_not_be_reached_explains_its_links_and_all_reasons_are_given() {
        let mut both = measured("abc", &[("ab", 900.0), ("ac", 10.0), ("bc", 10.0)]);
        both.nodes[2].store_error = Some("denied".into());
        let reason = &decide(&both, &LIMITS)[0].reason;
        let expected = "checkpoints cannot be stored from here: denied; 2 of its 2 links are slow: 10 Mbit/s, where 900 Mbit/s are usual";
        assert_eq!(reason, expected);
        let mut gone = measured("abc", &[("ab", 900.0), ("ac", 0.0), ("bc", 0.0)]);
        gone.nodes[2].error = Some("not reached".into());
        assert_eq!(decide(&gone, &LIMITS), [BadNode { node: "c".into(), reason: "not reached".into() }]);
    }
}
