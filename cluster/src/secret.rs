//! Secrets of a run: compared in constant time, never printed.

use std::fmt;
use std::fmt::Write as _;
use std::fs::File;
use std::io::Read as _;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use subtle::ConstantTimeEq as _;

/// Random bytes of a fresh secret; 256 bits cannot be guessed.
const SECRET_BYTES: usize = 32;

/// The run's token or a generation's key. `Debug` hides the text; equality takes the same time whatever differs.
#[derive(Clone, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Secret(String);

impl Secret {
    /// Takes a secret that somebody else made.
    pub fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }

    /// Draws a fresh secret from the operating system; fails when the system's random source cannot be read.
    pub fn random() -> anyhow::Result<Self> {
        let mut bytes = [0_u8; SECRET_BYTES];
        File::open("/dev/urandom").and_then(|mut source| source.read_exact(&mut bytes)).context("read /dev/urandom for a secret")?;
        let mut text = String::with_capacity(2 * SECRET_BYTES);
        for byte in bytes {
            write!(text, "{byte:02x}").context("format a secret")?;
        }
        Ok(Self(text))
    }

    /// The text itself, for an environment variable or a handshake; never for a log.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl PartialEq for Secret {
    fn eq(&self, other: &Self) -> bool {
        self.0.as_bytes().ct_eq(other.0.as_bytes()).into()
    }
}

impl Eq for Secret {}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Secret(…)")
    }
}

#[cfg(test)]
mod tests {
    use super::Secret;

    #[test]
    fn compares_the_whole_text() {
        let cases = [("abc", "abc", true), ("abc", "abd", false), ("abc", "ab", false), ("", "", true), ("", "a", false)];
        for (left, right, equal) in cases {
            assert_eq!(Secret::new(left) == Secret::new(right), equal, "{left:?} {right:?}");
        }
    }

    #[test]
    fn is_random_and_hidden() {
        let first = Secret::random().unwrap();
        let second = Secret::random().unwrap();
        assert_eq!(first.expose().len(), 64);
        assert_ne!(first, second);
        assert!(!format!("{first:?}").contains(first.expose()));
    }
}
