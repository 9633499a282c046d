//! What a coordinator must remember to be replaced: an append-only file of JSON lines in the run folder.
//!
//! A generation is written, and forced to the disk, before its members are told of it. So a successor never takes a generation for the
//! newest that is not. There are no secrets in it: the key of a generation is known to its members, and nobody else needs it.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};

use cloze_recipes::failure::{Failure, FailureKind};
use serde::{Deserialize, Serialize};

use crate::membership::{HostRecord, Retries};

/// Length in bytes above which the file is written anew with what still counts. A run of weeks appends a few hundred bytes a minute.
const MAX_JOURNAL_BYTES: u64 = 1 << 20;

/// Longest journal that is read. A generation of 10,000 workers takes about half a mebibyte, and one line follows the bound above.
const MAX_READ_BYTES: u64 = 64 << 20;

/// One line.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "entry", rename_all = "snake_case")]
pub enum Entry {
    /// A generation starts.
    Generation {
        /// Its number.
        generation: u64,
        /// Slots of its members, by rank.
        members: Vec<u32>,
        /// Their collective addresses, by rank.
        addresses: Vec<String>,
    },
    /// The newest generation is over.
    Over {
        /// Its number.
        generation: u64,
    },
    /// Up to which step generations train from here on.
    Until {
        /// The step after which they save and leave; `None` goes on to the end.
        step: Option<u64>,
    },
    /// How far the run is.
    Progress {
        /// Steps done.
        step: u64,
        /// Steps done at the newest saved state.
        saved_step: u64,
    },
    /// A step is tried again.
    Retries(Retries),
    /// Failures of a host.
    Host {
        /// Its name.
        host: String,
        /// How often one of its workers was lost.
        failures: u32,
        /// Whether it is used no more.
        excluded: bool,
    },
}

/// What all lines together say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Memory {
    /// Number of the newest generation; 0 for none.
    pub generation: u64,
    /// Its members, while it runs.
    pub running: Option<Membership>,
    /// Step after which it saves and leaves; `None` goes on to the end.
    pub until_step: Option<u64>,
    /// Steps done.
    pub step: u64,
    /// Steps done at the newest saved state.
    pub saved_step: u64,
    /// How often the step of the last setback was tried again.
    pub retries: Retries,
    /// Hosts whose workers failed.
    pub hosts: BTreeMap<String, HostRecord>,
}

/// Who takes part in a generation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Membership {
    /// Slots by rank.
    pub members: Vec<u32>,
    /// Collective addresses by rank.
    pub addresses: Vec<String>,
}

impl Memory {
    /// Takes one more line in.
    pub fn apply(&mut self, entry: Entry) {
        match entry {
            Entry::Generation { generation, members, addresses } => {
                self.generation = generation;
                self.running = Some(Membership { members, addresses });
            }
            Entry::Over { generation } if generation == self.generation => self.running = None,
            // The end of an older generation, which its successor's start has told already.
            Entry::Over { .. } => {}
            Entry::Until { step } => self.until_step = step,
            Entry::Progress { step, saved_step } => (self.step, self.saved_step) = (step, saved_step),
            Entry::Retries(retries) => self.retries = retries,
            Entry::Host { host, failures, excluded } => {
                self.hosts.insert(host, HostRecord { failures, excluded });
            }
        }
    }

    /// The fewest lines that say the same.
    pub fn entries(&self) -> Vec<Entry> {
        let membership = self.running.clone().unwrap_or(Membership { members: Vec::new(), addresses: Vec::new() });
        let Membership { members, addresses } = membership;
        let mut entries = vec![Entry::Generation { generation: self.generation, members, addresses }];
        if self.running.is_none() {
            entries.push(Entry::Over { generation: self.generation });
        }
        if self.until_step.is_some() {
            entries.push(Entry::Until { step: self.until_step });
        }
        entries.push(Entry::Progress { step: self.step, saved_step: self.saved_step });
        entries.push(Entry::Retries(self.retries));
        let host_entry = |(host, record): (&String, &HostRecord)| {
            let HostRecord { failures, excluded } = *record;
            Entry::Host { host: host.clone(), failures, excluded }
        };
        entries.extend(self.hosts.iter().map(host_entry));
        entries
    }
}

/// What came before a coordinator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Past {
    /// All generations so far are over; the journal begins anew, and their numbers are not used again.
    Over {
        /// The newest one; 0 for none.
        generation: u64,
        /// Step of the newest checkpoint that is known to have been saved; 0 for none.
        saved_step: u64,
    },
    /// The newest generation may still run: the journal says which it is.
    MayRun,
}

/// The file, open for appending.
#[derive(Debug)]
pub struct Journal {
    path: PathBuf,
    file: File,
    bytes: u64,
    /// Length after the file was last written whole.
    whole_bytes: u64,
    memory: Memory,
    past: Past,
}

impl Journal {
    /// Opens a journal with what the past has left.
    ///
    /// Fails with kind `Storage` when the file cannot be read or written, and, where it is to be read, as [`Journal::read`] does.
    pub fn open(path: &Path, past: Past) -> Result<Self, Failure> {
        let memory = match past {
            Past::MayRun => Self::read(path)?,
            Past::Over { generation, saved_step } => Memory { generation, saved_step, ..Memory::default() },
        };
        let (file, bytes) = write_whole(path, &memory)?;
        Ok(Self { path: path.to_owned(), file, bytes, whole_bytes: bytes, memory, past })
    }

    /// What a journal says; nothing where there is none. Fails with kind `Storage` when the file cannot be read, and with `Damaged` when a
    /// line other than the last is not understood, or none is whole. A last line that was cut off is ignored: nobody acted on it.
    pub fn read(path: &Path) -> Result<Memory, Failure> {
        read(path)
    }

    /// Whether a generation of an earlier coordinator may still run.
    pub fn continues(&self) -> bool {
        self.past == Past::MayRun
    }

    /// What is known.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Adds a line, and returns when it is on the disk. Fails with kind `Storage`.
    pub fn record(&mut self, entry: Entry) -> Result<(), Failure> {
        self.append(entry)?;
        self.file.sync_data().map_err(|error| storage("force the journal to the disk", &self.path, &error))
    }

    /// Adds a line that may be lost with the machine, though not with this process. Fails with kind `Storage`.
    pub fn note(&mut self, entry: Entry) -> Result<(), Failure> {
        self.append(entry)
    }

    fn append(&mut self, entry: Entry) -> Result<(), Failure> {
        let line = line(&entry, &self.path)?;
        self.memory.apply(entry);
        if self.bytes + line.len() as u64 > MAX_JOURNAL_BYTES.max(2 * self.whole_bytes) {
            (self.file, self.bytes) = write_whole(&self.path, &self.memory)?;
            self.whole_bytes = self.bytes;
            return Ok(());
        }
        self.file.write_all(&line).map_err(|error| storage("write the journal", &self.path, &error))?;
        self.bytes += line.len() as u64;
        Ok(())
    }
}

fn read(path: &Path) -> Result<Memory, Failure> {
    let length = match fs::metadata(path) {
        Ok(metadata) => metadata.len(),
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Memory::default()),
        Err(error) => return Err(storage("read the journal", path, &error)),
    };
    if length > MAX_READ_BYTES {
        return Err(damaged(path, format!("{length} bytes")).expected(format!("at most {MAX_READ_BYTES} bytes")));
    }
    let bytes = fs::read(path).map_err(|error| storage("read the journal", path, &error))?;
    // It is never written without a whole line.
    if !bytes.contains(&b'\n') {
        return Err(damaged(path, format!("no whole line in {length} bytes")));
    }
    let mut memory = Memory::default();
    for (index, line) in bytes.split_inclusive(|byte| *byte == b'\n').enumerate() {
        match serde_json::from_slice(line) {
            Ok(entry) => memory.apply(entry),
            // A line is appended by one write, so only the last can be incomplete, and then it lacks its end.
            Err(_) if !line.ends_with(b"\n") => tracing::warn!(path = %path.display(), "the journal's last line was cut off"),
            Err(error) => return Err(damaged(path, format!("line {}: {error}", index + 1))),
        }
    }
    Ok(memory)
}

/// Writes what is known under another name first, so that the journal is whole at every moment.
fn write_whole(path: &Path, memory: &Memory) -> Result<(File, u64), Failure> {
    let failed = |error: &io::Error| storage("write the journal", path, error);
    let mut bytes = Vec::new();
    for entry in memory.entries() {
        bytes.extend(line(&entry, path)?);
    }
    let temporary = path.with_extension("jsonl.partial");
    let write = || -> io::Result<File> {
        let mut file = OpenOptions::new().create(true).write(true).truncate(true).open(&temporary)?;
        file.write_all(&bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(folder)?.sync_all()?;
        Ok(file)
    };
    let file = write().map_err(|error| failed(&error))?;
    Ok((file, bytes.len() as u64))
}

fn line(entry: &Entry, path: &Path) -> Result<Vec<u8>, Failure> {
    let mut line = serde_json::to_vec(entry)
        .map_err(|error| Failure::new(FailureKind::Storage, "failed to write the journal").at(path.display()).because(error))?;
    line.push(b'\n');
    Ok(line)
}

fn storage(what: &str, path: &Path, error: &io::Error) -> Failure {
    Failure::new(FailureKind::Storage, format!("failed to {what}")).at(path.display()).because(error)
}

fn damaged(path: &Path, found: String) -> Failure {
    Failure::new(FailureKind::Damaged, "the coordinator's journal is damaged")
        .at(path.display())
        .found(found)
        .hint("without the file, workers that still train are taken over all the same, by a new generation from their memory")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generation(generation: u64, members: &[u32]) -> Entry {
        let addresses = members.iter().map(|member| format!("127.0.0.1:{}", 9000 + member)).collect();
        Entry::Generation { generation, members: members.to_vec(), addresses }
    }

    fn entries() -> Vec<Entry> {
        vec![
            generation(1, &[0, 1, 2]),
            Entry::Over { generation: 1 },
            Entry::Host { host: "node-b".to_owned(), failures: 2, excluded: true },
            Entry::Retries(Retries { step: 17, attempts: 1 }),
            generation(2, &[0, 2]),
            Entry::Until { step: Some(30) },
            Entry::Progress { step: 20, saved_step: 10 },
        ]
    }

    fn written(path: &Path) -> Memory {
        let mut journal = Journal::open(path, Past::Over { generation: 0, saved_step: 0 }).unwrap();
        for entry in entries() {
            journal.record(entry).unwrap();
        }
        journal.memory().clone()
    }

    #[test]
    fn a_successor_knows_what_was_known() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        let memory = written(&path);
        assert_eq!((memory.generation, memory.step, memory.saved_step), (2, 20, 10));
        assert_eq!(memory.running.as_ref().unwrap().members, [0, 2]);
        assert_eq!(memory.running.as_ref().unwrap().addresses, ["127.0.0.1:9000", "127.0.0.1:9002"]);
        assert_eq!(memory.until_step, Some(30));
        assert!(memory.hosts["node-b"].excluded);
        assert_eq!(memory.retries.of(17), 1);
        for _ in 0..2 {
            assert_eq!(Journal::open(&path, Past::MayRun).unwrap().memory(), &memory);
        }
        let anew = Journal::open(&path, Past::Over { generation: 7, saved_step: 0 }).unwrap();
        assert_eq!(anew.memory(), &Memory { generation: 7, ..Memory::default() }, "only the numbers go on");
        assert_eq!(Journal::read(&path).unwrap().generation, 7);
        let names: Vec<_> = fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["journal.jsonl"], "nothing temporary is left");
    }

    #[test]
    fn the_end_of_a_generation_is_remembered() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        written(&path);
        let mut journal = Journal::open(&path, Past::MayRun).unwrap();
        journal.record(Entry::Over { generation: 1 }).unwrap();
        assert!(journal.memory().running.is_some(), "word of an older generation");
        journal.record(Entry::Over { generation: 2 }).unwrap();
        drop(journal);
        let memory = Journal::open(&path, Past::MayRun).unwrap().memory().clone();
        assert_eq!((memory.generation, memory.running), (2, None));
    }

    #[test]
    fn a_line_that_was_cut_off_is_ignored_and_damage_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        let memory = written(&path);
        let good = fs::read(&path).unwrap();
        fs::write(&path, [good.as_slice(), b"{\"entry\":\"generation\",\"gener"].concat()).unwrap();
        let mut journal = Journal::open(&path, Past::MayRun).unwrap();
        assert_eq!(journal.memory(), &memory);
        journal.record(Entry::Over { generation: 2 }).unwrap();
        assert_eq!(Journal::open(&path, Past::MayRun).unwrap().memory().running, None, "the cut line does not spoil the next");

        fs::write(&path, [b"{\"entry\":\"gener\n".as_slice(), good.as_slice()].concat()).unwrap();
        let before = fs::read(&path).unwrap();
        assert_eq!(Journal::read(&path).unwrap_err().kind, FailureKind::Damaged);
        assert_eq!(fs::read(&path).unwrap(), before);
        let failure = Journal::open(&path, Past::MayRun).unwrap_err();
        assert_eq!(failure.kind, FailureKind::Damaged);
        assert!(failure.found.as_ref().unwrap().starts_with("line 1: "), "{failure}");
        for cut in [b"".as_slice(), b"{\"entry\":"] {
            fs::write(&path, cut).unwrap();
            let found = Journal::read(&path).unwrap_err().found;
            assert_eq!(found, Some(format!("no whole line in {} bytes", cut.len())));
        }
    }

    #[test]
    fn a_missing_journal_is_an_empty_one_and_a_missing_folder_a_failure() {
        let folder = tempfile::tempdir().unwrap();
        assert_eq!(Journal::open(&folder.path().join("journal.jsonl"), Past::MayRun).unwrap().memory(), &Memory::default());
        let failure = Journal::open(&folder.path().join("nowhere").join("journal.jsonl"), Past::MayRun).unwrap_err();
        assert_eq!(failure.kind, FailureKind::Storage);
    }

    #[test]
    fn the_file_is_bounded() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("journal.jsonl");
        let mut journal = Journal::open(&path, Past::Over { generation: 0, saved_step: 0 }).unwrap();
        let members: Vec<u32> = (0..4_000).collect();
        for number in 1..=30 {
            journal.note(generation(number, &members)).unwrap();
        }
        let length = fs::metadata(&path).unwrap().len();
        assert!(length <= MAX_JOURNAL_BYTES, "{length}");
        let memory = journal.memory().clone();
        drop(journal);
        assert_eq!(Journal::open(&path, Past::MayRun).unwrap().memory(), &memory);
        assert_eq!(memory.generation, 30);
    }
}
