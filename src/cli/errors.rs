//! How errors and logs reach a terminal.

use std::fmt::{self, Write as _};
use std::io::IsTerminal as _;

use cloze_recipes::failure::Failure;
use tracing::field::{Field, Visit};
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// Goes to the start of the line and erases it, where a progress line may stand.
const ERASE_LINE: &str = "\r\x1b[2K";

/// A failure in its own words, and anything else with all its causes.
pub fn error_text(error: &anyhow::Error) -> String {
    match error.downcast_ref::<Failure>() {
        Some(failure) => failure.to_string(),
        None => format!("{error:#}"),
    }
}

/// Warnings on stderr in the form of everything else that is said there. With `CLOZE_LOG`, structured lines of what that chooses.
pub fn start_logging() {
    let builder = tracing_subscriber::fmt().with_writer(std::io::stderr).with_target(false);
    match EnvFilter::try_from_env("CLOZE_LOG") {
        Ok(filter) => builder.with_env_filter(filter).init(),
        Err(_) => {
            let plain = PlainLines { erases: std::io::stderr().is_terminal() };
            builder.with_env_filter(EnvFilter::new("warn")).event_format(plain).init();
        }
    }
}

/// `warning: a connection was refused (error: the token is wrong)`.
struct PlainLines {
    /// A progress line may stand where the next line goes.
    erases: bool,
}

impl<S, N> FormatEvent<S, N> for PlainLines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, _context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let mut words = Words::default();
        event.record(&mut words);
        let erased = if self.erases { ERASE_LINE } else { "" };
        writeln!(writer, "{erased}{}: {}", level_word(*event.metadata().level()), words.line())
    }
}

fn level_word(level: Level) -> &'static str {
    match level {
        Level::ERROR => "error",
        Level::WARN => "warning",
        _ => "note",
    }
}

/// What an event says.
#[derive(Default)]
struct Words {
    message: String,
    fields: String,
}

impl Words {
    fn line(&self) -> String {
        if self.fields.is_empty() { self.message.clone() } else { format!("{} ({})", self.message, self.fields) }
    }

    fn add(&mut self, field: &Field, value: impl fmt::Display) {
        let separator = if self.fields.is_empty() { "" } else { ", " };
        // Writing to a string does not fail.
        let _ = if field.name() == "message" {
            write!(self.message, "{value}")
        } else {
            write!(self.fields, "{separator}{}: {value}", field.name())
        };
    }
}

impl Visit for Words {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field, format_args!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use tracing_subscriber::fmt::MakeWriter;

    use super::*;

    #[derive(Clone, Default)]
    struct Screen(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Screen {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl<'a> MakeWriter<'a> for Screen {
        type Writer = Self;

        fn make_writer(&'a self) -> Self {
            self.clone()
        }
    }

    #[test]
    fn a_log_line_reads_like_the_others() {
        for (erases, before) in [(false, ""), (true, ERASE_LINE)] {
            let screen = Screen::default();
            let subscriber = tracing_subscriber::fmt().with_writer(screen.clone()).event_format(PlainLines { erases }).finish();
            tracing::subscriber::with_default(subscriber, || {
                tracing::warn!(worker = 1, host = "node-a", "a worker was refused");
                tracing::error!("some worker processes do not end");
            });
            let text = String::from_utf8(screen.0.lock().unwrap().clone()).unwrap();
            let expected = format!(
                "{before}warning: a worker was refused (worker: 1, host: node-a)\n{before}error: some worker processes do not end\n"
            );
            assert_eq!(text, expected);
        }
    }
}
