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
}

impl Problems {
    /// Adds a problem at a place; `path` is the dotted key path.
    pub(crate) fn push(&mut self, place: &Place, path: &str, message: impl Into<String>) {
        self.items.push(Problem { place: place.clone(), path: path.to_owned(), message: message.into() });
    }

    /// Whether nothing is wrong so far.
    pub(crate) fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// Whether a problem lies at the section or below it.
    pub(crate) fn touches(&self, section: &str) -> bool {
        self.items.iter().any(|problem| problem.path.strip_prefix(section).is_some_and(|rest| rest.is_empty() || rest.starts_with('.')))
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
    /// `file:line:column: key.path: message`.
    fn line(&self) -> String {
        if self.path.is_empty() {
            return format!("{}: {}", self.place, self.message);
        }
        format!("{}: {}: {}", self.place, self.path, self.message)
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
