//! Where the time of a run goes. Every second has exactly one cause, so the causes add up to the wall time.

/// What a second was spent on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Computing steps that count; the only useful one.
    Compute,
    /// Waiting for the slowest GPU of a step.
    Stragglers,
    /// Gradients on the network that no computation hides.
    Communication,
    /// Steps that take longer because nodes are missing.
    Shrunken,
    /// Before the first step.
    Startup,
    /// Training stands still for a checkpoint.
    Checkpoint,
    /// Steps, or parts of one, that had to be done again.
    LostWork,
    /// From a failure until somebody knows.
    Detection,
    /// Ending a generation and forming the next.
    Regroup,
    /// Starting processes, or the whole job.
    Restart,
    /// No node to go on with.
    WaitingForNodes,
    /// Getting the state back.
    Restore,
}

/// Every cause, in the order of [`Cause`].
const CAUSES: [Cause; NUM_CAUSES] = [
    Cause::Compute,
    Cause::Stragglers,
    Cause::Communication,
    Cause::Shrunken,
    Cause::Startup,
    Cause::Checkpoint,
    Cause::LostWork,
    Cause::Detection,
    Cause::Regroup,
    Cause::Restart,
    Cause::WaitingForNodes,
    Cause::Restore,
];

/// Number of causes.
const NUM_CAUSES: usize = 12;

/// The parts of a step that counts; they become lost work when the step has to be done again.
const OF_A_STEP: [Cause; 4] = [Cause::Compute, Cause::Stragglers, Cause::Communication, Cause::Shrunken];

impl Cause {
    /// Every cause.
    pub fn all() -> [Self; NUM_CAUSES] {
        CAUSES
    }

    /// Its name in tables and JSON.
    pub fn name(self) -> &'static str {
        match self {
            Self::Compute => "compute",
            Self::Stragglers => "stragglers",
            Self::Communication => "communication",
            Self::Shrunken => "shrunken",
            Self::Startup => "startup",
            Self::Checkpoint => "checkpoint",
            Self::LostWork => "lost_work",
            Self::Detection => "detection",
            Self::Regroup => "regroup",
            Self::Restart => "restart",
            Self::WaitingForNodes => "waiting_for_nodes",
            Self::Restore => "restore",
        }
    }
}

/// Seconds by cause.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spent {
    seconds: [f64; NUM_CAUSES],
}

impl Spent {
    /// Seconds of one cause.
    pub fn get(&self, cause: Cause) -> f64 {
        self.seconds[cause as usize]
    }

    /// Seconds of all causes.
    pub fn total(&self) -> f64 {
        self.seconds.iter().sum()
    }

    /// Adds to one cause.
    pub(super) fn add(&mut self, cause: Cause, seconds: f64) {
        self.seconds[cause as usize] += seconds;
    }

    /// Adds every cause of another account.
    pub(super) fn add_all(&mut self, other: &Self) {
        for cause in CAUSES {
            self.add(cause, other.get(cause));
        }
    }

    /// What was spent on steps since `earlier` was lost.
    pub(super) fn lose_steps_since(&mut self, earlier: &Self) {
        for cause in OF_A_STEP {
            let lost = self.get(cause) - earlier.get(cause);
            self.seconds[cause as usize] = earlier.get(cause);
            self.add(Cause::LostWork, lost);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_cause_has_its_own_place_and_name() {
        let mut spent = Spent::default();
        for (position, cause) in Cause::all().into_iter().enumerate() {
            assert_eq!(cause as usize, position);
            spent.add(cause, f64::from(1_u32 << position));
        }
        for (position, cause) in Cause::all().into_iter().enumerate() {
            assert!((spent.get(cause) - f64::from(1_u32 << position)).abs() < f64::EPSILON, "{}", cause.name());
        }
        assert!((spent.total() - 4095.0).abs() < f64::EPSILON);
        let names: std::collections::BTreeSet<_> = Cause::all().into_iter().map(Cause::name).collect();
        assert_eq!(names.len(), NUM_CAUSES);
    }

    #[test]
    fn lost_steps_change_their_cause_and_nothing_else() {
        let mut earlier = Spent::default();
        earlier.add(Cause::Compute, 5.0);
        let mut spent = earlier;
        spent.add(Cause::Compute, 2.0);
        spent.add(Cause::Stragglers, 1.0);
        spent.add(Cause::Checkpoint, 4.0);
        let total = spent.total();
        spent.lose_steps_since(&earlier);
        assert!((spent.get(Cause::Compute) - 5.0).abs() < 1e-12);
        assert!((spent.get(Cause::LostWork) - 3.0).abs() < 1e-12);
        assert!((spent.get(Cause::Checkpoint) - 4.0).abs() < 1e-12, "a save before the loss still took its time");
        assert!((spent.total() - total).abs() < 1e-12);
    }
}
