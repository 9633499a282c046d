//! What announces an operation to the next rank, so that ranks that are not in the same one notice before they mix values.

use std::fmt;

use super::api::{CollectiveCause, Operation};

/// Operation, root, sequence number, length.
pub const HEADER_BYTES: usize = 4 + 4 + 8 + 8;

/// One operation as both neighbours must see it.
#[derive(Clone, Copy, Debug)]
pub struct Header {
    /// Which operation.
    pub operation: Operation,
    /// The rank that a broadcast starts from, or how far a share travels; 0 elsewhere.
    pub root: usize,
    /// How many operations the ring has done before.
    pub sequence: u64,
    /// Number of values or bytes.
    pub len: usize,
}

impl Header {
    /// The header on the wire.
    pub fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&(self.operation as u32).to_le_bytes());
        bytes[4..8].copy_from_slice(&(self.root as u32).to_le_bytes());
        bytes[8..16].copy_from_slice(&self.sequence.to_le_bytes());
        bytes[16..].copy_from_slice(&(self.len as u64).to_le_bytes());
        bytes
    }

    /// Fails with both headers in words when the previous rank announces another operation.
    pub fn check(&self, received: &[u8; HEADER_BYTES]) -> Result<(), CollectiveCause> {
        if *received == self.to_bytes() {
            return Ok(());
        }
        Err(CollectiveCause::Mismatch(format!("this rank is in {self}, the previous one in {}", describe(received))))
    }
}

impl fmt::Display for Header {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&describe(&self.to_bytes()))
    }
}

/// A header in words; it may come from a peer and hold anything.
fn describe(bytes: &[u8; HEADER_BYTES]) -> String {
    let number = |range: std::ops::Range<usize>| bytes[range].iter().rev().fold(0u64, |value, byte| (value << 8) | u64::from(*byte));
    let operation = Operation::ALL.into_iter().find(|operation| *operation as u64 == number(0..4));
    let name = operation.map_or_else(|| format!("unknown kind {}", number(0..4)), |operation| operation.to_string());
    format!("operation {} ({name}, length {}, root {})", number(8..16), number(16..24), number(4..8))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_operation_is_told_with_both_sides() {
        let mine = Header { operation: Operation::ReduceScatter, root: 0, sequence: 5, len: 300 };
        assert_eq!(mine.check(&mine.to_bytes()), Ok(()));
        let theirs = Header { operation: Operation::Broadcast, root: 2, sequence: 4, len: 70_000 };
        let text = "this rank is in operation 5 (reduce-scatter, length 300, root 0), \
                    the previous one in operation 4 (broadcast, length 70000, root 2)";
        assert_eq!(mine.check(&theirs.to_bytes()), Err(CollectiveCause::Mismatch(text.to_owned())));
        let mut strange = mine.to_bytes();
        strange[0] = 99;
        assert!(mine.check(&strange).is_err_and(|cause| cause.to_string().contains("unknown kind 99")));
    }

    #[test]
    fn every_field_counts() {
        let header = Header { operation: Operation::AllGather, root: 1, sequence: 1 << 40, len: 1 << 41 };
        let others = [
            Header { operation: Operation::AllReduce, ..header },
            Header { root: 0, ..header },
            Header { sequence: 0, ..header },
            Header { len: 0, ..header },
        ];
        assert!(others.iter().all(|other| header.check(&other.to_bytes()).is_err()));
    }
}
