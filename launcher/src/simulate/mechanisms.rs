//! The mechanisms that can be switched on and off, and the order in which a study switches them.

use serde::Serialize;

/// Which mechanisms a run has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[expect(clippy::struct_excessive_bools, reason = "each of them is one independent switch of an experiment")]
pub struct Mechanisms {
    /// A coordinator notices failures; without it the timeout of the collective does.
    pub fast_detection: bool,
    /// Survivors keep their processes and only what failed is replaced; without it every failure requeues the job. The next two
    /// build on it.
    pub restart_in_place: bool,
    /// A checkpoint is uploaded while training goes on; without it training stands still.
    pub async_checkpoint: bool,
    /// The state is taken from the memory of a survivor; without it, from the newest checkpoint.
    pub memory_restore: bool,
    /// Spare nodes step in, and without spares the run goes on smaller; without it the run waits for the replacement.
    pub elastic: bool,
}

/// One switch: its name and how it is set.
struct Switch {
    name: &'static str,
    set: fn(&mut Mechanisms, bool),
}

/// In the order in which a study adds them: what the later ones build on comes first.
const SWITCHES: [Switch; 5] = [
    Switch { name: "fast detection", set: |mechanisms, on| mechanisms.fast_detection = on },
    Switch { name: "restart in place", set: |mechanisms, on| mechanisms.restart_in_place = on },
    Switch { name: "asynchronous checkpoints", set: |mechanisms, on| mechanisms.async_checkpoint = on },
    Switch { name: "restore from memory", set: |mechanisms, on| mechanisms.memory_restore = on },
    Switch { name: "elastic", set: |mechanisms, on| mechanisms.elastic = on },
];

impl Mechanisms {
    /// Everything on.
    pub fn all() -> Self {
        Self { fast_detection: true, restart_in_place: true, async_checkpoint: true, memory_restore: true, elastic: true }
    }

    /// Everything off, one after another switched on until all are, then all but each one.
    pub(super) fn arrangements() -> Vec<(String, Self)> {
        let mut current = Self::default();
        let mut arrangements = vec![("all off".to_owned(), current)];
        for (position, switch) in SWITCHES.iter().enumerate() {
            (switch.set)(&mut current, true);
            let last = position + 1 == SWITCHES.len();
            let name = if last { format!("+ {} = all on", switch.name) } else { format!("+ {}", switch.name) };
            arrangements.push((name, current));
        }
        // All but the last one switched on is there already.
        for switch in &SWITCHES[..SWITCHES.len() - 1] {
            let mut without = Self::all();
            (switch.set)(&mut without, false);
            arrangements.push((format!("all on but {}", switch.name), without));
        }
        arrangements
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_arrangements_lead_from_nothing_to_everything() {
        let arrangements = Mechanisms::arrangements();
        assert_eq!(arrangements.len(), 10);
        assert_eq!(arrangements[0], ("all off".to_owned(), Mechanisms::default()));
        assert_eq!(arrangements[1].1, Mechanisms { fast_detection: true, ..Mechanisms::default() });
        assert_eq!(arrangements[5], ("+ elastic = all on".to_owned(), Mechanisms::all()));
        let without = Mechanisms { memory_restore: false, ..Mechanisms::all() };
        assert_eq!(arrangements[9], ("all on but restore from memory".to_owned(), without));
        for (position, (name, mechanisms)) in arrangements.iter().enumerate() {
            let same = arrangements.iter().filter(|(_, other)| other == mechanisms).count();
            assert_eq!(same, 1, "{position} {name}");
        }
    }
}
