//! This machine and this program: their names.

use std::fs::{self, File};
use std::path::Path;

use anyhow::Context as _;
use object::read::elf::ElfFile64;
use object::{Endianness, Object as _, ReadCache};

/// Where the kernel shows the file of the running program, also when another one has taken its path.
const OWN_EXECUTABLE: &str = "/proc/self/exe";

/// The machine's name as the kernel knows it; `localhost` where the kernel does not say.
pub fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    let name = name.trim();
    if name.is_empty() { "localhost".to_owned() } else { name.to_owned() }
}

/// What tells the running program from every other; see [`executable_id_of`].
pub fn executable_id() -> anyhow::Result<String> {
    executable_id_of(Path::new(OWN_EXECUTABLE))
}

/// What tells a program from every other: the hash over its contents that the linker wrote into it, in hexadecimal digits. It survives the
/// removal of debug information. Fails where the file cannot be read, is no program, or was linked without it.
pub fn executable_id_of(program: &Path) -> anyhow::Result<String> {
    let file = File::open(program).context("open a program's file")?;
    let cache = ReadCache::new(file);
    let elf = ElfFile64::<Endianness, _>::parse(&cache).context("read a program's file")?;
    let id = elf.build_id().context("read a program's build id")?;
    let id = id.context("the program was linked without a build id (`-Wl,--build-id`)")?;
    Ok(id.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn has_a_name_without_blanks() {
        let name = host_name();
        assert!(!name.is_empty());
        assert!(!name.contains(char::is_whitespace), "{name:?}");
    }

    #[test]
    fn a_program_knows_its_own_hash() {
        let id = executable_id().unwrap();
        // Linkers write 8 bytes or more, as they are told.
        assert!(id.len() >= 16 && id.bytes().all(|digit| digit.is_ascii_hexdigit()), "{id}");
    }
}
