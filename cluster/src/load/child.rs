//! The process of the coordinator to be measured, as the process that starts it sees it.

use std::io::{BufRead as _, BufReader};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use anyhow::{Context as _, bail};
use cloze_recipes::failure::{Failure, FailureKind};

use super::server::Secrets;
use super::{LoadOptions, process};

/// Longest time until the coordinator's process says where it listens.
const LISTEN_TIMEOUT_S: u64 = 20;

/// A coordinator that listens.
pub(super) struct Target {
    /// Where it listens.
    pub address: SocketAddr,
    /// Its process.
    pub process_id: u32,
    /// What it was told.
    pub secrets: Secrets,
}

/// The coordinator's process. It ends when its standard input closes, and is killed where it does not.
pub(super) struct CoordinatorProcess {
    child: Child,
    input: Option<ChildStdin>,
    target: Target,
}

impl CoordinatorProcess {
    /// Starts it and waits until it listens. Fails with kind `Environment` when it cannot be started.
    pub(super) fn start(options: &LoadOptions, secrets: Secrets) -> anyhow::Result<Self> {
        let mut command = match options.coordinator_cpu {
            Some(cpu) => {
                let mut command = Command::new(process::PINNING_PROGRAM);
                command.arg("-c").arg(cpu.to_string()).arg(&options.program);
                command
            }
            None => Command::new(&options.program),
        };
        command.args(&options.arguments).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().map_err(|error| {
            Failure::new(FailureKind::Environment, "the coordinator's process cannot be started")
                .at(options.program.display())
                .because(error)
        })?;
        match Self::greet(&mut child, &secrets) {
            Ok((input, address)) => {
                let target = Target { address, process_id: child.id(), secrets };
                Ok(Self { child, input: Some(input), target })
            }
            Err(error) => {
                end(&mut child);
                Err(error)
            }
        }
    }

    /// The coordinator that it runs.
    pub(super) fn target(&self) -> &Target {
        &self.target
    }

    /// Tells the process the secrets, and waits for its address.
    fn greet(child: &mut Child, secrets: &Secrets) -> anyhow::Result<(ChildStdin, SocketAddr)> {
        let (Some(mut input), Some(output)) = (child.stdin.take(), child.stdout.take()) else { bail!("the process has no pipes") };
        secrets.write(&mut input).context("tell the coordinator's process the secrets")?;
        let (sender, line) = std::sync::mpsc::channel();
        let read = move || {
            let mut line = String::new();
            let read = BufReader::new(output).read_line(&mut line).map(|_bytes| line);
            // Nobody waits any more once the time for it is over.
            let _ = sender.send(read);
        };
        std::thread::Builder::new().name("coordinator address".to_owned()).spawn(read).context("start a thread")?;
        let line = line.recv_timeout(Duration::from_secs(LISTEN_TIMEOUT_S)).context("wait for the coordinator's address")?;
        let line = line.context("read the coordinator's address")?;
        if line.is_empty() {
            bail!("the coordinator's process ended before it listened; what it said stands above");
        }
        let address = line.trim().parse().with_context(|| format!("understand the coordinator's address {:?}", line.trim()))?;
        Ok((input, address))
    }
}

impl Drop for CoordinatorProcess {
    fn drop(&mut self) {
        drop(self.input.take());
        end(&mut self.child);
    }
}

/// Ends a process at once; it has nothing that would have to be saved.
fn end(child: &mut Child) {
    if let Err(error) = child.kill().and_then(|()| child.wait()) {
        tracing::warn!(%error, "the coordinator's process could not be ended");
    }
}
