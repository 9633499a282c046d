//! Both ways of a worker's connection, in clear or secured.
//!
//! A secured connection has one TLS state, which whoever reads and whoever writes take turns at. Nobody waits for the socket while holding
//! it, so a reader that waits for the coordinator never keeps a writer waiting, nor the other way round. Reader and writer have a handle of
//! the socket each; what its timeouts and its shutdown mean to them is the same as in clear.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use anyhow::Context as _;
use cloze_recipes::failure::{Failure, FailureKind};
use rustls::{CertificateError, ClientConnection, Error};

use super::lock;
use crate::tls::{PinnedKey, WrongKey, coordinator_name};

/// Bytes that are taken from the socket at once: a TLS record holds as many.
const SEALED_BYTES: usize = 16 << 10;

/// What the coordinator says.
pub(super) enum Reading {
    /// In clear.
    Plain(Incoming),
    /// By TLS.
    Secured(SecuredReader),
}

/// What the worker says.
pub(super) enum Writing {
    /// In clear.
    Plain(TcpStream),
    /// By TLS.
    Secured(SecuredWriter),
}

/// Shares out a connection in clear.
pub(super) fn plain(socket: Incoming) -> anyhow::Result<(Reading, Writing)> {
    let writing = socket.writing()?;
    Ok((Reading::Plain(socket), Writing::Plain(writing)))
}

/// Secures a connection and shares it out. Nothing of the worker's is sent before the coordinator has proved that it holds the key; fails
/// with kind `Mismatch` when it cannot.
pub(super) fn secure(mut socket: Incoming, key: &PinnedKey) -> anyhow::Result<(Reading, Writing)> {
    let mut connection = ClientConnection::new(key.client_config()?, coordinator_name()?).context("begin TLS with the coordinator")?;
    while connection.is_handshaking() {
        connection.complete_io(&mut socket).map_err(|error| handshake_failure(error, key))?;
    }
    let connection = Arc::new(Mutex::new(connection));
    let writer = SecuredWriter { socket: socket.writing()?, connection: Arc::clone(&connection), sealed: Vec::new() };
    let reader = SecuredReader { socket, connection, sealed: vec![0; SEALED_BYTES], unread: 0..0 };
    Ok((Reading::Secured(reader), Writing::Secured(writer)))
}

impl Reading {
    /// The coordinator has answered: from now on only its silence counts, as the socket's own timeout bounds it.
    pub(super) fn lift_deadline(&mut self) {
        let socket = match self {
            Self::Plain(socket) => socket,
            Self::Secured(reader) => &mut reader.socket,
        };
        socket.deadline = None;
    }
}

/// A socket to read from, with a deadline for all reads together: somebody in between who sends a byte now and then would outlast any
/// timeout of a single one.
pub(super) struct Incoming {
    socket: TcpStream,
    deadline: Option<Instant>,
}

impl Incoming {
    pub(super) fn until(socket: TcpStream, deadline: Instant) -> Self {
        Self { socket, deadline: Some(deadline) }
    }

    fn writing(&self) -> anyhow::Result<TcpStream> {
        self.socket.try_clone().context("share the coordinator's socket")
    }
}

impl Read for Incoming {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        if let Some(deadline) = self.deadline {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "the coordinator has not answered in time"));
            }
            self.socket.set_read_timeout(Some(left))?;
        }
        self.socket.read(bytes)
    }
}

/// The handshake alone writes here; see [`Writing`] for what follows.
impl Write for Incoming {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.socket.write(bytes)
    }

    /// The last word of a handshake that fails is in several buffers, and is offered once.
    fn write_vectored(&mut self, buffers: &[io::IoSlice<'_>]) -> io::Result<usize> {
        self.socket.write_vectored(buffers)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.socket.flush()
    }
}

impl Read for Reading {
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.read(bytes),
            Self::Secured(reader) => reader.read(bytes),
        }
    }
}

impl Write for Writing {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Plain(socket) => socket.write(bytes),
            Self::Secured(writer) => writer.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        // Neither keeps anything back.
        Ok(())
    }
}

/// The reading half of a secured connection.
pub(super) struct SecuredReader {
    socket: Incoming,
    connection: Arc<Mutex<ClientConnection>>,
    /// What came from the socket.
    sealed: Vec<u8>,
    /// The part of it that was not opened yet.
    unread: Range<usize>,
}

impl SecuredReader {
    /// As a socket reads. A coordinator that is killed says no farewell, and a frame that is cut is found out by its length; so the end of
    /// the socket is simply the end.
    fn read(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        loop {
            if let Some(num_bytes) = self.open(bytes)? {
                return Ok(num_bytes);
            }
            let received = self.socket.read(&mut self.sealed)?;
            if received == 0 {
                return Ok(0);
            }
            self.unread = 0..received;
        }
    }

    /// Opens what came from the socket; `None` when more has to come.
    fn open(&mut self, bytes: &mut [u8]) -> io::Result<Option<usize>> {
        let mut connection = lock(&self.connection);
        loop {
            match connection.reader().read(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                opened => return opened.map(Some),
            }
            if self.unread.is_empty() {
                return Ok(None);
            }
            self.unread.start += connection.read_tls(&mut &self.sealed[self.unread.clone()])?;
            connection.process_new_packets().map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        }
    }
}

/// The writing half of a secured connection; there is one, so what it seals reaches the socket in its order.
pub(super) struct SecuredWriter {
    socket: TcpStream,
    connection: Arc<Mutex<ClientConnection>>,
    /// Kept for its memory.
    sealed: Vec<u8>,
}

impl SecuredWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.sealed.clear();
        let taken = {
            let mut connection = lock(&self.connection);
            let taken = connection.writer().write(bytes)?;
            while connection.wants_write() {
                connection.write_tls(&mut self.sealed)?;
            }
            taken
        };
        self.socket.write_all(&self.sealed)?;
        Ok(taken)
    }
}

/// Says what a failed handshake means. A socket that fails or closes is no word about the key, and is told as it is.
fn handshake_failure(error: io::Error, key: &PinnedKey) -> anyhow::Error {
    let Some(cause) = error.get_ref().and_then(|inner| inner.downcast_ref::<Error>()) else {
        return anyhow::Error::new(error).context("agree on TLS with the coordinator");
    };
    let mismatch = |what: &str| Failure::new(FailureKind::Mismatch, what);
    let failure = match cause {
        Error::InvalidCertificate(CertificateError::Other(other)) => match other.0.downcast_ref::<WrongKey>() {
            Some(wrong) => mismatch("the coordinator does not hold this run's key")
                .expected(format!("key {key}"))
                .found(format!("key {}", wrong.found))
                .hint("another run's coordinator, or somebody between, answers at this address; the token was not sent"),
            None => mismatch("the coordinator's key cannot be checked").because(cause),
        },
        Error::InvalidMessage(_) => mismatch("the coordinator does not speak TLS")
            .expected(format!("the key {key}"))
            .because(cause)
            .hint("another run's coordinator answers at this address, or one without `cluster.tls`; the token was not sent"),
        other => mismatch("no TLS with the coordinator").because(other).hint("the token was not sent"),
    };
    failure.into()
}
