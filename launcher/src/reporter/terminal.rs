//! What a person sees: on a terminal one progress line that rewrites itself, and a permanent line for everything else; in a
//! file or a pipe plain lines only.

use std::io::{self, Write};

use cloze_cluster::{Event, Recorded, StepReport};

use super::numbers::{clock_text, compact, eta_seconds, pace};

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
    /// The run ended as it should.
    Good,
    /// Something was lost or is wrong.
    Bad,
}

/// The terminal reader.
pub struct Terminal {
    output: Box<dyn Write + Send>,
    style: TerminalStyle,
    log_every_steps: u64,
    /// The command that goes on with a stopped run.
    resume_command: String,
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
    pub fn new(output: Box<dyn Write + Send>, style: TerminalStyle, log_every_steps: u64, resume_command: String) -> Self {
        Self {
            output,
            style,
            log_every_steps: log_every_steps.max(1),
            resume_command,
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

    fn step(&mut self, time: f64, report: &StepReport) -> io::Result<()> {
        let first = *self.first_step.get_or_insert((report.step, time));
        if self.style.quiet {
            return Ok(());
        }
        let seconds_per_step = pace(first, (report.step, time)).unwrap_or(report.seconds);
        let text = step_text(report, self.total_steps, seconds_per_step);
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
            Event::RunStarted { name, workers, steps, .. } => {
                self.total_steps = *steps;
                vec![(Tone::Plain, format!("run {name}: {steps} steps with {}", workers_text(*workers)))]
            }
            Event::GenerationStarted { world_size, .. } => {
                self.world_size = *world_size;
                (self.first_step, self.loss_is_told) = (None, false);
                Vec::new()
            }
            Event::Restored { generation, step, source, skipped } => self.restored_lines(*generation, *step, source, skipped),
            Event::CheckpointSaved { step, url, bytes, seconds } => {
                vec![(Tone::Plain, format!("checkpoint of step {step} saved: {url} ({}B in {seconds:.1} s)", compact(*bytes as f64)))]
            }
            Event::WorkerLost { worker, rank, reason } => vec![(Tone::Bad, self.loss_text(*worker, *rank, reason))],
            Event::GenerationAborted { .. } if self.loss_is_told => Vec::new(),
            Event::GenerationAborted { generation, reason, step } => {
                vec![(Tone::Bad, format!("generation {generation} ended after step {step}: {reason}"))]
            }
            Event::WorkerRestarted { worker, attempt, budget_left } => {
                vec![(Tone::Plain, format!("worker {worker} restarted (attempt {attempt}, {budget_left} left for this run)"))]
            }
            Event::Warning { message } => vec![(Tone::Bad, format!("warning: {message}"))],
            Event::RunFinished { step, seconds } => vec![(Tone::Good, format!("finished at step {step} in {}", clock_text(*seconds)))],
            Event::RunStopped { step } => vec![(Tone::Good, self.stopped_text(*step))],
            // The failure itself is what the program ends with.
            Event::RunFailed { .. } => vec![(Tone::Bad, "the run failed".to_owned())],
            Event::Step { .. } | Event::WorkerStarted { .. } | Event::WorkerJoined { .. } | Event::WorkerFinished { .. } => Vec::new(),
        }
    }

    fn restored_lines(&self, generation: u64, step: u64, source: &str, skipped: &[String]) -> Vec<(Tone, String)> {
        let skipped_lines = skipped.iter().map(|skipped| (Tone::Bad, format!("warning: checkpoint passed over: {skipped}")));
        let from = if step == 0 && source == "scratch" { source.to_owned() } else { format!("step {step}") };
        let started = format!("generation {generation} started with {} from {from}", workers_text(self.world_size));
        skipped_lines.chain([(Tone::Plain, started)]).collect()
    }

    fn loss_text(&mut self, worker: u32, rank: Option<u32>, reason: &str) -> String {
        match rank {
            Some(rank) => {
                self.loss_is_told = true;
                format!("worker {worker} (rank {rank}) lost: {reason}; waiting for a replacement")
            }
            None => format!("worker {worker} lost before it could start: {reason}"),
        }
    }

    fn stopped_text(&self, step: u64) -> String {
        if step == 0 {
            "stopped before anything was saved".to_owned()
        } else {
            format!("stopped; step {step} is saved and {} goes on from there", self.resume_command)
        }
    }
}

/// Whether training pauses or ends here; the last progress then stands as a line of its own.
fn ends_progress(event: &Event) -> bool {
    matches!(
        event,
        Event::WorkerLost { .. }
            | Event::GenerationAborted { .. }
            | Event::RunFinished { .. }
            | Event::RunStopped { .. }
            | Event::RunFailed { .. }
    )
}

/// `step 120/300 · loss 1.234 · lr 9.8e-4 · 812 examples/s · 33k tokens/s · ETA 0:42`.
fn step_text(report: &StepReport, total_steps: u64, seconds_per_step: f64) -> String {
    let eta = eta_seconds(report.step, total_steps, Some(seconds_per_step)).map_or_else(|| "?".to_owned(), clock_text);
    format!(
        "step {}/{total_steps} · loss {:.3} · lr {:.1e} · {} examples/s · {} tokens/s · ETA {eta}",
        report.step,
        report.loss,
        report.learning_rate,
        compact(report.examples_per_s),
        compact(report.tokens_per_s),
    )
}

/// `1 worker`, `2 workers`.
fn workers_text(workers: u32) -> String {
    if workers == 1 { "1 worker".to_owned() } else { format!("{workers} workers") }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

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
        };
        Event::Step { generation: 1, report }
    }

    fn start() -> Vec<Event> {
        vec![
            Event::RunStarted { name: "demo".to_owned(), recipe_hash: "r".to_owned(), workers: 2, steps: 300 },
            Event::WorkerStarted { worker: 0, process_id: 7 },
            Event::WorkerJoined { worker: 0, host: "h".to_owned() },
            Event::GenerationStarted { generation: 1, world_size: 2, reason: "all 2 workers are there".to_owned() },
            Event::Restored { generation: 1, step: 0, source: "scratch".to_owned(), skipped: Vec::new() },
        ]
    }

    fn recovery() -> Vec<Event> {
        vec![
            Event::WorkerLost { worker: 1, rank: Some(1), reason: "connection closed".to_owned() },
            Event::GenerationAborted { generation: 1, reason: "worker 1 (rank 1) lost: connection closed".to_owned(), step: 57 },
            Event::WorkerRestarted { worker: 1, attempt: 1, budget_left: 2 },
            Event::GenerationStarted { generation: 2, world_size: 2, reason: "all 2 workers are there".to_owned() },
            Event::Restored {
                generation: 2,
                step: 50,
                source: "file:///c/step-000000000050".to_owned(),
                skipped: vec!["step-000000000055: manifest.json is missing".to_owned()],
            },
        ]
    }

    /// Shows events one second apart.
    fn shown(style: TerminalStyle, events: Vec<Event>) -> String {
        let screen = Screen::default();
        let mut terminal = Terminal::new(Box::new(screen.clone()), style, 10, "`cloze resume runs/demo`".to_owned());
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
        events.push(Event::CheckpointSaved { step: 300, url: "file:///c/step-000000000300".to_owned(), bytes: 12_300_000, seconds: 0.44 });
        events.extend([step(300), Event::RunFinished { step: 300, seconds: 245.0 }]);
        assert_eq!(
            shown(TerminalStyle::default(), events),
            "run demo: 300 steps with 2 workers\n\
             generation 1 started with 2 workers from scratch\n\
             step 10/300 · loss 1.234 · lr 9.8e-4 · 812 examples/s · 33k tokens/s · ETA 4:50\n\
             worker 1 (rank 1) lost: connection closed; waiting for a replacement\n\
             worker 1 restarted (attempt 1, 2 left for this run)\n\
             warning: checkpoint passed over: step-000000000055: manifest.json is missing\n\
             generation 2 started with 2 workers from step 50\n\
             checkpoint of step 300 saved: file:///c/step-000000000300 (12MB in 0.4 s)\n\
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
             stopped; step 2 is saved and `cloze resume runs/demo` goes on from there\n",
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
            "\x1b[33mworker 1 (rank 1) lost: connection closed; waiting for a replacement\x1b[0m\n\
             \x1b[33mwarning: checkpoint passed over: step-000000000055: manifest.json is missing\x1b[0m\n"
        );
    }

    #[test]
    fn other_ends() {
        let cases = [
            (Event::RunStopped { step: 0 }, "stopped before anything was saved\n"),
            (Event::WorkerLost { worker: 1, rank: None, reason: "x".to_owned() }, "worker 1 lost before it could start: x\n"),
            (
                Event::GenerationAborted { generation: 3, reason: "the collective broke".to_owned(), step: 7 },
                "generation 3 ended after step 7: the collective broke\n",
            ),
        ];
        for (event, text) in cases {
            assert_eq!(shown(TerminalStyle::default(), vec![event]), text);
        }
    }
}
