//! A program of a trial on this machine leaves when the process that works on the trial is gone, however that ended.

use std::io;
use std::os::unix::process::parent_id;
use std::process::Command;
use std::thread::{self, sleep};
use std::time::Duration;

use rustix::process::{Signal, getpgrp, getpid, kill_process, kill_process_group};

use crate::local::session_of;

/// Environment variable with the id of the process without which a program is not to go on.
const PARENT_VARIABLE: &str = "CLOZE_LEAVE_WITH_PARENT";

/// Interval at which that process is looked for, in milliseconds.
const POLL_MS: u64 = 100;

/// What becomes of a program whose environment names a parent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Bond {
    /// It is the parent's child, and leaves with it.
    Child,
    /// The parent was gone before the program could look.
    Orphan,
    /// It was started by a child of the parent, which looks after it.
    Descendant,
}

/// Lets a program that this process is about to start leave with this process.
pub(super) fn bind(command: &mut Command) {
    command.env(PARENT_VARIABLE, std::process::id().to_string());
}

/// Keeps what `bind` has promised; a program that nobody has bound goes on as ever. SIGTERM lets a run save, and ends everything else
/// together with what it has started; workers of a run are in groups of their own, and their controller asks them.
pub fn leave_with_parent() -> io::Result<()> {
    let Some(parent) = std::env::var(PARENT_VARIABLE).ok().and_then(|text| text.parse().ok()) else { return Ok(()) };
    if bond(parent, parent_id(), session_of(parent)?.is_some()) == Bond::Descendant {
        return Ok(());
    }
    thread::Builder::new().name("parent".to_owned()).spawn(move || {
        while parent_id() == parent {
            sleep(Duration::from_millis(POLL_MS));
        }
        tracing::warn!(parent, "the process that works on this trial is gone");
        let group = getpgrp();
        let sent = if group == getpid() { kill_process_group(group, Signal::TERM) } else { kill_process(getpid(), Signal::TERM) };
        if let Err(error) = sent {
            tracing::warn!(%error, "this program could not be asked to leave");
        }
    })?;
    Ok(())
}

fn bond(wanted: u32, found: u32, lives: bool) -> Bond {
    match (wanted == found, lives) {
        (true, _) => Bond::Child,
        (false, true) => Bond::Descendant,
        (false, false) => Bond::Orphan,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_child_and_an_orphan_leave_with_the_parent() {
        let cases = [(7, 7, true, Bond::Child), (7, 8, true, Bond::Descendant), (7, 1, false, Bond::Orphan), (7, 7, false, Bond::Child)];
        for (wanted, found, lives, expected) in cases {
            assert_eq!(bond(wanted, found, lives), expected, "{wanted} {found} {lives}");
        }
        let mut command = Command::new("true");
        bind(&mut command);
        let value = command.get_envs().next().and_then(|(_, value)| value?.to_str()?.parse().ok());
        assert_eq!(value, Some(std::process::id()));
    }
}
