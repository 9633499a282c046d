//! How errors and logs reach a terminal.

use cloze_recipes::failure::Failure;

/// A failure in its own words, and anything else with all its causes.
pub fn error_text(error: &anyhow::Error) -> String {
    match error.downcast_ref::<Failure>() {
        Some(failure) => failure.to_string(),
        None => format!("{error:#}"),
    }
}

/// Structured lines on stderr; `CLOZE_LOG` chooses what is shown, warnings by default.
pub fn start_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_env("CLOZE_LOG").unwrap_or_else(|_| "warn".into());
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_target(false).init();
}
