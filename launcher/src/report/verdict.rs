//! What our numbers say about a paper's: verdicts on single values and on orders, each with its reason in words. All of it is pure.

use serde::Serialize;

use super::statistics::{Summary, Welch, welch};

/// Two means differ when chance alone would make such a difference less often than this.
const SIGNIFICANCE: f64 = 0.05;

/// How our value stands to the paper's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Verdict {
    /// Not farther from it than the tolerance.
    Within,
    /// Above it by more than the tolerance.
    Above,
    /// Below it by more than the tolerance.
    Below,
    /// Nothing can be said.
    NoVerdict,
}

impl Verdict {
    /// It in words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Within => "within",
            Self::Above => "above",
            Self::Below => "below",
            Self::NoVerdict => "no verdict",
        }
    }
}

/// One value of a table: the paper's and ours.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Cell {
    /// The paper's value.
    pub paper: Option<f64>,
    /// Our values, one for each trial that has one.
    pub values: Vec<f64>,
    /// Our values summed up.
    pub ours: Option<Summary>,
    /// Our mean less the paper's value.
    pub delta: Option<f64>,
    /// How the two compare.
    pub verdict: Verdict,
    /// Why.
    pub reason: String,
    /// The arm that ours is of, where the row is the best of several.
    pub chosen: Option<String>,
}

/// What a value is judged by.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Terms<'a> {
    /// The paper's value.
    pub paper: Option<f64>,
    /// How far ours may be from it.
    pub tolerance: Option<f64>,
    /// The paper's values cannot be had here.
    pub reference_only: bool,
    /// What is the matter where we have no value.
    pub absence: &'a str,
    /// Decimals that numbers are shown with.
    pub decimals: usize,
}

/// Judges our values.
pub fn judge(values: Vec<f64>, terms: &Terms<'_>) -> Cell {
    let ours = Summary::of(&values);
    let delta = ours.zip(terms.paper).map(|(ours, paper)| ours.mean - paper);
    let (verdict, reason) = verdict_of(ours.as_ref(), delta, terms);
    Cell { paper: terms.paper, values, ours, delta, verdict, reason, chosen: None }
}

fn verdict_of(ours: Option<&Summary>, delta: Option<f64>, terms: &Terms<'_>) -> (Verdict, String) {
    let none = |reason: &str| (Verdict::NoVerdict, reason.to_owned());
    let Some(ours) = ours else { return none(terms.absence) };
    let (Some(paper), Some(delta)) = (terms.paper, delta) else { return none("the paper has no value here") };
    if terms.reference_only {
        return none("the paper's value is for reference only: its machines or data cannot be had here");
    }
    let Some(tolerance) = terms.tolerance else { return none("no tolerance is stated") };
    let decimals = terms.decimals;
    let distance = format!("{delta:+.decimals$}");
    let verdict = match delta {
        delta if delta.abs() <= tolerance => Verdict::Within,
        delta if delta > 0.0 => Verdict::Above,
        _ => Verdict::Below,
    };
    let compared = if verdict == Verdict::Within { "within the tolerance of" } else { "more than the tolerance of" };
    let certainty = match ours.interval() {
        None => "one seed, so that nothing is known of its spread".to_owned(),
        Some((low, high)) => {
            let reaches = low <= paper + tolerance && high >= paper - tolerance;
            let inside = low >= paper - tolerance && high <= paper + tolerance;
            let word = match (verdict, reaches, inside) {
                (Verdict::Within, _, true) => "lies in it",
                (Verdict::Within, _, false) => "reaches beyond it",
                (_, true, _) => "reaches into it",
                _ => "does not reach it",
            };
            format!("the 95 % interval {low:.decimals$} to {high:.decimals$} {word}")
        }
    };
    (verdict, format!("{distance}, {compared} {tolerance}; {certainty}"))
}

/// Whether an order came out.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum OrderVerdict {
    /// Every row is better than every row of the next group, and more than chance explains.
    Holds,
    /// Some row is worse than one of the next group, and more than chance explains.
    Broken,
    /// Some difference could be chance, or cannot be computed.
    Undecided,
}

impl OrderVerdict {
    /// It in words.
    pub fn name(self) -> &'static str {
        match self {
            Self::Holds => "holds",
            Self::Broken => "broken",
            Self::Undecided => "undecided",
        }
    }
}

/// An order that must come out.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Order {
    /// The column.
    pub column: String,
    /// Groups of row names, best first.
    pub groups: Vec<Vec<String>>,
    /// What came out.
    pub verdict: OrderVerdict,
    /// One for each group and the next.
    pub steps: Vec<OrderStep>,
}

/// A group against the next: the pair of rows that decides.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct OrderStep {
    /// Our values of the row that should be better.
    pub better: Option<Summary>,
    /// Our values of the row that should be worse.
    pub worse: Option<Summary>,
    /// The test of their means.
    pub test: Option<Welch>,
    /// What came out.
    pub verdict: OrderVerdict,
    /// Why.
    pub reason: String,
}

/// A row of an order with the values of its trials.
#[derive(Clone, Debug, PartialEq)]
pub struct OrderRow {
    /// Its name.
    pub name: String,
    /// Values of its trials.
    pub values: Vec<f64>,
}

/// Judges an order of groups of rows, best first.
pub fn judge_order(column: &str, groups: &[Vec<OrderRow>], more_is_better: bool, decimals: usize) -> Order {
    let steps: Vec<OrderStep> = groups.windows(2).map(|pair| judge_step(&pair[0], &pair[1], more_is_better, decimals)).collect();
    let any = |verdict| steps.iter().any(|step| step.verdict == verdict);
    let verdict = if any(OrderVerdict::Broken) {
        OrderVerdict::Broken
    } else if any(OrderVerdict::Undecided) || steps.is_empty() {
        OrderVerdict::Undecided
    } else {
        OrderVerdict::Holds
    };
    let names = |group: &Vec<OrderRow>| group.iter().map(|row| row.name.clone()).collect();
    Order { column: column.to_owned(), groups: groups.iter().map(names).collect(), verdict, steps }
}

/// Every row against every row of the next group. Were the rows of a group taken together, a good one would hide a bad one.
fn judge_step(better: &[OrderRow], worse: &[OrderRow], more_is_better: bool, decimals: usize) -> OrderStep {
    let pairs = better.iter().flat_map(|one| worse.iter().map(move |other| judge_pair(one, other, more_is_better, decimals)));
    let num_pairs = better.len() * worse.len();
    let first = |one: &OrderStep, other: &OrderStep| {
        let ((rank, p), (other_rank, other_p)) = (decides(one), decides(other));
        rank.cmp(&other_rank).then(p.total_cmp(&other_p))
    };
    let Some(mut step) = pairs.min_by(first) else {
        let reason = "a group has no rows".to_owned();
        return OrderStep { better: None, worse: None, test: None, verdict: OrderVerdict::Undecided, reason };
    };
    if num_pairs > 1 {
        step.reason = format!("{}; this decides among {num_pairs} pairs", step.reason);
    }
    step
}

/// The pair with the least of this decides: the clearest that breaks the order, or else the least certain one.
fn decides(pair: &OrderStep) -> (u8, f64) {
    let p = pair.test.map_or(1.0, |test| test.p);
    match pair.verdict {
        OrderVerdict::Broken => (0, p),
        OrderVerdict::Undecided => (1, -p),
        OrderVerdict::Holds => (2, -p),
    }
}

fn judge_pair(better: &OrderRow, worse: &OrderRow, more_is_better: bool, decimals: usize) -> OrderStep {
    let (first, second) = (Summary::of(&better.values), Summary::of(&worse.values));
    let names = format!("{} against {}", better.name, worse.name);
    let Some((one, other)) = first.zip(second) else {
        let reason = format!("{names}: one of them has no value of ours");
        return OrderStep { better: first, worse: second, test: None, verdict: OrderVerdict::Undecided, reason };
    };
    let difference = one.mean - other.mean;
    let is_as_expected = (difference > 0.0) == more_is_better && difference != 0.0;
    let direction = if is_as_expected { "as expected" } else { "against expectation" };
    let means = format!("{names}: {:.decimals$} and {:.decimals$}", one.mean, other.mean);
    let test = welch(&one, &other);
    let (verdict, reason) = match test {
        _ if difference == 0.0 => (OrderVerdict::Undecided, format!("{means} are equal")),
        None => (OrderVerdict::Undecided, format!("{means}, {direction}, but one seed says nothing about its spread")),
        Some(test) if test.p >= SIGNIFICANCE => {
            (OrderVerdict::Undecided, format!("{means}, {direction}, but chance could explain it (Welch's t-test, p {})", chance(test.p)))
        }
        Some(test) => {
            let verdict = if is_as_expected { OrderVerdict::Holds } else { OrderVerdict::Broken };
            (verdict, format!("{means}, {direction} (Welch's t-test, p {})", chance(test.p)))
        }
    };
    OrderStep { better: first, worse: second, test, verdict, reason }
}

/// A probability for people, with the sign before it.
fn chance(p: f64) -> String {
    if p < 0.000_1 { "< 0.0001".to_owned() } else { format!("= {p:.4}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TERMS: Terms<'_> =
        Terms { paper: Some(30.0), tolerance: Some(1.5), reference_only: false, absence: "no trial is evaluated yet", decimals: 2 };

    #[test]
    fn every_verdict_has_its_reason() {
        let table: [(&[f64], Terms<'_>, Verdict, &str); 9] = [
            (
                &[30.9, 31.0, 31.1],
                TERMS,
                Verdict::Within,
                "+1.00, within the tolerance of 1.5; the 95 % interval 30.75 to 31.25 lies in it",
            ),
            (
                &[30.0, 31.0, 32.0],
                TERMS,
                Verdict::Within,
                "+1.00, within the tolerance of 1.5; the 95 % interval 28.52 to 33.48 reaches beyond it",
            ),
            (
                &[32.9, 33.0, 33.1],
                TERMS,
                Verdict::Above,
                "+3.00, more than the tolerance of 1.5; the 95 % interval 32.75 to 33.25 does not reach it",
            ),
            (
                &[25.0, 28.0, 28.0],
                TERMS,
                Verdict::Below,
                "-3.00, more than the tolerance of 1.5; the 95 % interval 22.70 to 31.30 reaches into it",
            ),
            (&[28.0], TERMS, Verdict::Below, "-2.00, more than the tolerance of 1.5; one seed, so that nothing is known of its spread"),
            (&[], TERMS, Verdict::NoVerdict, "no trial is evaluated yet"),
            (&[30.0], Terms { paper: None, ..TERMS }, Verdict::NoVerdict, "the paper has no value here"),
            (&[30.0], Terms { tolerance: None, ..TERMS }, Verdict::NoVerdict, "no tolerance is stated"),
            (
                &[30.0],
                Terms { reference_only: true, ..TERMS },
                Verdict::NoVerdict,
                "the paper's value is for reference only: its machines or data cannot be had here",
            ),
        ];
        for (values, terms, verdict, reason) in table {
            let cell = judge(values.to_vec(), &terms);
            assert_eq!((cell.verdict, cell.reason.as_str()), (verdict, reason), "{values:?}");
        }
        // A tolerance holds its own ends.
        assert_eq!(judge(vec![31.5], &TERMS).verdict, Verdict::Within);
        assert_eq!(judge(vec![28.5], &TERMS).verdict, Verdict::Within);
    }

    fn row(name: &str, values: &[f64]) -> OrderRow {
        OrderRow { name: name.to_owned(), values: values.to_vec() }
    }

    fn group(name: &str, values: &[f64]) -> Vec<OrderRow> {
        vec![row(name, values)]
    }

    #[test]
    fn orders() {
        let (high, low) = ([30.0, 30.1, 30.2], [25.0, 25.1, 25.2]);
        let table: [(&[f64], &[f64], bool, OrderVerdict, &str); 8] = [
            (&high, &low, true, OrderVerdict::Holds, "a against b: 30.10 and 25.10, as expected (Welch's t-test, p < 0.0001)"),
            (&low, &high, true, OrderVerdict::Broken, "a against b: 25.10 and 30.10, against expectation (Welch's t-test, p < 0.0001)"),
            (&low, &high, false, OrderVerdict::Holds, "a against b: 25.10 and 30.10, as expected (Welch's t-test, p < 0.0001)"),
            (
                &[30.0, 34.0],
                &[29.0, 33.0],
                true,
                OrderVerdict::Undecided,
                "a against b: 32.00 and 31.00, as expected, but chance could explain it (Welch's t-test, p = 0.7575)",
            ),
            (
                &[30.0],
                &low,
                true,
                OrderVerdict::Undecided,
                "a against b: 30.00 and 25.10, as expected, but one seed says nothing about its spread",
            ),
            (&[], &low, true, OrderVerdict::Undecided, "a against b: one of them has no value of ours"),
            (&low, &low, true, OrderVerdict::Undecided, "a against b: 25.10 and 25.10 are equal"),
            (&[2.0, 2.0], &[1.0, 1.0], true, OrderVerdict::Holds, "a against b: 2.00 and 1.00, as expected (Welch's t-test, p < 0.0001)"),
        ];
        for (better, worse, more_is_better, verdict, reason) in table {
            let order = judge_order("MMLU", &[group("a", better), group("b", worse)], more_is_better, 2);
            assert_eq!((order.verdict, order.steps[0].reason.as_str()), (verdict, reason));
        }
    }

    #[test]
    fn one_broken_step_breaks_an_order() {
        let groups = [group("a", &[3.0, 3.1]), group("b", &[2.0, 2.1]), group("c", &[5.0, 5.1]), group("d", &[1.0])];
        let order = judge_order("x", &groups, true, 1);
        let verdicts: Vec<OrderVerdict> = order.steps.iter().map(|step| step.verdict).collect();
        assert_eq!(verdicts, [OrderVerdict::Holds, OrderVerdict::Broken, OrderVerdict::Undecided]);
        assert_eq!((order.verdict, order.groups.len()), (OrderVerdict::Broken, 4));
        assert_eq!(judge_order("x", &[group("a", &[1.0])], true, 1).verdict, OrderVerdict::Undecided);
    }

    #[test]
    fn every_row_is_judged_against_every_row_of_the_next_group() {
        let (high, middle, low) = (row("high", &[5.0, 5.1, 5.2]), row("middle", &[3.0, 3.1, 3.2]), row("low", &[1.0, 1.1, 1.2]));
        let (wide, single) = (row("wide", &[1.0, 5.0, 6.0]), row("single", &[2.0]));
        // The mean over high and low together is that of middle: taken together they would hide that low is worse.
        let table: [(&[&OrderRow], &[&OrderRow], OrderVerdict, &str); 5] = [
            (&[&high, &low], &[&middle], OrderVerdict::Broken, "low against middle: "),
            (&[&high, &middle], &[&low], OrderVerdict::Holds, "middle against low: "),
            (&[&high, &wide], &[&low], OrderVerdict::Undecided, "wide against low: "),
            (&[&high], &[&low, &single], OrderVerdict::Undecided, "high against single: "),
            (&[&single, &low], &[&middle], OrderVerdict::Broken, "low against middle: "),
        ];
        for (better, worse, verdict, reason) in table {
            let groups = [better, worse].map(|group| group.iter().map(|row| (*row).clone()).collect());
            let order = judge_order("x", &groups, true, 1);
            let found = &order.steps[0].reason;
            assert_eq!(order.verdict, verdict, "{found}");
            assert!(found.starts_with(reason) && found.ends_with("; this decides among 2 pairs"), "{found}");
        }
        assert_eq!(judge_order("x", &[vec![], vec![high]], true, 1).steps[0].reason, "a group has no rows");
    }
}
