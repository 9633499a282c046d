//! What is wrong with a recipe: a list of problems, each with its place, shown as one failure.

use std::fmt::Write as _;

use crate::failure::{Failure, FailureKind};
use crate::tree::Place;

/// More problems than this are counted, not listed.
const MAX_PROBLEMS_LISTED: usize = 50;

/// Every problem found so far, in the order in which it was found.
#[derive(Debug, Default)]
pub(crate) struct Problems {
    items: Vec<Problem>,
}

/// One thing that is wrong.
#[derive(Debug)]
struct Problem {
    place: Place,
    /// Keys from the root, joined by dots; empty for the recipe as a whole.
    path: String,
    message: String,
    /// In which of several readings of a recipe it was met, such as a trial.
    note: Option<String>,
}

impl Problems {
    /// Adds a problem at a place; `path` is the dotted key path.
    pub(crate) fn push(&mut self, place: &Place, path: &str, message: impl Into<String>) {
        self.items.push(Problem { place: place.clone(), path: path.to_owned(), message: message.into(), note: None });
    }

    /// Whether nothing is wrong so far.
    pub(crate) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Whether a problem lies at the section or below it.
    pub(crate) fn touches(&self, section: &str) -> bool {
        self.items.iter().any(|problem| problem.path.strip_prefix(section).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
    }

    /// Number of problems.
    pub(crate) fn len(&self) -> usize {
        self.items.len()
    }

    /// Adds the problems of another reading that are not there already; `note` says which reading that was.
    pub(crate) fn absorb(&mut self, other: Self, note: Option<&str>) {
        for mut problem in other.items {
            if self.items.iter().any(|known| known.same(&problem)) {
                continue;
            }
            if let Some(note) = note {
                problem.note = Some(problem.note.map_or_else(|| note.to_owned(), |inner| format!("{inner}, {note}")));
            }
            self.items.push(problem);
        }
    }

    /// All problems as one failure; `recipe` is the file as the user named it.
    pub(crate) fn into_failure(self, recipe: &str) -> Failure {
        let count = self.items.len();
        let noun = if count == 1 { "problem" } else { "problems" };
        let mut what = format!("{count} {noun} in {recipe}");
        for problem in self.items.iter().take(MAX_PROBLEMS_LISTED) {
            what.push('\n');
            what.push_str(&problem.line());
        }
        if count > MAX_PROBLEMS_LISTED {
            // Writing to a string cannot fail.
            let _ = write!(what, "\nand {} more", count - MAX_PROBLEMS_LISTED);
        }
        Failure::new(FailureKind::Recipe, what)
    }
}

impl Problem {
    /// Whether both say the same, wherever they were met.
    fn same(&self, other: &Self) -> bool {
        (&self.place, &self.path, &self.message) == (&other.place, &other.path, &other.message)
    }

    /// `file:line:column: key.path: message (note)`.
    fn line(&self) -> String {
        let note = self.note.as_ref().map_or_else(String::new, |note| format!(" ({note})"));
        if self.path.is_empty() {
            return format!("{}: {}{note}", self.place, self.message);
        }
        format!("{}: {}: {}{note}", self.place, self.path, self.message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_section_is_touched_by_itself_and_by_what_is_below_it() {
        let mut problems = Problems::default();
        problems.push(&Place::for_test("r.yaml", 3, 5), "train.schedule.kind", "wrong");
        let table = [("train", true), ("train.schedule", true), ("train.schedule.kind", true), ("tra", false), ("data", false)];
        for (section, expected) in table {
            assert_eq!(problems.touches(section), expected, "{section}");
        }
    }

    #[test]
    fn a_problem_of_several_readings_is_told_once_with_the_first_of_them() {
        let one = |column| {
            let mut problems = Problems::default();
            problems.push(&Place::for_test("r.yaml", 3, column), "seed", "wrong");
            problems
        };
        let mut all = Problems::default();
        let mut noted = Problems::default();
        noted.absorb(one(5), Some("inner"));
        all.absorb(noted, Some("outer"));
        all.absorb(one(5), Some("again"));
        all.absorb(one(6), None);
        assert_eq!(all.len(), 2);
        let what = all.into_failure("r.yaml").what;
        assert_eq!(what, "2 problems in r.yaml\nr.yaml:3:5: seed: wrong (inner, outer)\nr.yaml:3:6: seed: wrong");
    }

    #[test]
    fn one_line_per_problem_and_a_bound_on_the_list() {
        let mut problems = Problems::default();
        problems.push(&Place::for_test("r.yaml", 3, 5), "seed", "wrong");
        assert_eq!(problems.into_failure("r.yaml").what, "1 problem in r.yaml\nr.yaml:3:5: seed: wrong");

        let mut many = Problems::default();
        for line in 0..MAX_PROBLEMS_LISTED as u64 + 2 {
            many.push(&Place::for_test("r.yaml", line + 1, 1), "", "wrong");
        }
        let what = many.into_failure("r.yaml").what;
        assert!(what.starts_with("52 problems in r.yaml\nr.yaml:1:1: wrong\n"), "{what}");
        assert!(what.ends_with("r.yaml:50:1: wrong\nand 2 more"), "{what}");
    }
}
