//! What a person sees: on a terminal one progress line that rewrites itself, and a permanent line for everything else; in a
//! file or a pipe plain lines only.

use std::io::{self, Write};

use cloze_cluster::{Event, Recorded, StepReport};

use super::numbers::{clock_text, pace};
use super::sentences;

/// Goes to the start of the line and erases it.
const ERASE_LINE: &str = "\r\x1b[2K";

/// How the terminal reader writes. All off is plain lines without colour, as for a file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TerminalStyle {
    /// The output is a terminal: a progress line may rewrite itself.
    pub interactive: bool,
    /// Colours may be used; off when `NO_COLOR` is set.
    pub color: bool,
    /// Only losses, warnings and the end are written.
    pub quiet: bool,
}

/// How much a line matters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Tone {
    /// The run goes as it should; left out when quiet.
    Plain,
    /// The run ended as it should, or goes on after a loss.
    Good,
    /// Something was lost or is wrong.
    Bad,
}

/// The terminal reader.
pub struct Terminal {
    output: Box<dyn Write + Send>,
    style: TerminalStyle,
    log_every_steps: u64,
    total_steps: u64,
    world_size: u32,
    /// First step that this generation reported, with its time.
    first_step: Option<(u64, f64)>,
    /// The progress line on display; empty when there is none.
    progress: String,
    /// Whether a lost worker already explains the end of this generation.
    loss_is_told: bool,
}

impl Terminal {
    /// A reader that writes to `output`. Where no line is rewritten, every `log_every_steps`-th step has a line, and the last.
    pub fn new(output: Box<dyn Write + Send>, style: TerminalStyle, log_every_steps: u64) -> Self {
        Self {
            output,
            style,
            log_every_steps: log_every_steps.max(1),
            total_steps: 0,
            world_size: 0,
            first_step: None,
            progress: String::new(),
            loss_is_told: false,
        }
    }

    /// Shows an event.
    pub fn write(&mut self, recorded: &Recorded) -> io::Result<()> {
        match &recorded.event {
            Event::Step { report, .. } => self.step(recorded.time, report),
            other => {
                if ends_progress(other) && !self.progress.is_empty() {
                    writeln!(self.output)?;
                    self.progress.clear();
                }
                for (tone, line) in self.lines(other) {
                    self.line(tone, &line)?;
                }
                Ok(())
            }
        }
    }

    /// Shows a line that is no event.
    pub fn say(&mut self, line: &str) -> io::Result<()> {
        self.line(Tone::Plain, line)
    }

    fn step(&mut self, time: f64, report: &StepReport) -> io::Result<()> {
        let first = *self.first_step.get_or_insert((report.step, time));
        if self.style.quiet {
            return Ok(());
        }
        let seconds_per_step = pace(first, (report.step, time)).unwrap_or(report.seconds);
        let text = sentences::step(report, self.total_steps, seconds_per_step);
        if self.style.interactive {
            write!(self.output, "{ERASE_LINE}{text}")?;
            self.progress = text;
        } else if report.step.is_multiple_of(self.log_every_steps) || report.step == self.total_steps {
            writeln!(self.output, "{text}")?;
        }
        self.output.flush()
    }

    /// Writes a permanent line above the progress line.
    fn line(&mut self, tone: Tone, text: &str) -> io::Result<()> {
        if self.style.quiet && tone == Tone::Plain {
            return Ok(());
        }
        if !self.progress.is_empty() {
            write!(self.output, "{ERASE_LINE}")?;
        }
        match tone {
            Tone::Good if self.style.color => writeln!(self.output, "\x1b[32m{text}\x1b[0m")?,
            Tone::Bad if self.style.color => writeln!(self.output, "\x1b[33m{text}\x1b[0m")?,
            Tone::Plain | Tone::Good | Tone::Bad => writeln!(self.output, "{text}")?,
        }
        write!(self.output, "{}", self.progress)?;
        self.output.flush()
    }

    /// The permanent lines of an event; keeps track of the generation.
    fn lines(&mut self, event: &Event) -> Vec<(Tone, String)> {
        match event {
            Event::RunStarted { name, workers, min_workers, steps, .. } => {
                self.total_steps = *steps;
                vec![(Tone::Plain, sentences::run_started(name, *steps, *workers, *min_workers))]
            }
            Event::GenerationStarted { world_size, .. } => {
                self.world_size = *world_size;
                (self.first_step, self.loss_is_told) = (None, false);
                Vec::new()
            }
            Event::Restored { generation, step, source, skipped, .. } => self.restored_lines(*generation, *step, source, skipped),
            Event::CheckpointSaved { step, url, bytes, seconds, blocked_s } => {
                vec![(Tone::Plain, sentences::checkpoint_saved(*step, url, *bytes, *seconds, *blocked_s))]
            }
            Event::WorkerLost { worker, rank, host, class, reason } => {
                self.loss_is_told |= rank.is_some();
                vec![(Tone::Bad, sentences::worker_lost(*worker, *rank, host, *class, reason))]
            }
            Event::GenerationAborted { .. } if self.loss_is_told => Vec::new(),
            Event::GenerationAborted { generation, reason, step, .. } => {
                vec![(Tone::Bad, format!("generation {generation} ended after step {step}: {reason}"))]
            }
            Event::Warning { message } => vec![(Tone::Bad, format!("warning: {message}"))],
            Event::RunFinished { step, seconds } => vec![(Tone::Good, format!("finished at step {step} in {}", clock_text(*seconds)))],
            // What is saved and how to go on, and the failure itself, are what the program ends with.
            Event::RunStopped { .. } => vec![(Tone::Good, "the workers have left".to_owned())],
            Event::RunFailed { .. } => vec![(Tone::Bad, "the run failed".to_owned())],
            other => life_line(other).into_iter().collect(),
        }
    }

    fn restored_lines(&self, generation: u64, step: u64, source: &str, skipped: &[String]) -> Vec<(Tone, String)> {
        let skipped_lines = skipped.iter().map(|skipped| (Tone::Bad, format!("warning: checkpoint passed over: {skipped}")));
        let started = sentences::generation_started(generation, self.world_size, step, source);
        skipped_lines.chain([(Tone::Plain, started)]).collect()
    }
}

/// Whether training pauses or ends here; the last progress then stands as a line of its own.
fn ends_progress(event: &Event) -> bool {
    matches!(
        event,
        Event::WorkerLost { .. }
            | Event::GenerationAborted { .. }
            | Event::GenerationRegrouped { .. }
            | Event::RunFinished { .. }
            | Event::RunStopped { .. }
            | Event::RunFailed { .. }
    )
}

/// The line about the life of a worker, a host or the coordinator; `None` where it says nothing new.
fn life_line(event: &Event) -> Option<(Tone, String)> {
    let line = match event {
        Event::DashboardListening { url } => (Tone::Plain, format!("dashboard: {url}")),
        Event::RecipeChanged { changes } => (Tone::Plain, format!("set anew from here on: {}", changes.join(", "))),
        Event::WorkerRestarted { worker, attempt, budget_left } => {
            (Tone::Plain, format!("worker {worker} restarted (attempt {attempt}, {budget_left} left for this run)"))
        }
        Event::WorkerExited { worker, process_id, status, .. } => {
            (Tone::Plain, format!("worker {worker} (process {process_id}) ended with {status}"))
        }
        Event::StackDumped { worker, path, .. } => (Tone::Plain, format!("stacks of worker {worker} written to {path}")),
        Event::HostExcluded { host, failures } => {
            (Tone::Bad, format!("host {host} is used no more after {}", sentences::count(u64::from(*failures), "failure")))
        }
        Event::GenerationRegrouped { generation, reason, step } => {
            (Tone::Plain, format!("generation {generation} makes room after step {step}: {reason}"))
        }
        Event::Recovered { seconds, steps_lost, source, .. } => (Tone::Good, sentences::recovered(*seconds, *steps_lost, source)),
        Event::CoordinatorRestarted { generation, adopted } => {
            (if *adopted { Tone::Good } else { Tone::Bad }, sentences::coordinator_restarted(*generation, *adopted))
        }
        _ => return None,
    };
    Some(line)
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use cloze_cluster::{FailureClass, Unreported};

    use super::*;

    /// An output that the test keeps a hold of.
    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Screen {
        fn text(&self) -> String {
            String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
        }
    }

    fn step(step: u64) -> Event {
        let report = StepReport {
            step,
            loss: 1.2341,
            learning_rate: 0.00098,
            gradient_norm: 0.5,
            examples: 8,
            tokens: 100,
            labels: 8,
            seconds: 0.5,
            examples_per_s: 812.3,
            tokens_per_s: 33_000.0,
            before: Unreported::default(),
        };
        Event::Step { generation: 1, report }
    }

    fn start() -> Vec<Event> {
        vec![
            Event::RunStarted { name: "demo".to_owned(), recipe_hash: "r".to_owned(), workers: 2, min_workers: None, steps: 300 },
            Event::WorkerStarted { worker: 0, process_id: 7 },
            Event::WorkerJoined { worker: 0, host: "h".to_owned(), process_id: 7, rejoined: false },
            generation(1),
            Event::Restored { generation: 1, step: 0, source: "scratch".to_owned(), skipped: Vec::new(), seconds: 0.0 },
        ]
    }

    fn generation(generation: u64) -> Event {
        Event::GenerationStarted { generation, world_size: 2, workers: vec![0, 1], reason: "all 2 workers are there".to_owned() }
    }

    fn lost(rank: Option<u32>, reason: &str) -> Event {
        let (host, class) = ("node-a".to_owned(), FailureClass::ConnectionClosed);
        Event::WorkerLost { worker: 1, rank, host, class, reason: reason.to_owned() }
    }

    fn recovery() -> Vec<Event> {
        vec![
            lost(Some(1), "connection closed"),
            Event::GenerationAborted {
                generation: 1,
                reason: "worker 1 (rank 1) lost: connection closed".to_owned(),
                step: 57,
                worker: Some(1),
                rank: Some(1),
            },
            Event::WorkerRestarted { worker: 1, attempt: 1, budget_left: 2 },
            generation(2),
            Event::Restored {
                generation: 2,
                step: 50,
                source: "file:///c/step-000000000050".to_owned(),
                skipped: vec!["step-000000000055: manifest.json is missing".to_owned()],
                seconds: 0.2,
            },
        ]
    }

    /// Shows events one second apart.
    fn shown(style: TerminalStyle, events: Vec<Event>) -> String {
        let screen = Screen::default();
        let mut terminal = Terminal::new(Box::new(screen.clone()), style, 10);
        for (second, event) in (0_u32..).zip(events) {
            terminal.write(&Recorded { time: f64::from(second), event }).unwrap();
        }
        screen.text()
    }

    #[test]
    fn a_file_gets_plain_lines() {
        let mut events = start();
        events.extend([step(9), step(10), step(11)]);
        events.extend(recovery());
        let url = "file:///c/step-000000000300".to_owned();
        events.push(Event::CheckpointSaved { step: 300, url, bytes: 12_300_000, seconds: 0.44, blocked_s: 0.018 });
        events.extend([step(300), Event::RunFinished { step: 300, seconds: 245.0 }]);
        assert_eq!(
            shown(TerminalStyle::default(), events),
            "run demo: 300 steps with 2 workers\n\
             generation 1 started with 2 workers from scratch\n\
             step 10/300 · loss 1.234 · lr 9.8e-4 · 812 examples/s · 33k tokens/s · ETA 4:50\n\
             worker 1 (rank 1) on node-a lost: connection closed\n\
             worker 1 restarted (attempt 1, 2 left for this run)\n\
             warning: checkpoint passed over: step-000000000055: manifest.json is missing\n\
             generation 2 started with 2 workers from step 50\n\
             checkpoint of step 300 saved: file:///c/step-000000000300 (12MB in 0.4 s, training waited 0.02 s)\n\
             step 300/300 · loss 1.234 · lr 9.8e-4 · 812 examples/s · 33k tokens/s · ETA 0:00\n\
             finished at step 300 in 4:05\n"
        );
    }

    #[test]
    fn a_terminal_gets_one_rewriting_line() {
        let style = TerminalStyle { interactive: true, ..TerminalStyle::default() };
        let events = vec![step(1), Event::Warning { message: "disk is slow".to_owned() }, step(2), Event::RunStopped { step: 2 }];
        // No event told the number of steps, so the time left is zero; the first step's pace is its own duration.
        let line = |step: u64| format!("step {step}/0 · loss 1.234 · lr 9.8e-4 · 812 examples/s · 33k tokens/s · ETA 0:00");
        let expected = format!(
            "{ERASE_LINE}{one}{ERASE_LINE}warning: disk is slow\n{one}{ERASE_LINE}{two}\n\
             the workers have left\n",
            one = line(1),
            two = line(2)
        );
        assert_eq!(shown(style, events), expected);
    }

    #[test]
    fn quiet_keeps_what_matters() {
        let style = TerminalStyle { quiet: true, color: true, ..TerminalStyle::default() };
        let mut events = start();
        events.push(step(10));
        events.extend(recovery());
        assert_eq!(
            shown(style, events),
            "\x1b[33mworker 1 (rank 1) on node-a lost: connection closed\x1b[0m\n\
             \x1b[33mwarning: checkpoint passed over: step-000000000055: manifest.json is missing\x1b[0m\n"
        );
    }

    #[test]
    fn other_ends() {
        let cases = [
            (Event::RunStopped { step: 0 }, "the workers have left\n"),
            (lost(None, "x"), "worker 1 on node-a lost before it could start: x\n"),
            (
                Event::GenerationAborted { generation: 3, reason: "the collective broke".to_owned(), step: 7, worker: None, rank: None },
                "generation 3 ended after step 7: the collective broke\n",
            ),
        ];
        for (event, text) in cases {
            assert_eq!(shown(TerminalStyle::default(), vec![event]), text);
        }
    }

    #[test]
    fn lives_and_recoveries() {
        let recovered = Event::Recovered {
            generation: 4,
            failed_generation: 3,
            class: FailureClass::MissedHeartbeat,
            seconds: 0.84,
            steps_lost: 0,
            source: "memory of worker 0".to_owned(),
        };
        let (status, tail) = ("SIGKILL".to_owned(), "step 3".to_owned());
        let cases = [
            (Event::DashboardListening { url: "http://127.0.0.1:4243/".to_owned() }, "dashboard: http://127.0.0.1:4243/\n"),
            (Event::WorkerExited { worker: 1, process_id: 7, status, tail }, "worker 1 (process 7) ended with SIGKILL\n"),
            (
                Event::StackDumped { worker: 1, process_id: 7, path: "/r/dumps/worker-1-7.txt".to_owned() },
                "stacks of worker 1 written to /r/dumps/worker-1-7.txt\n",
            ),
            (Event::HostExcluded { host: "node-a".to_owned(), failures: 3 }, "host node-a is used no more after 3 failures\n"),
            (
                Event::GenerationRegrouped { generation: 3, reason: "worker 1 has joined".to_owned(), step: 40 },
                "generation 3 makes room after step 40: worker 1 has joined\n",
            ),
            (recovered, "recovered in 0.8 s, 0 steps lost, state from memory of worker 0\n"),
            (Event::CoordinatorRestarted { generation: 3, adopted: true }, "coordinator restarted; generation 3 goes on\n"),
            (Event::WorkerStarted { worker: 1, process_id: 7 }, ""),
        ];
        for (event, text) in cases {
            assert_eq!(shown(TerminalStyle::default(), vec![event]), text);
        }
    }
}
