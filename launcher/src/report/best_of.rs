//! A row of which the paper reports the best of several arms, in each column anew.

use super::material::Material;
use super::score;
use super::table::{Arm, Column};
use super::verdict::{Cell, Terms, Verdict, judge};

/// What one arm has in a column: the values of its trials that have one, and how many lack it.
struct Candidate<'a> {
    name: &'a str,
    values: Vec<f64>,
    missing: usize,
}

/// The best arm of a column beside the paper's value. As long as a trial lacks its value there is no verdict, for it may be the best.
pub(super) fn cell(material: &Material, arms: &[&Arm], column: &Column, terms: &Terms<'_>) -> Cell {
    let candidates: Vec<Candidate<'_>> = arms.iter().map(|arm| candidate(material, arm, column)).collect();
    let Some((best, mean)) = best(&candidates, score::more_is_better(column.metric.score)) else {
        return judge(Vec::new(), terms);
    };
    let cell = judge(best.values.clone(), terms);
    let missing: usize = candidates.iter().map(|candidate| candidate.missing).sum();
    let chosen = Some(best.name.to_owned());
    if missing > 0 && cell.verdict != Verdict::NoVerdict {
        let (noun, decimals) = (if missing == 1 { "trial has" } else { "trials have" }, terms.decimals);
        let reason = format!("{missing} {noun} no score yet, so that {mean:.decimals$} may not be the best");
        return Cell { verdict: Verdict::NoVerdict, reason, chosen, ..cell };
    }
    let reason = match candidates.len() {
        0 | 1 => cell.reason,
        number => format!("{}; best of {number}, chosen by this score itself, which flatters it", cell.reason),
    };
    Cell { reason, chosen, ..cell }
}

fn candidate<'a>(material: &Material, arm: &'a Arm, column: &Column) -> Candidate<'a> {
    let values: Vec<f64> = arm.trials.iter().filter_map(|&index| score::value_of_trial(&material.trials[index], &column.metric)).collect();
    Candidate { name: &arm.name, missing: arm.trials.len() - values.len(), values }
}

/// The candidate with the best mean, and that; the first where several are equal.
fn best<'a, 'b>(candidates: &'a [Candidate<'b>], more_is_better: bool) -> Option<(&'a Candidate<'b>, f64)> {
    let scored = candidates.iter().filter(|candidate| !candidate.values.is_empty());
    let scored = scored.map(|candidate| (candidate, candidate.values.iter().sum::<f64>() / candidate.values.len() as f64));
    scored.reduce(|best, other| {
        let is_better = if more_is_better { other.1 > best.1 } else { other.1 < best.1 };
        if is_better { other } else { best }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_best_has_the_best_mean_and_the_first_of_equals_wins() {
        let candidate = |name, values: &[f64]| Candidate { name, values: values.to_vec(), missing: 0 };
        let candidates = [candidate("a", &[1.0, 3.0]), candidate("b", &[]), candidate("c", &[2.5]), candidate("d", &[2.5, 2.5])];
        let chosen = |more| best(&candidates, more).map(|(candidate, mean)| (candidate.name, mean));
        assert_eq!(chosen(true), Some(("c", 2.5)));
        assert_eq!(chosen(false), Some(("a", 2.0)));
        assert!(best(&candidates[1..2], true).is_none());
    }
}
