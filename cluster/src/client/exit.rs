//! Telling the coordinator of a process that a launcher on another host saw end.

use std::time::Duration;

use anyhow::{Context as _, bail};

use super::connection;
use crate::protocol::{self, CoordinatorMessage, ExitReport, WorkerMessage};
use crate::tls::PinnedKey;

/// Longest wait for the connection, and again for the answer. Whoever reports has a process to replace.
const EXIT_REPORT_TIMEOUT: Duration = Duration::from_secs(2);

/// Tells the coordinator at `host:port`, by TLS where its key is given, and waits until it has heard. Fails when it cannot be reached, when
/// it does not hold the key, and with its own failure when it refuses the token or the protocol version.
pub fn report_exit(coordinator: &str, key: Option<&PinnedKey>, report: ExitReport) -> anyhow::Result<()> {
    let socket = connection::connect(coordinator, EXIT_REPORT_TIMEOUT)?;
    let mut sockets = connection::open(socket, key, EXIT_REPORT_TIMEOUT)?;
    protocol::write_message_blocking(&mut sockets.writing, &WorkerMessage::Exited(report)).context("tell of a process's end")?;
    let body = protocol::read_frame_blocking(&mut sockets.reading).context("wait for the coordinator's answer")?;
    let body = body.context("the coordinator closed the connection instead of answering")?;
    match protocol::decode::<CoordinatorMessage>(&body).context("read the coordinator's answer")? {
        CoordinatorMessage::Noted {} => Ok(()),
        CoordinatorMessage::Refused { failure } => Err(failure.into()),
        other => bail!("the coordinator answered with {other:?}"),
    }
}
