//! A small world in a temporary folder: a generated corpus, a recipe for a tiny model, and the programs started there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use super::{Network, Outcome, Process, Run, run_command, send_signal};

/// The command line program.
pub const CLOZE: &str = env!("CARGO_BIN_EXE_cloze");
/// The program with the tensors.
pub const WORKER: &str = env!("CARGO_BIN_EXE_cloze-worker");
/// Name of the recipe in a world.
pub const RECIPE: &str = "recipe.yaml";

/// The recipe of a world. The corpus has 35 tasks, so 9 samples of each are 315: a step of 48 is less than a sixth of an epoch, and with
/// its 1,000 to 1,200 tokens it has at least four packs. A step takes a few milliseconds. The bound on silence is generous because many
/// tests share the machine.
pub const RECIPE_TEXT: &str = "\
version: 1
name: small
model:
  shape: {hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2}
  tokenizer: corpus/tokenizer.json
data:
  sources: [{url: corpus/train}]
  output: prepared
  max_length: 128
  cap_per_task: 9
train:
  steps: 40
  batch_examples: 48
  micro_batch_tokens: 256
  learning_rate: 1e-3
  threads: 1
checkpoint:
  every_steps: 5
cluster:
  heartbeat_timeout_ms: 20000
evaluation:
  - name: sentiment
    files: [corpus/eval/sentiment.jsonl]
    labels: [{value: positive}, {value: negative}]
    limit: 50
";

/// The folder of this repository.
pub fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// A temporary folder in which the programs run.
pub struct World {
    root: PathBuf,
    _folder: TempDir,
}

impl World {
    /// A recipe and a corpus of this many records, not prepared.
    pub fn with_corpus(records: u32) -> Self {
        let folder = tempfile::tempdir().expect("make a temporary folder");
        // Without links, so that paths compare with those that the programs show.
        let root = folder.path().canonicalize().expect("find the temporary folder");
        let world = Self { root, _folder: folder };
        world.write(RECIPE, RECIPE_TEXT);
        world.done(&["data", "synth", "corpus", "--examples", &records.to_string()]);
        world
    }

    /// A recipe and its prepared data.
    pub fn prepared() -> Self {
        let world = Self::with_corpus(2000);
        world.done(&["data", "prepare", RECIPE]);
        world
    }

    /// A path in this world.
    pub fn path(&self, name: &str) -> PathBuf {
        self.root.join(name)
    }

    /// Writes a file of this world.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        fs::write(self.path(name), content).expect("write a file of the world");
    }

    /// Writes a program of these lines of shell. A shell of its own writes the file: a process that another test starts at the same moment
    /// would inherit one that is open to be written, and the program could not be executed.
    pub fn write_program(&self, name: &str, commands: &str) -> PathBuf {
        let path = self.path(name);
        let write = r#"printf '#!/bin/sh\n%s\n' "$1" > "$0" && chmod 755 "$0""#;
        run_command(Command::new("/bin/sh").args(["-c", write]).arg(&path).arg(commands)).expect_code(0);
        path
    }

    /// A worker program that ends with this code where it is started on this node, and works on all others.
    pub fn worker_broken_on(&self, node: &str, code: i32) -> PathBuf {
        let complaint = "echo 'libtorch_cpu.so: cannot open shared object file' >&2";
        let commands = format!(r#"if [ "$(uname -n)" = {node} ]; then {complaint}; exit {code}; fi; exec {WORKER} "$@""#);
        self.write_program("broken-worker", &commands)
    }

    /// Reads a file of this world.
    #[track_caller]
    pub fn read(&self, name: &str) -> Vec<u8> {
        let path = self.path(name);
        fs::read(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
    }

    /// `cloze` with arguments, in this world, without what the caller's environment says about buckets and logs.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = self.here(Command::new(CLOZE));
        command.args(arguments);
        command
    }

    /// The same on one of the hosts of a network of this machine.
    pub fn command_on(&self, network: &Network, host: usize, arguments: &[&str]) -> Command {
        let mut command = self.here(network.command(host, CLOZE));
        command.args(arguments).env("NO_PROXY", format!("127.0.0.1,{}", network.bridge_address()));
        command
    }

    /// The same by a command that leads to a host of a fleet and starts [`CLOZE`] there.
    pub fn command_by(&self, command: Command, arguments: &[&str]) -> Command {
        let mut command = self.here(command);
        command.args(arguments);
        command
    }

    fn here(&self, mut command: Command) -> Command {
        command.current_dir(&self.root).env("CLOZE_WORKER", WORKER).env("NO_PROXY", "127.0.0.1");
        let is_foreign = |name: &str| name.starts_with("AWS_") || ["CLOZE_LOG", "CLOZE_TOKEN", "CLOZE_COORDINATOR_KEY"].contains(&name);
        for (name, _) in std::env::vars_os().filter(|(name, _)| is_foreign(&name.to_string_lossy())) {
            command.env_remove(name);
        }
        command
    }

    /// Runs `cloze` to its end.
    #[track_caller]
    pub fn cloze(&self, arguments: &[&str]) -> Outcome {
        run_command(&mut self.command(arguments))
    }

    /// Runs `cloze` and fails the test unless it succeeds.
    #[track_caller]
    pub fn done(&self, arguments: &[&str]) -> Outcome {
        self.cloze(arguments).expect_code(0)
    }

    /// The run folder of a name.
    pub fn run(&self, name: &str) -> Run {
        Run { path: self.path(name) }
    }

    /// Trains the recipe into a new run folder, to its end.
    #[track_caller]
    pub fn train(&self, name: &str, arguments: &[&str]) -> Run {
        self.done(&train_arguments(name, arguments));
        self.run(name)
    }

    /// Starts training into a new run folder.
    pub fn start_training(&self, name: &str, arguments: &[&str]) -> Process {
        Process::start(&mut self.command(&train_arguments(name, arguments)), "")
    }
}

impl Drop for World {
    /// Workers outlive their controller for a while, but never the world in which they run.
    fn drop(&mut self) {
        for process_id in workers_below(&self.root) {
            send_signal(process_id, "KILL");
        }
    }
}

/// Processes of workers that were given a path in a folder.
fn workers_below(folder: &Path) -> Vec<u32> {
    let folder = folder.display().to_string();
    let is_ours = |command: &[u8]| {
        let command = String::from_utf8_lossy(command).into_owned();
        let mut words = command.split('\0');
        words.next().is_some_and(|program| program.ends_with("cloze-worker")) && words.any(|word| word.starts_with(&folder))
    };
    let processes = fs::read_dir("/proc").into_iter().flatten().filter_map(Result::ok);
    let ours = processes.filter(|entry| is_ours(&fs::read(entry.path().join("cmdline")).unwrap_or_default()));
    ours.filter_map(|entry| entry.file_name().to_string_lossy().parse().ok()).collect()
}

fn train_arguments<'a>(name: &'a str, arguments: &[&'a str]) -> Vec<&'a str> {
    [["train", RECIPE, "--run", name].as_slice(), arguments].concat()
}
