//! SIGINT, SIGTERM and SIGHUP as flags that the loop looks at.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::{SigId, flag, low_level};

/// The flags. While this value lives, the signals do not end the program by themselves.
#[derive(Debug)]
pub(super) struct Signals {
    flags: [(&'static str, Arc<AtomicBool>, SigId); 3],
}

impl Signals {
    /// Starts to listen.
    pub(super) fn listen() -> io::Result<Self> {
        let listen = |name, signal| {
            let raised = Arc::new(AtomicBool::new(false));
            let id = flag::register(signal, Arc::clone(&raised))?;
            io::Result::Ok((name, raised, id))
        };
        Ok(Self { flags: [listen("SIGINT", SIGINT)?, listen("SIGTERM", SIGTERM)?, listen("SIGHUP", SIGHUP)?] })
    }

    /// The name of a signal that came since the last call. Several at once are one request, as from a wrapper that forwards them all.
    pub(super) fn take(&self) -> Option<&'static str> {
        let raised: Vec<&str> =
            self.flags.iter().filter(|(_, raised, _)| raised.swap(false, Ordering::SeqCst)).map(|(name, _, _)| *name).collect();
        raised.first().copied()
    }
}

impl Drop for Signals {
    fn drop(&mut self) {
        for (_, _, id) in &self.flags {
            low_level::unregister(*id);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signal_is_taken_once() {
        let signals = Signals::listen().unwrap();
        assert_eq!(signals.take(), None);
        // A real signal would reach every listener of this test program.
        signals.flags[1].1.store(true, Ordering::SeqCst);
        assert_eq!(signals.take(), Some("SIGTERM"));
        assert_eq!(signals.take(), None);
    }
}
