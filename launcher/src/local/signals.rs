//! Signals as flags that a loop looks at.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM, SIGUSR1, SIGUSR2};
use signal_hook::{SigId, flag, low_level};

/// What each signal asks for.
const MEANINGS: [(&str, i32, Request); 5] = [
    ("SIGINT", SIGINT, Request::Stop),
    ("SIGTERM", SIGTERM, Request::Stop),
    ("SIGHUP", SIGHUP, Request::Stop),
    ("SIGUSR2", SIGUSR2, Request::EarlyStop),
    ("SIGUSR1", SIGUSR1, Request::Save),
];

/// What a signal asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Request {
    /// Save and leave; a second one ends everything at once.
    Stop,
    /// Save and leave. A batch system sends it some time before the SIGTERM of its time limit, which then is a first one.
    EarlyStop,
    /// Save and go on.
    Save,
}

/// The flags. While this value lives, the signals do not end the program by themselves.
#[derive(Debug)]
pub(crate) struct Signals {
    flags: Vec<(&'static str, Request, Arc<AtomicBool>, SigId)>,
}

impl Signals {
    /// Starts to listen.
    pub(crate) fn listen() -> io::Result<Self> {
        let mut signals = Self { flags: Vec::new() };
        for (name, signal, request) in MEANINGS {
            let raised = Arc::new(AtomicBool::new(false));
            let id = flag::register(signal, Arc::clone(&raised))?;
            signals.flags.push((name, request, raised, id));
        }
        Ok(signals)
    }

    /// The name of a signal with this meaning that came since the last call. Several at once are one request, as from a wrapper
    /// that forwards them all.
    pub(crate) fn take(&self, request: Request) -> Option<&'static str> {
        let of_request = self.flags.iter().filter(|(_, meaning, ..)| *meaning == request);
        let raised: Vec<&str> =
            of_request.filter(|(_, _, raised, _)| raised.swap(false, Ordering::SeqCst)).map(|(name, ..)| *name).collect();
        raised.first().copied()
    }

    /// As if the signals with this meaning had come; a real one would reach every listener of this test program.
    #[cfg(test)]
    pub(crate) fn raise(&self, request: Request) {
        for (_, _, raised, _) in self.flags.iter().filter(|(_, meaning, ..)| *meaning == request) {
            raised.store(true, Ordering::SeqCst);
        }
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for (_, _, _, id) in &self.flags {
            low_level::unregister(*id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_taken_once_and_by_its_meaning() {
        let signals = Signals::listen().unwrap();
        for (place, (name, _, request)) in MEANINGS.into_iter().enumerate() {
            assert_eq!(signals.take(request), None);
            // A real signal would reach every listener of this test program.
            signals.flags[place].2.store(true, Ordering::SeqCst);
            for other in [Request::Stop, Request::EarlyStop, Request::Save] {
                assert_eq!(signals.take(other), (other == request).then_some(name));
            }
            assert_eq!(signals.take(request), None);
        }
    }
}
