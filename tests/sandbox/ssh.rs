//! Hosts that a remote shell reaches: a real SSH server on every node of a fleet, with keys made for the test.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use super::{Fleet, run_command, skipped, wait_until};

/// The server, and where it stands: it insists on being started by its whole path.
const SERVER: &str = "/usr/sbin/sshd";
/// Longest time until a host lets a user in; it takes 0.2 s.
const START_TIMEOUT: Duration = Duration::from_secs(30);

/// Hosts with SSH servers; everything is gone when the value is dropped, or when the test process ends in any way.
pub struct SshHosts {
    fleet: Fleet,
}

impl SshHosts {
    /// Starts servers on `n1`, `n2`, ... Where there is no SSH or this process may not, `None`, and a line on stderr says which test is
    /// skipped.
    pub fn start(test: &str, num_hosts: usize) -> Option<Self> {
        if !Path::new(SERVER).is_file() {
            skipped(test, &format!("there is no {SERVER}; `make test` installs Debian's openssh-server where it runs as root"));
            return None;
        }
        let hosts = Self { fleet: Fleet::start(test, num_hosts)? };
        hosts.write_files();
        let folder = hosts.fleet.folder().display();
        for node in hosts.fleet.nodes() {
            hosts.fleet.begin_on(node, &format!("{SERVER} -D -E {folder}/log/sshd.{node}.log -f {folder}/ssh/server"));
            wait_until("a host lets a user in", START_TIMEOUT, || {
                let shell = hosts.remote_shell();
                let mut words = shell.split(' ');
                let mut command = hosts.command(words.next().unwrap_or_default());
                command.args(words).args([node, "true"]).output().is_ok_and(|output| output.status.success())
            });
        }
        Some(hosts)
    }

    /// A program on the login host. The process that is started becomes the program.
    pub fn command(&self, program: &str) -> Command {
        self.fleet.command(program)
    }

    /// The client with what it needs to know; host and command follow.
    pub fn remote_shell(&self) -> String {
        format!("ssh -F {}/ssh/client", self.fleet.folder().display())
    }

    /// The hosts.
    pub fn fleet(&self) -> &Fleet {
        &self.fleet
    }

    /// Ends all connections to a host; what was started there is not told, and the next connection works.
    #[track_caller]
    pub fn break_connections(&self, node: &str) {
        let server = format!("{SERVER} -D");
        for process_id in self.fleet.processes_on(node) {
            let command = fs::read(format!("/proc/{process_id}/cmdline")).unwrap_or_default();
            let shown = String::from_utf8_lossy(&command).replace('\0', " ");
            if shown.starts_with("sshd: ") && !shown.contains(&server) {
                super::send_signal(process_id, "KILL");
            }
        }
    }

    fn write_files(&self) {
        let folder = self.fleet.folder().join("ssh");
        fs::create_dir(&folder).expect("make a folder for keys");
        for name in ["host_key", "user_key"] {
            let mut command = Command::new("ssh-keygen");
            command.args(["-q", "-t", "ed25519", "-N", "", "-C", "a test", "-f"]).arg(folder.join(name));
            run_command(&mut command).expect_code(0);
        }
        let place = folder.display();
        let put = |name: &str, text: &str| fs::write(folder.join(name), text).expect("write a file of SSH");
        let host_key = fs::read_to_string(folder.join("host_key.pub")).expect("read a key");
        put("known_hosts", &format!("* {host_key}"));
        put(
            "server",
            &format!(
                "HostKey {place}/host_key\nAuthorizedKeysFile {place}/user_key.pub\nStrictModes no\nUsePAM no\nPidFile none\n\
                 PermitRootLogin prohibit-password\nPasswordAuthentication no\nKbdInteractiveAuthentication no\n"
            ),
        );
        put(
            "client",
            &format!(
                "IdentityFile {place}/user_key\nIdentitiesOnly yes\nUserKnownHostsFile {place}/known_hosts\nGlobalKnownHostsFile /dev/null\n\
                 StrictHostKeyChecking yes\nBatchMode yes\nConnectTimeout 5\n"
            ),
        );
    }
}
