//! Damage to files, as a bad disk or an interrupted copy does it.

use std::fs;
use std::path::Path;

/// Changes one bit in the middle of a file.
pub fn flip_middle_byte(path: &Path) {
    let mut bytes = fs::read(path).expect("read the file to damage");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).expect("write the damaged file");
}

/// Cuts the second half of a file off.
pub fn truncate(path: &Path) {
    let bytes = fs::read(path).expect("read the file to damage");
    fs::write(path, &bytes[..bytes.len() / 2]).expect("write the damaged file");
}
