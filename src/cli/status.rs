//! `cloze status` and `cloze watch`: how a run is, from its folder or from its dashboard.

use std::io::{IsTerminal as _, Write};
use std::path::Path;
use std::process::ExitCode;
use std::thread::sleep;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result};
use clap::Args;
use cloze_launcher::dashboard::{ViewStream, fetch_view};
use cloze_launcher::slurm::{JobsView, jobs_text, view_jobs};
use cloze_launcher::view::{EventLog, RunState, RunView, controller_lives, status_line, status_page};
use cloze_recipes::failure::{Failure, FailureKind};
use serde::Serialize;

use super::run_place::{find_run, refuse_study};

/// How often a run's folder is looked at, and most often a line is printed.
const INTERVAL: Duration = Duration::from_secs(1);

/// Goes to the upper left corner.
const HOME: &str = "\x1b[H";
/// Erases the whole screen.
const ERASE_SCREEN: &str = "\x1b[2J";
/// Erases what is left of an older line.
const ERASE_LINE_END: &str = "\x1b[K";
/// Erases what is left of an older page.
const ERASE_BELOW: &str = "\x1b[J";

/// Arguments of `cloze status`.
#[derive(Args)]
pub struct StatusArguments {
    /// Run folder, or `http://host:port` of its dashboard
    pub run: String,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

/// Arguments of `cloze watch`.
#[derive(Args)]
pub struct WatchRunArguments {
    /// Run folder, or `http://host:port` of its dashboard
    pub run: String,
}

/// What `cloze status --json` prints.
#[derive(Serialize)]
struct Status<'a> {
    /// Whether a controller holds the run's lock.
    controller_lives: bool,
    run: &'a RunView,
    /// The run's jobs, where it has any.
    #[serde(skip_serializing_if = "Option::is_none")]
    jobs: Option<&'a JobsView>,
}

/// Prints how a run is.
pub fn status(arguments: &StatusArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    let (view, controller_lives, jobs) = if is_address(&arguments.run) {
        (fetch_view(&arguments.run)?, true, None)
    } else {
        let folder = Path::new(&arguments.run);
        let jobs = view_jobs(&find_run(folder, |study| format!("`cloze sweep status {study}` shows its trials"))?)?;
        let mut log = EventLog::of_run(folder);
        // The first job of a run may still wait.
        if jobs.is_none() || folder.join("events.jsonl").exists() {
            log.read_new()?;
        }
        tell_passed_over(&log)?;
        (log.into_view(), lives(folder)?, jobs)
    };
    let text = if arguments.json {
        let status = Status { controller_lives, run: &view, jobs: jobs.as_ref() };
        serde_json::to_string_pretty(&status).context("serialise the status")? + "\n"
    } else {
        status_page(&view, controller_lives, now()?) + &jobs.as_ref().map(jobs_text).unwrap_or_default()
    };
    stdout.write_all(text.as_bytes()).context("print the status")?;
    Ok(ExitCode::SUCCESS)
}

/// Shows a run until it ends, and ends as the run did.
pub fn watch(arguments: &WatchRunArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    let redraws = std::io::stdout().is_terminal();
    let mut screen = Screen::new(stdout, redraws);
    let view = if is_address(&arguments.run) {
        watch_dashboard(&arguments.run, &mut screen)?
    } else {
        watch_folder(Path::new(&arguments.run), &mut screen)?
    };
    end(view)
}

fn watch_folder(folder: &Path, screen: &mut Screen<'_>) -> Result<RunView> {
    refuse_study(folder, |study| {
        format!("`cloze sweep status {study}` shows its trials, and `cloze watch {study}/runs/TRIAL` one of them")
    })?;
    let mut log = EventLog::of_run(folder);
    log.read_new()?;
    tell_passed_over(&log)?;
    loop {
        screen.show(log.view(), lives(folder)?)?;
        if log.view().state.is_end() {
            return Ok(log.into_view());
        }
        sleep(INTERVAL);
        log.read_new()?;
        log.expect_events()?;
    }
}

fn watch_dashboard(url: &str, screen: &mut Screen<'_>) -> Result<RunView> {
    let mut stream = ViewStream::open(url)?;
    let mut view = RunView::default();
    while stream.next(&mut view)? {
        screen.show(&view, true)?;
        if view.state.is_end() {
            return Ok(view);
        }
    }
    let failure = Failure::new(FailureKind::Environment, "the dashboard closed before the run ended").at(url);
    Err(failure.hint("was its controller killed? `cloze status RUN` reads the run's folder").into())
}

/// The run's end becomes this program's.
fn end(view: RunView) -> Result<ExitCode> {
    match (view.state, view.failure) {
        (RunState::Stopped, _) => {
            let what = format!("the run was stopped after step {}", view.progress.step);
            Err(Failure::new(FailureKind::Interrupted, what).hint("`cloze resume` goes on with it").into())
        }
        (RunState::Failed, Some(failure)) => Err(failure.into()),
        _ => Ok(ExitCode::SUCCESS),
    }
}

/// Where a run is shown: a terminal gets a page that redraws itself, anything else a line for each change.
struct Screen<'a> {
    output: &'a mut dyn Write,
    redraws: bool,
    is_first: bool,
    line: String,
    shown: Option<Instant>,
}

impl<'a> Screen<'a> {
    fn new(output: &'a mut dyn Write, redraws: bool) -> Self {
        Self { output, redraws, is_first: true, line: String::new(), shown: None }
    }

    fn show(&mut self, view: &RunView, controller: bool) -> Result<()> {
        if self.redraws {
            let page = page_text(&status_page(view, controller, now()?), std::mem::take(&mut self.is_first));
            return self.write(&page);
        }
        if !view.state.is_end() && self.shown.is_some_and(|shown| shown.elapsed() < INTERVAL) {
            return Ok(());
        }
        let lost = if controller || view.state.is_end() { "" } else { " · no controller lives" };
        let line = format!("{}{lost}\n", status_line(view));
        if line != self.line {
            self.write(&line)?;
            (self.line, self.shown) = (line, Some(Instant::now()));
        }
        Ok(())
    }

    fn write(&mut self, text: &str) -> Result<()> {
        self.output.write_all(text.as_bytes()).and_then(|()| self.output.flush()).context("show the run")
    }
}

/// A page over the older one. Lines are erased one by one, because a screen that is erased first flickers.
fn page_text(page: &str, is_first: bool) -> String {
    let erased = if is_first { ERASE_SCREEN } else { "" };
    let lines: String = page.lines().map(|line| format!("{line}{ERASE_LINE_END}\n")).collect();
    format!("{erased}{HOME}{lines}{ERASE_BELOW}")
}

/// Says on stderr what the view leaves out. Fails where nothing is left.
fn tell_passed_over(log: &EventLog) -> Result<()> {
    log.expect_events()?;
    let told = [(log.passed_over(), "events of another version of cloze"), (log.damaged(), "damaged lines of the event log")];
    for (lines, what) in told.into_iter().filter(|(lines, _)| *lines > 0) {
        writeln!(std::io::stderr(), "warning: {lines} {what} are left out").context("report the log")?;
    }
    Ok(())
}

fn is_address(run: &str) -> bool {
    run.contains("://")
}

fn lives(folder: &Path) -> Result<bool, Failure> {
    controller_lives(folder)
        .map_err(|error| Failure::new(FailureKind::Storage, "failed to look at the run folder's lock").at(folder.display()).because(error))
}

fn now() -> Result<f64> {
    Ok(SystemTime::now().duration_since(UNIX_EPOCH).context("read the time of day")?.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use cloze_cluster::{Event, Recorded};

    use super::*;

    /// A run without workers that has just started, and ended where an end is given.
    fn view(end: Option<Event>) -> RunView {
        let start =
            Event::RunStarted { name: "demo".to_owned(), recipe_hash: "4f1c".to_owned(), workers: 0, min_workers: None, steps: 300 };
        let mut view = RunView::default();
        for event in [Some(start), end].into_iter().flatten() {
            view.apply(&Recorded { time: 0.0, event });
        }
        view
    }

    fn finished() -> RunView {
        view(Some(Event::RunFinished { step: 300, seconds: 9.0 }))
    }

    fn shown(redraws: bool, views: &[(RunView, bool)]) -> String {
        let mut output = Vec::new();
        let mut screen = Screen::new(&mut output, redraws);
        for (view, controller) in views {
            screen.show(view, *controller).unwrap();
        }
        String::from_utf8(output).unwrap()
    }

    #[test]
    fn a_file_gets_a_line_for_each_change() {
        let text = shown(false, &[(view(None), false), (finished(), false), (finished(), true)]);
        let rest = "loss ? · ? tokens/s · ETA ? · 0 of 0 workers train · 0 failures";
        let first = format!("starting · generation 0 · step 0/300 · {rest} · no controller lives");
        assert_eq!(text, format!("{first}\nfinished · generation 0 · step 300/300 · {rest}\n"));
    }

    #[test]
    fn a_terminal_gets_a_page_over_the_older_one() {
        let text = shown(true, &[(view(None), true), (finished(), true)]);
        let pages: Vec<&str> = text.split(HOME).collect();
        assert_eq!((pages.len(), pages[0]), (3, ERASE_SCREEN));
        assert!(pages[1].starts_with("run demo: starting\x1b[K\n"), "{text:?}");
        assert!(pages[2].starts_with("run demo: finished\x1b[K\n") && pages[2].ends_with(ERASE_BELOW), "{text:?}");
    }

    #[test]
    fn a_watch_ends_as_its_run() {
        let failure = Failure::new(FailureKind::Damaged, "a shard is damaged");
        let cases = [
            (finished(), None),
            (view(Some(Event::RunStopped { step: 7 })), Some(FailureKind::Interrupted)),
            (view(Some(Event::RunFailed { failure })), Some(FailureKind::Damaged)),
        ];
        for (view, expected) in cases {
            let kind = end(view).err().map(|error| error.downcast::<Failure>().unwrap().kind);
            assert_eq!(kind, expected);
        }
    }

    #[test]
    fn folders_and_addresses_are_told_apart() {
        for (run, expected) in [("runs/demo", false), ("http://127.0.0.1:4243/", true), ("https://node-a", true), ("demo:1", false)] {
            assert_eq!(is_address(run), expected, "{run}");
        }
    }
}
