//! Reaching the coordinator and asking it for a seat.

use std::net::{TcpStream, ToSocketAddrs as _};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use cloze_recipes::failure::{Failure, FailureKind};

use super::JoinOptions;
use super::stream::{self, Incoming, Reading, Writing};
use crate::host::host_name;
use crate::protocol::{self, CoordinatorMessage, Held, JoinRequest, PROTOCOL_VERSION, WorkerMessage};
use crate::tls::PinnedKey;

/// Longest wait for the TCP connection to one address.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);

/// Longest wait for the answer to a join. Ten thousand workers that join at the same moment wait for each other.
pub(super) const JOIN_REPLY_TIMEOUT: Duration = Duration::from_secs(30);

/// Longest wait for the socket to take one message.
const WRITE_TIMEOUT: Duration = Duration::from_secs(5);

/// The coordinator's answer to a join.
#[derive(Debug)]
pub(super) enum Answer {
    /// The worker has its seat.
    Welcome {
        /// The generation that the worker holds goes on.
        adopted: bool,
    },
    /// It may not join.
    Refused(Failure),
}

/// One connection, for those who read, write and close it.
pub(super) struct Sockets {
    pub(super) reading: Reading,
    pub(super) writing: Writing,
    pub(super) closing: TcpStream,
}

impl Sockets {
    /// From now on a coordinator that says nothing for two heartbeat timeouts, four pulses, counts as away.
    pub(super) fn expect_pulses(&mut self, heartbeat_timeout: Duration) -> anyhow::Result<()> {
        self.reading.lift_deadline();
        self.closing.set_read_timeout(Some(2 * heartbeat_timeout)).context("bound the coordinator's silence")
    }
}

/// Connects. Fails with kind `Run`, since a coordinator that is away may come back: a worker that ends with this can be replaced.
pub(super) fn connect(coordinator: &str, wait: Duration) -> anyhow::Result<TcpStream> {
    let unreachable = |cause: &dyn std::fmt::Display| {
        Failure::new(FailureKind::Run, "the coordinator cannot be reached")
            .at(coordinator)
            .because(cause)
            .hint("workers are started by `cloze train`; a worker on its own has nobody to join")
    };
    let mut last_error = None;
    for address in coordinator.to_socket_addrs().map_err(|error| unreachable(&error))? {
        match TcpStream::connect_timeout(&address, wait) {
            // While nobody listens on a port of this machine, the system may connect a socket to itself.
            Ok(socket) if socket.local_addr().is_ok_and(|own| own == address) => {
                last_error = Some(std::io::Error::from(std::io::ErrorKind::ConnectionRefused));
            }
            Ok(socket) => {
                socket.set_nodelay(true).context("switch off Nagle's algorithm")?;
                socket.set_write_timeout(Some(WRITE_TIMEOUT)).context("bound writes to the coordinator")?;
                return Ok(socket);
            }
            Err(error) => last_error = Some(error),
        }
    }
    match last_error {
        Some(error) => Err(unreachable(&error).into()),
        None => Err(unreachable(&"the name has no address").into()),
    }
}

/// What a worker brings; `held` is the generation that still runs in it.
pub(super) fn request(options: &JoinOptions, held: Option<Held>) -> JoinRequest {
    JoinRequest {
        protocol_version: PROTOCOL_VERSION,
        token: options.token.clone(),
        recipe_hash: options.recipe_hash.clone(),
        build: options.build.clone(),
        executable: options.executable.clone(),
        worker: options.worker,
        process_id: std::process::id(),
        host: host_name(),
        collective_address: options.collective_address.clone(),
        held,
    }
}

/// Shares a connection out, secured where the coordinator's key is known; `wait` bounds all that the coordinator may take until its pulses
/// are expected.
pub(super) fn open(socket: TcpStream, key: Option<&PinnedKey>, wait: Duration) -> anyhow::Result<Sockets> {
    let closing = socket.try_clone().context("share the coordinator's socket")?;
    let socket = Incoming::until(socket, Instant::now() + wait);
    let (reading, writing) = match key {
        None => stream::plain(socket)?,
        Some(key) => stream::secure(socket, key)?,
    };
    Ok(Sockets { reading, writing, closing })
}

/// Asks and waits for the answer.
pub(super) fn ask_for_seat(sockets: &mut Sockets, request: JoinRequest) -> anyhow::Result<Answer> {
    let join = WorkerMessage::Join(request);
    protocol::write_message_blocking(&mut sockets.writing, &join).context("ask the coordinator for a seat")?;
    let body = protocol::read_frame_blocking(&mut sockets.reading).context("wait for the coordinator's answer")?;
    let body = body.context("the coordinator closed the connection instead of answering")?;
    match protocol::decode::<CoordinatorMessage>(&body).context("read the coordinator's answer")? {
        CoordinatorMessage::Welcome { adopted } => Ok(Answer::Welcome { adopted }),
        CoordinatorMessage::Refused { failure } => Ok(Answer::Refused(failure)),
        other => anyhow::bail!("the coordinator answered a join with {other:?}"),
    }
}
