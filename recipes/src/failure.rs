//! The one shape of a user-visible error: what went wrong, where, what was expected, what was found, and a hint.

use std::fmt;

use serde::{Deserialize, Serialize};

/// What kind of thing went wrong; each kind has its own exit code.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FailureKind {
    /// A recipe, an override or an argument is wrong.
    Recipe,
    /// An input file or record is missing, truncated, not UTF-8 or lacks a field.
    Input,
    /// The machine lacks something: libtorch, CUDA, a free port, the worker binary.
    Environment,
    /// A disk or an object store refused, timed out or is full.
    Storage,
    /// A shard, a checkpoint or a model folder is damaged or incomplete.
    Damaged,
    /// Two things that must belong together do not: tokenizer and model, recipe and run, data and recipe.
    Mismatch,
    /// The run itself failed: restart budget spent, loss not finite, a worker that cannot go on.
    Run,
    /// A signal asked the program to stop.
    Interrupted,
}

impl FailureKind {
    /// The process exit code, as docs/OPERATIONS.md lists it.
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Recipe => 3,
            Self::Input => 4,
            Self::Environment => 5,
            Self::Storage => 6,
            Self::Damaged => 7,
            Self::Mismatch => 8,
            Self::Run => 9,
            Self::Interrupted => 130,
        }
    }

    /// All kinds.
    pub const ALL: [Self; 8] =
        [Self::Recipe, Self::Input, Self::Environment, Self::Storage, Self::Damaged, Self::Mismatch, Self::Run, Self::Interrupted];

    /// The kind of a program's exit code; `None` where it ended well or in no way that it names.
    pub fn of_exit_code(code: i32) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| i32::from(kind.exit_code()) == code)
    }
}

/// A user-visible error. Build it with [`Failure::new`] and the chained setters; `?` turns it into an `anyhow::Error`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Failure {
    /// Decides the exit code.
    pub kind: FailureKind,
    /// What went wrong: lowercase, no full stop.
    pub what: String,
    /// File and line, URL, rank, step.
    pub place: Option<String>,
    /// What would have been right.
    pub expected: Option<String>,
    /// What was there instead.
    pub found: Option<String>,
    /// The error underneath, with its own causes.
    pub cause: Option<String>,
    /// What the user can do.
    pub hint: Option<String>,
}

impl Failure {
    /// Starts a failure of a kind; `what` is lowercase and completes "error: ".
    pub fn new(kind: FailureKind, what: impl Into<String>) -> Self {
        Self { kind, what: what.into(), place: None, expected: None, found: None, cause: None, hint: None }
    }

    /// Sets the place: a path with line and column, a URL, a rank.
    #[must_use]
    pub fn at(mut self, place: impl fmt::Display) -> Self {
        self.place = Some(place.to_string());
        self
    }

    /// Sets what would have been right.
    #[must_use]
    pub fn expected(mut self, expected: impl fmt::Display) -> Self {
        self.expected = Some(expected.to_string());
        self
    }

    /// Sets what was there instead.
    #[must_use]
    pub fn found(mut self, found: impl fmt::Display) -> Self {
        self.found = Some(found.to_string());
        self
    }

    /// Keeps the underlying error; use `{error:#}` of an `anyhow::Error` so that no cause is lost.
    #[must_use]
    pub fn because(mut self, cause: impl fmt::Display) -> Self {
        self.cause = Some(cause.to_string());
        self
    }

    /// Sets what the user can do about it.
    #[must_use]
    pub fn hint(mut self, hint: impl fmt::Display) -> Self {
        self.hint = Some(hint.to_string());
        self
    }
}

impl Failure {
    /// Reads a failure back from what a program wrote about it, `error: ` left out. Text of another shape becomes `what`.
    pub fn parse(kind: FailureKind, text: &str) -> Self {
        let (body, hint) = match text.trim_end().split_once("\n\nhint: ") {
            Some((body, hint)) => (body, Some(hint.to_owned())),
            None => (text.trim_end(), None),
        };
        let mut failure = Self { hint, ..Self::new(kind, String::new()) };
        let mut part: Option<&str> = None;
        for line in body.lines() {
            let start = PART_NAMES.iter().find_map(|name| Some((*name, line.strip_prefix(&format!("  {name}: "))?)));
            let text = match start {
                Some((name, text)) => {
                    part = Some(name);
                    text
                }
                None => line,
            };
            let field = match part {
                None => {
                    failure.what = joined(Some(&failure.what).filter(|what| !what.is_empty()), text);
                    continue;
                }
                Some("where") => &mut failure.place,
                Some("expected") => &mut failure.expected,
                Some("found") => &mut failure.found,
                Some(_) => &mut failure.cause,
            };
            *field = Some(joined(field.as_ref(), text));
        }
        failure
    }
}

/// Names of the parts as they are written.
const PART_NAMES: [&str; 4] = ["where", "expected", "found", "cause"];

fn joined(before: Option<&String>, line: &str) -> String {
    before.map_or_else(|| line.to_owned(), |before| format!("{before}\n{line}"))
}

impl fmt::Display for Failure {
    /// One line for each part that is set, then a blank line and the hint.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.what)?;
        let parts = [("where", &self.place), ("expected", &self.expected), ("found", &self.found), ("cause", &self.cause)];
        for (name, value) in parts {
            if let Some(value) = value {
                write!(f, "\n  {name}: {value}")?;
            }
        }
        if let Some(hint) = &self.hint {
            write!(f, "\n\nhint: {hint}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_written_is_read_back() {
        let full = Failure::new(FailureKind::Storage, "failed to write\nthe second line")
            .at("/a:3:4")
            .expected("room")
            .found("none")
            .because("one\n    two")
            .hint("free space\nand try again");
        let bare = Failure::new(FailureKind::Run, "it broke");
        for failure in [full, bare] {
            assert_eq!(Failure::parse(failure.kind, &failure.to_string()), failure);
        }
    }

    #[test]
    fn exit_codes_name_their_kinds() {
        for kind in FailureKind::ALL {
            assert_eq!(FailureKind::of_exit_code(kind.exit_code().into()), Some(kind));
        }
        assert_eq!([0, 1, 2, 137].map(FailureKind::of_exit_code), [None; 4]);
    }
}
