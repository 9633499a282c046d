//! Work that the leader does alone while the others wait, however long it takes.

use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, anyhow};

use super::Collective;

/// Words of the leader to the workers that wait.
const STILL_WORKING: u8 = 0;
const DONE: u8 = 1;

/// The one worker that reads and writes checkpoints and reports steps.
pub fn is_leader(collective: &dyn Collective) -> bool {
    collective.rank() == 0
}

/// Runs `work` on the leader and returns its result there, `None` elsewhere, when it is done.
///
/// Every `interval` the leader tells the others that it still works, so that storage may take longer than a collective's timeout; keep the
/// interval well below that. Fails with the work's own error on the leader, which then leaves the group. When the group fails, nobody waits
/// for the work any longer; its thread ends by itself, within the bounds of what it does.
pub fn leader_work<T: Send + 'static>(
    collective: &mut dyn Collective,
    interval: Duration,
    work: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<Option<T>> {
    if !is_leader(collective) {
        let mut word = [STILL_WORKING];
        while word[0] != DONE {
            collective.broadcast(&mut word, 0)?;
        }
        return Ok(None);
    }
    let (sender, receiver) = channel();
    let run = move || {
        // The receiver is gone only when the group has failed, and with it the need for a result.
        let _ = sender.send(work());
    };
    thread::Builder::new().name("leader-work".to_owned()).spawn(run).context("start the leader's work")?;
    let result = loop {
        match receiver.recv_timeout(interval) {
            Ok(result) => break result?,
            Err(RecvTimeoutError::Timeout) => collective.broadcast(&mut [STILL_WORKING], 0)?,
            Err(RecvTimeoutError::Disconnected) => return Err(anyhow!("the leader's work panicked")),
        }
    };
    collective.broadcast(&mut [DONE], 0)?;
    Ok(Some(result))
}

#[cfg(test)]
mod tests {
    use super::super::conformance::on_all;
    use super::super::local::tests::rings_with_timeout;
    use super::*;

    #[test]
    fn the_others_wait_longer_than_the_timeout_of_one_operation() {
        let timeout = Duration::from_millis(300);
        let results = on_all(&mut rings_with_timeout(3, timeout), |collective| {
            leader_work(collective, timeout / 3, || {
                thread::sleep(Duration::from_millis(1200));
                Ok(7)
            })
        });
        let results: Vec<Option<i32>> = results.into_iter().map(Result::unwrap).collect();
        assert_eq!(results, [Some(7), None, None]);
    }

    #[test]
    fn an_error_of_the_work_is_the_leaders_own() {
        let timeout = Duration::from_millis(300);
        let work = |collective: &mut dyn Collective| leader_work(collective, timeout / 3, || Err::<(), _>(anyhow!("no such bucket")));
        let mut rings = rings_with_timeout(1, timeout);
        let errors: Vec<String> = on_all(&mut rings, work).into_iter().map(|result| result.unwrap_err().to_string()).collect();
        assert_eq!(errors, ["no such bucket"]);
    }
}
