//! A real SLURM cluster on this machine: controller, node daemons and, where asked for, accounting, on the hosts of a fleet.
//!
//! `config` is what the daemons read, `jobs` what a test asks of the cluster and does to it. There is neither systemd nor cgroups; every
//! node has its own address and its own `slurmd`, and all of them share the file system.

mod config;
mod jobs;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::Duration;

use super::{Fleet, run_command, skipped, wait_until};

/// What it takes, and the Debian package that has it.
const PROGRAMS: [(&str, &str); 5] =
    [("munged", "munge"), ("slurmctld", "slurmctld"), ("slurmd", "slurmd"), ("sbatch", "slurm-client"), ("sinfo", "slurm-client")];
/// The same for accounting.
const ACCOUNTING_PROGRAMS: [(&str, &str); 3] =
    [("slurmdbd", "slurmdbd"), ("mariadbd", "mariadb-server-core"), ("my_print_defaults", "mariadb-client-core")];
/// Folders of daemons that a user's `PATH` may lack.
const SYSTEM_FOLDERS: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];
/// Longest time until one of the daemons answers; all of them together take 2 s on a free machine, 6 s with accounting.
const START_TIMEOUT: Duration = Duration::from_secs(90);
/// Interval at which a daemon is asked again.
const POLL_INTERVAL: Duration = Duration::from_millis(100);

/// What a cluster has.
#[derive(Clone, Copy)]
pub struct SlurmOptions {
    /// Nodes, `n1` and so on, each with four processors.
    pub num_nodes: usize,
    /// GPUs of each node, of the type `fake`: files that SLURM hands out, and nothing else.
    pub gpus_per_node: usize,
    /// Whether jobs are accounted for, so that `sacct` knows them; that takes a database and some seconds.
    pub accounting: bool,
    /// For how long a job that is over is known without accounting, in seconds, at least 2; SLURM looks once a minute.
    pub remembers_s: u32,
}

impl Default for SlurmOptions {
    fn default() -> Self {
        Self { num_nodes: 4, gpus_per_node: 2, accounting: false, remembers_s: 600 }
    }
}

/// A running cluster. Its partitions are `main` (the default), `spot`, whose jobs are requeued for those of others, and `urgent`, for whose
/// jobs they are. Everything is gone when the value is dropped, or when the test process ends in any way.
pub struct SlurmCluster {
    fleet: Fleet,
    options: SlurmOptions,
}

impl SlurmCluster {
    /// Starts a cluster; `None`, and a line on stderr that says which test is skipped, where SLURM is not installed or this process may not.
    pub fn start(test: &str, options: SlurmOptions) -> Option<Self> {
        let accounting: &[_] = if options.accounting { &ACCOUNTING_PROGRAMS } else { &[] };
        for (program, package) in PROGRAMS.iter().chain(accounting) {
            if find_program(program).is_none() {
                skipped(test, &format!("there is no {program}; `make test` installs Debian's {package} where it runs as root"));
                return None;
            }
        }
        let cluster = Self { fleet: Fleet::start(test, options.num_nodes)?, options };
        cluster.write_files();
        cluster.start_daemons();
        Some(cluster)
    }

    /// A program on the login host, where `sbatch` and all others find the cluster. The process that is started becomes the program.
    pub fn command(&self, program: &str) -> Command {
        self.with_environment(self.fleet.command(program))
    }

    /// The same on a node.
    pub fn command_on(&self, node: &str, program: &str) -> Command {
        self.with_environment(self.fleet.command_on(node, program))
    }

    /// The hosts.
    pub fn fleet(&self) -> &Fleet {
        &self.fleet
    }

    fn with_environment(&self, mut command: Command) -> Command {
        command.env("SLURM_CONF", self.path("etc/slurm.conf")).env("PATH", system_path());
        command
    }

    fn path(&self, name: &str) -> PathBuf {
        self.fleet.folder().join(name)
    }

    fn write_files(&self) {
        for name in ["etc", "run", "spool", "state", "dev", "munge"] {
            fs::create_dir(self.path(name)).expect("make a folder of the cluster");
        }
        for gpu in 0..self.options.gpus_per_node {
            // SLURM wants character devices; these are copies of /dev/null.
            run_command(Command::new("mknod").arg(self.path(&format!("dev/gpu{gpu}"))).args(["c", "1", "3"])).expect_code(0);
        }
        config::write(self.fleet.folder(), &self.options, version());
    }

    fn start_daemons(&self) {
        let folder = self.fleet.folder().display();
        // SLURM forgives a munged that runs as root, munged itself only when told so.
        self.begin(&format!(
            "munged --foreground --force --key-file={folder}/munge/key --socket={folder}/munge/socket --pid-file={folder}/munge/pid \
             --seed-file={folder}/munge/seed --log-file={folder}/log/munged.log"
        ));
        self.wait_for("munged", "munge", &["--no-input", "--socket", &format!("{folder}/munge/socket")]);
        if self.options.accounting {
            self.start_accounting();
        }
        self.begin("slurmctld -D");
        for node in self.fleet.nodes() {
            self.start_node(node);
        }
        self.wait_for_idle_nodes();
    }

    fn start_accounting(&self) {
        let (folder, settings) = (self.fleet.folder().display(), self.path("etc/mariadb.cnf"));
        let mut install = self.command("mariadb-install-db");
        install.args(["--no-defaults", "--user=root", "--auth-root-authentication-method=normal", "--skip-test-db"]);
        run_command(install.arg(format!("--datadir={folder}/mariadb"))).expect_code(0);
        self.begin(&format!("mariadbd --defaults-file={}", settings.display()));
        wait_until("MariaDB listens", START_TIMEOUT, || self.path("run/mariadb.pid").exists());
        self.begin("slurmdbd -D");
        self.wait_for("slurmdbd", "timeout", &["5", "sacctmgr", "--noheader", "list", "cluster"]);
        run_command(self.command("sacctmgr").args(["--immediate", "add", "cluster", config::CLUSTER])).expect_code(0);
    }

    /// Starts a daemon on the login host.
    fn begin(&self, line: &str) {
        self.fleet.begin(&self.daemon_line(line, "login"));
    }

    /// Daemons have logs of their own, but what is wrong with their settings they say only here.
    fn daemon_line(&self, line: &str, log: &str) -> String {
        let (folder, path) = (self.fleet.folder().display(), system_path());
        format!("env SLURM_CONF={folder}/etc/slurm.conf PATH={path} {line} >> {folder}/log/{log}.out 2>&1")
    }

    /// Waits until a program succeeds.
    fn wait_for(&self, daemon: &str, program: &str, arguments: &[&str]) {
        self.wait_while_it_starts(daemon, || {
            let mut command = self.command(program);
            command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
            command.status().is_ok_and(|status| status.success())
        });
    }

    fn wait_while_it_starts(&self, daemon: &str, answers: impl Fn() -> bool) {
        let end = std::time::Instant::now() + START_TIMEOUT;
        while !answers() {
            assert!(std::time::Instant::now() < end, "{daemon} does not answer within {START_TIMEOUT:?}\n{}", self.fleet.logs());
            sleep(POLL_INTERVAL);
        }
    }
}

/// The path of a program, also where only the system looks for it.
fn find_program(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&system_path()).map(|folder| folder.join(name)).find(|path| path.is_file())
}

/// The caller's `PATH`, and where Debian puts daemons.
fn system_path() -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    let present = SYSTEM_FOLDERS.iter().copied().filter(|folder| Path::new(folder).is_dir());
    present.fold(path, |path, folder| path + ":" + folder)
}

/// Year and month of SLURM's version, as in 22.05; settings differ by it.
fn version() -> (u32, u32) {
    let program = find_program("slurmctld").expect("SLURM is there");
    let output = run_command(Command::new(program).arg("-V")).expect_code(0).stdout;
    // `slurm-wlm 22.05.8`
    let mut numbers = output.split_whitespace().next_back().unwrap_or_default().split('.').map_while(|part| part.parse().ok());
    (numbers.next().expect("SLURM says its version"), numbers.next().expect("SLURM says its version"))
}
