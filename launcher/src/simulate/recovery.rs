//! What a recovery consists of, and which nodes there are to recover with.

use super::spent::Cause;

/// One part of a recovery.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Part {
    /// What its time counts as.
    pub cause: Cause,
    /// How long it takes.
    pub length: Length,
}

impl Part {
    /// A part that takes so many seconds.
    pub(super) fn new(cause: Cause, seconds: f64) -> Self {
        Self { cause, length: Length::Seconds(seconds) }
    }
}

/// How long a part takes.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Length {
    /// This long.
    Seconds(f64),
    /// Until there are enough nodes.
    UntilNodes,
}

/// What is missing until training can go on. A failure during a recovery adds to it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Needs {
    /// A process has to be started.
    pub process: bool,
    /// Somebody lacks the state.
    pub state: bool,
}

/// The nodes of a run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Fleet {
    /// Nodes that take part.
    pub active: u32,
    /// Sound nodes that do not: spares, and those that came back while the run went on smaller.
    idle: u32,
    full: u32,
    least: u32,
}

impl Fleet {
    /// All nodes sound. A run that is not elastic has no use for spares and goes on at full size only.
    pub(super) fn new(full: u32, least: u32, spares: u32, elastic: bool) -> Self {
        Self { active: full, idle: if elastic { spares } else { 0 }, full, least: if elastic { least } else { full } }
    }

    /// An active node fails; whether a spare one takes its place.
    pub(super) fn lose_node(&mut self) -> bool {
        self.active = self.active.saturating_sub(1);
        let replaced = self.can_grow();
        self.grow();
        replaced
    }

    /// A node is sound again. Where the run waits for it, it takes part at once.
    pub(super) fn node_back(&mut self, waited: bool) {
        self.idle += 1;
        if waited {
            self.grow();
        }
    }

    /// Whether nodes are idle that the run lacks.
    pub(super) fn can_grow(&self) -> bool {
        self.active < self.full && self.idle > 0
    }

    /// Takes in as many idle nodes as the run lacks.
    pub(super) fn grow(&mut self) {
        let newcomers = self.idle.min(self.full - self.active);
        self.idle -= newcomers;
        self.active += newcomers;
    }

    /// Whether the run has too few nodes to go on.
    pub(super) fn must_wait(&self) -> bool {
        self.active < self.least
    }

    /// A new allocation has all its nodes.
    pub(super) fn replace_all(&mut self) {
        self.active = self.full;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spare_node_steps_in_and_the_next_loss_shrinks_the_run() {
        let mut fleet = Fleet::new(8, 7, 1, true);
        assert!(fleet.lose_node());
        assert_eq!((fleet.active, fleet.must_wait()), (8, false));
        assert!(!fleet.lose_node());
        assert_eq!((fleet.active, fleet.must_wait(), fleet.can_grow()), (7, false, false));
        assert!(!fleet.lose_node());
        assert!(fleet.must_wait(), "six of at least seven");
        fleet.node_back(true);
        assert_eq!((fleet.active, fleet.must_wait()), (7, false));
        fleet.node_back(false);
        assert_eq!((fleet.active, fleet.can_grow()), (7, true), "who comes back while the run goes on waits to be let in");
        fleet.grow();
        assert_eq!((fleet.active, fleet.can_grow()), (8, false));
    }

    #[test]
    fn a_fixed_run_waits_for_every_node() {
        let mut fleet = Fleet::new(8, 4, 3, false);
        assert!(!fleet.lose_node(), "spares are of no use to it");
        assert!(fleet.must_wait());
        fleet.node_back(true);
        assert_eq!((fleet.active, fleet.must_wait()), (8, false));
    }
}
