//! A disk that is soon full: a small file system in memory, mounted for one test.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A mounted file system; it is unmounted when the value is dropped.
pub struct SmallDisk {
    path: PathBuf,
}

impl SmallDisk {
    /// Mounts a file system of `size`, such as `1m`, on a new folder; `None` where this process may not.
    pub fn mount(path: PathBuf, size: &str) -> Option<Self> {
        std::fs::create_dir(&path).expect("make the mount point");
        let options = format!("size={size}");
        let mounted = succeeds(Command::new("mount").args(["-t", "tmpfs", "-o", &options, "tmpfs"]).arg(&path));
        // Not `then_some`, which would make a value, and unmount it, in any case.
        if mounted { Some(Self { path }) } else { None }
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Gives it another size; what is on it stays.
    pub fn resize(&self, size: &str) {
        let options = format!("remount,size={size}");
        assert!(succeeds(Command::new("mount").args(["-o", &options]).arg(&self.path)), "the small disk could not be resized");
    }
}

impl Drop for SmallDisk {
    fn drop(&mut self) {
        // A file that is still open holds the mount; a lazy unmount takes it away as soon as it is closed.
        let unmounted = succeeds(Command::new("umount").arg(&self.path)) || succeeds(Command::new("umount").arg("-l").arg(&self.path));
        if !unmounted {
            super::skipped("unmounting", &format!("{} is still mounted", self.path.display()));
        }
    }
}

fn succeeds(command: &mut Command) -> bool {
    command.stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}
