//! `cloze join`: workers of this host for a run whose controller is elsewhere.

use std::collections::BTreeSet;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use cloze_cluster::Secret;
use cloze_cluster::environment::{COORDINATOR_KEY_VARIABLE, TOKEN_VARIABLE, given};
use cloze_launcher::{RunPaths, SlotsOptions, serve_slots};
use cloze_recipes::failure::{Failure, FailureKind};

use super::arguments::JoinArguments;
use super::run::write_last_line;
use super::worker_process::worker_binary;

/// Most slots that one host fills; each is a process.
const MAX_SLOTS: usize = 1024;

/// Fills slots until the run ends.
pub fn join(arguments: &JoinArguments) -> Result<ExitCode> {
    let slots = parse_slots(&arguments.slots)?;
    let paths = RunPaths::find(&arguments.run)?;
    let coordinator_key = given(COORDINATOR_KEY_VARIABLE)?.map(|key| key.parse()).transpose()?;
    let shown = paths.root().display().to_string();
    serve_slots(SlotsOptions {
        paths,
        slots,
        coordinator: arguments.coordinator.clone(),
        token: given(TOKEN_VARIABLE)?.map(Secret::new),
        coordinator_key,
        join_timeout: Duration::from_secs(arguments.join_timeout),
        worker_binary: worker_binary()?,
        output: Box::new(std::io::stderr()),
    })?;
    write_last_line(&mut std::io::stderr(), &format!("the workers of this host are done; run folder: {shown}"))?;
    Ok(ExitCode::SUCCESS)
}

/// Reads slots and ranges of slots, such as `2-3,7`, in their order.
fn parse_slots(text: &str) -> Result<Vec<u32>, Failure> {
    let wrong = || {
        Failure::new(FailureKind::Recipe, "`--slots` names no slots")
            .expected(format!("slots and ranges from 0, such as 2-3 or 2,5, at most {MAX_SLOTS}"))
            .found(text)
    };
    let mut slots = BTreeSet::new();
    for part in text.split(',') {
        let (first, last) = part.split_once('-').unwrap_or((part, part));
        let (first, last): (u32, u32) = match (first.trim().parse(), last.trim().parse()) {
            (Ok(first), Ok(last)) if first <= last && ((last - first) as usize) < MAX_SLOTS => (first, last),
            _ => return Err(wrong()),
        };
        slots.extend(first..=last);
    }
    if slots.len() > MAX_SLOTS { Err(wrong()) } else { Ok(slots.into_iter().collect()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_read() {
        let cases: [(&str, Option<&[u32]>); 12] = [
            ("2", Some(&[2])),
            ("2-3", Some(&[2, 3])),
            ("7, 2-4,3", Some(&[2, 3, 4, 7])),
            ("0-0", Some(&[0])),
            ("", None),
            ("3-2", None),
            ("-1", None),
            ("2-", None),
            ("a", None),
            ("1,,2", None),
            ("0-1024", None),
            ("0-1023,2000", None),
        ];
        for (text, expected) in cases {
            assert_eq!(parse_slots(text).ok().as_deref(), expected, "{text}");
        }
        assert_eq!(parse_slots("0-1023").unwrap().len(), MAX_SLOTS);
    }
}
