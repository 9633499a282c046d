//! The name of this machine.

use std::fs;

/// The machine's name as the kernel knows it; `localhost` where the kernel does not say.
pub fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "localhost".to_owned() } else { name.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::host_name;

    #[test]
    fn has_a_name_without_blanks() {
        let name = host_name();
        assert!(!name.is_empty());
        assert!(!name.contains(char::is_whitespace), "{name:?}");
    }
}
