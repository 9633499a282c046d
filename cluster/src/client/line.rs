//! What the worker says, in its order: to the coordinator, or into a queue while that is away.

use std::collections::VecDeque;

use anyhow::Context as _;

use super::Shared;
use super::stream::Writing;
use crate::protocol::{self, FrameError, Held, WorkerMessage};

/// Messages that are kept: those of the time while the coordinator is away, and reports that were sent, since a connection that breaks
/// takes with it what was on its way. A run that reports ten steps a second fills it in under seven minutes; then the oldest reports go.
const MAX_KEPT_MESSAGES: usize = 4096;

/// The way to the coordinator.
pub(super) struct Line {
    link: Link,
    kept: VecDeque<Kept>,
    pub(super) standing: Standing,
}

/// A message that may have to be told once more.
#[derive(Debug, PartialEq)]
struct Kept {
    message: WorkerMessage,
    /// It was given to a connection, which may have lost it.
    was_written: bool,
}

enum Link {
    /// Connected.
    Up(Writing),
    /// The link thread tries to come back.
    Away,
    /// The grace is over; the worker ends its work alone.
    Gone {
        /// Whether it was logged that messages are dropped.
        is_logged: bool,
    },
    /// The coordinator has let this worker go.
    Closed,
}

/// What a coordinator must know of this worker, and is told again after each lost connection.
#[derive(Default)]
pub(super) struct Standing {
    /// The generation that this worker was told to start and has not left.
    pub(super) running: Option<u64>,
    /// Its word that it waits for the next generation, while it does.
    ready: Option<WorkerMessage>,
    /// Its last word of a share of a checkpoint in the generation that runs.
    share: Option<WorkerMessage>,
    pub(super) last_words: Option<LastWords>,
}

/// The last message of a worker.
pub(super) struct LastWords {
    pub(super) message: WorkerMessage,
    /// Only the coordinator's word that it was heard ends the wait; otherwise the end of the connection is enough.
    pub(super) needs_release: bool,
    pub(super) was_written: bool,
}

impl Line {
    pub(super) fn new(writer: Writing) -> Self {
        Self { link: Link::Up(writer), kept: VecDeque::new(), standing: Standing::default() }
    }

    pub(super) fn is_away(&self) -> bool {
        matches!(self.link, Link::Away)
    }

    /// Whether a lost connection leaves something to come back for.
    pub(super) fn has_more_to_say(&self) -> bool {
        self.standing.last_words.as_ref().is_none_or(|words| words.needs_release || !words.was_written)
    }

    /// The connection is lost; what is said from now on is kept.
    pub(super) fn hang_up(&mut self) {
        if matches!(self.link, Link::Up(_)) {
            self.link = Link::Away;
        }
    }

    /// Nobody comes back.
    pub(super) fn end(&mut self, is_gone: bool) {
        self.link = if is_gone { Link::Gone { is_logged: false } } else { Link::Closed };
        self.kept.clear();
    }

    /// A generation starts.
    pub(super) fn start(&mut self, generation: u64) {
        self.standing.running = Some(generation);
        self.kept.retain(|kept| !kept.was_written);
        (self.standing.ready, self.standing.share) = (None, None);
    }

    /// What a coordinator is told of the generation that still runs.
    pub(super) fn held(&self, step: u64) -> Option<Held> {
        self.standing.running.map(|generation| Held { generation, step })
    }

    fn note(&mut self, message: &WorkerMessage) {
        match message {
            WorkerMessage::Ready { .. } => {
                self.standing.ready = Some(message.clone());
                (self.standing.running, self.standing.share) = (None, None);
            }
            WorkerMessage::ShareSaved { .. } => self.standing.share = Some(message.clone()),
            _ => {}
        }
    }

    fn keep(&mut self, message: &WorkerMessage, was_written: bool) {
        // A coordinator can tell a repeated report from a new one by its step, and what is written gets there but for a lost connection.
        if was_written && !is_report(message) {
            return;
        }
        // These are worth something at their moment only, or are told again from what is known.
        let is_told_otherwise = matches!(
            message,
            WorkerMessage::Join(_)
                | WorkerMessage::Heartbeat { .. }
                | WorkerMessage::Ping { .. }
                | WorkerMessage::Ready { .. }
                | WorkerMessage::ShareSaved { .. }
        );
        if is_told_otherwise {
            return;
        }
        if self.kept.len() >= MAX_KEPT_MESSAGES {
            let oldest_report = self.kept.iter().position(|kept| is_report(&kept.message)).unwrap_or(0);
            self.kept.remove(oldest_report);
        }
        self.kept.push_back(Kept { message: message.clone(), was_written });
    }

    /// Takes what is to be told on a new connection, in its order: what no connection was given, and the reports of a generation that
    /// goes on.
    fn take_untold(&mut self, adopted: bool) -> Vec<WorkerMessage> {
        let kept = std::mem::take(&mut self.kept);
        kept.into_iter().filter(|kept| adopted || !kept.was_written).map(|kept| kept.message).collect()
    }
}

fn is_report(message: &WorkerMessage) -> bool {
    matches!(message, WorkerMessage::Step { .. })
}

impl Shared {
    /// Says something on a line that the caller holds.
    pub(super) fn say(&self, line: &mut Line, message: &WorkerMessage) -> anyhow::Result<()> {
        line.note(message);
        let was_written = self.write(line, message)?;
        line.keep(message, was_written);
        Ok(())
    }

    /// Says the last words as far as they have not been written.
    pub(super) fn say_last_words(&self, line: &mut Line) -> anyhow::Result<()> {
        let Some(words) = line.standing.last_words.take() else { return Ok(()) };
        let written = self.write(line, &words.message);
        let was_written = words.was_written || matches!(written, Ok(true));
        line.standing.last_words = Some(LastWords { was_written, ..words });
        written.map(drop)
    }

    /// The line is connected again; `adopted` tells whether the generation goes on.
    pub(super) fn pick_up(&self, line: &mut Line, writer: Writing, adopted: bool) {
        line.link = Link::Up(writer);
        let share = line.standing.share.clone().filter(|_| adopted);
        let again = share.into_iter().chain(line.standing.ready.clone());
        for message in line.take_untold(adopted).into_iter().chain(again) {
            // Where the connection is lost once more, the message is kept once more.
            if let Err(error) = self.say(line, &message) {
                tracing::error!(error = format!("{error:#}"), "a message that was kept cannot be sent");
            }
        }
        if let Err(error) = self.say_last_words(line) {
            tracing::error!(error = format!("{error:#}"), "the last words cannot be sent");
        }
    }

    /// Whether the message is on its way. Fails when it cannot be sent at all.
    fn write(&self, line: &mut Line, message: &WorkerMessage) -> anyhow::Result<bool> {
        match &mut line.link {
            Link::Up(writer) => match protocol::write_message_blocking(writer, message) {
                Ok(()) => Ok(true),
                // Nothing of it was written, so the connection is still good.
                Err(error @ (FrameError::TooLong { .. } | FrameError::Json(_))) => Err(error).context("send a message to the coordinator"),
                Err(FrameError::Io(error)) => {
                    tracing::debug!(%error, "a message to the coordinator is kept");
                    line.hang_up();
                    // Wakes the link thread, which reads from the same connection.
                    self.close();
                    Ok(false)
                }
            },
            Link::Away => Ok(false),
            Link::Gone { is_logged } => {
                if !std::mem::replace(is_logged, true) {
                    tracing::warn!("messages are dropped: the coordinator is gone");
                }
                Ok(true)
            }
            Link::Closed => Err(self.lost_failure().into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use cloze_recipes::failure::{Failure, FailureKind};

    use super::*;
    use crate::protocol::{FailureClass, Phase, StepReport, Unreported};

    fn away() -> Line {
        Line { link: Link::Away, kept: VecDeque::new(), standing: Standing::default() }
    }

    fn step(step: u64) -> WorkerMessage {
        let report = StepReport {
            step,
            loss: 1.0,
            learning_rate: 1.0,
            gradient_norm: 1.0,
            examples: 1,
            tokens: 1,
            labels: 1,
            seconds: 1.0,
            examples_per_s: 1.0,
            tokens_per_s: 1.0,
            before: Unreported::default(),
        };
        WorkerMessage::Step { generation: 1, report }
    }

    #[test]
    fn what_is_kept_is_bounded_and_reports_go_first() {
        let mut line = away();
        let broken = WorkerMessage::Broken { generation: 1, reason: "receive".to_owned() };
        line.keep(&broken, false);
        line.keep(&WorkerMessage::Heartbeat { generation: 1, step: 1, phase: Phase::Training, waiting: false, progress: 1 }, false);
        let last = 2 * MAX_KEPT_MESSAGES as u64;
        for number in 1..=last {
            line.keep(&step(number), false);
        }
        assert_eq!(line.kept.len(), MAX_KEPT_MESSAGES);
        let untold = line.take_untold(true);
        assert_eq!(untold.first(), Some(&broken), "what matters most stays");
        assert_eq!(untold.last(), Some(&step(last)));
        assert_eq!(untold[1], step(last - MAX_KEPT_MESSAGES as u64 + 2));
    }

    #[test]
    fn a_lost_connection_takes_no_report_of_a_generation_that_goes_on() {
        let heard = WorkerMessage::Broken { generation: 1, reason: "receive".to_owned() };
        for (adopted, expected) in [(true, vec![step(1), step(2), step(3)]), (false, vec![step(3)])] {
            let mut line = away();
            line.keep(&heard, true);
            line.keep(&step(1), true);
            line.keep(&step(2), true);
            line.keep(&step(3), false);
            assert_eq!(line.take_untold(adopted), expected, "adopted: {adopted}");
        }
        let mut line = away();
        line.keep(&step(1), true);
        line.start(2);
        assert_eq!(line.take_untold(true), [], "an earlier generation's reports were heard or are worth nothing");
    }

    #[test]
    fn a_generation_is_held_from_its_start_until_it_is_left() {
        let mut line = away();
        assert_eq!(line.held(0), None);
        line.start(3);
        assert_eq!(line.held(17), Some(Held { generation: 3, step: 17 }));
        line.note(&WorkerMessage::ShareSaved { generation: 3, step: 17, files: Vec::new() });
        assert!(line.standing.share.is_some());
        line.note(&WorkerMessage::Ready { generation: 3, state_step: Some(17), share: None });
        assert_eq!(line.held(17), None);
        assert!(line.standing.share.is_none() && line.standing.ready.is_some());
        line.start(4);
        assert!(line.standing.ready.is_none());
    }

    #[test]
    fn last_words_are_worth_a_return_until_they_are_heard() {
        let cases = [(true, false, true), (true, true, true), (false, false, true), (false, true, false)];
        for (needs_release, was_written, wanted) in cases {
            let mut line = away();
            assert!(line.has_more_to_say());
            let failure = Failure::new(FailureKind::Run, "x");
            let message = WorkerMessage::Failed { failure, class: FailureClass::Other, generation: 1, step: 1, culprit: true };
            line.standing.last_words = Some(LastWords { message, needs_release, was_written });
            assert_eq!(line.has_more_to_say(), wanted, "{needs_release} {was_written}");
        }
    }
}
