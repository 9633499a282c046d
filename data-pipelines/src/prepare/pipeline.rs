//! The first pass: threads that read, threads that tokenise, and one that writes parts.
//!
//! ```text
//! readers (cloze-read-n)  -- chunks -->  workers (cloze-encode-n)  -- samples -->  caller: parts
//!      ^------------------------------ tickets ------------------------------------------'
//! ```
//!
//! A reader needs a ticket for each chunk, and the caller gives it back once the chunk's samples are written. The number of
//! tickets therefore bounds all queues. When a thread stops, for an error or at the end, its channels close and the others follow.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZero;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;

use anyhow::Context;
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::DataRecipe;
use regex::RegexSet;

use super::parts::{Part, PartWriter, part_path};
use super::sample::{SampleEncoder, TailMemory, Verdict};
use super::tasks::TaskTable;
use crate::record::{Chunk, Input, Record, RecordReader};

/// Files that are read at the same time; more than one so that small objects in a bucket do not wait for each other.
const MAX_READERS: usize = 4;
/// Chunks under way for each worker: one being worked on, one waiting.
const TICKETS_PER_WORKER: usize = 2;

/// Which records are kept away, by name.
pub(super) struct HoldOut {
    only: RegexSet,
    tasks: RegexSet,
    templates: RegexSet,
}

impl HoldOut {
    /// Compiles the patterns of a recipe.
    pub(super) fn new(data: &DataRecipe) -> Result<Self, Failure> {
        Ok(Self {
            only: patterns("data.only", &data.only)?,
            tasks: patterns("data.hold_out", &data.hold_out)?,
            templates: patterns("data.hold_out_templates", &data.hold_out_templates)?,
        })
    }

    /// Whether a task is kept away: held out, or not among the only ones.
    fn task(&self, name: &str) -> bool {
        self.tasks.is_match(name) || (!self.only.is_empty() && !self.only.is_match(name))
    }
}

fn patterns(key: &str, patterns: &[String]) -> Result<RegexSet, Failure> {
    RegexSet::new(patterns).map_err(|error| {
        Failure::new(FailureKind::Recipe, "not a regular expression").at(key).because(error).hint("escape special characters with `\\`")
    })
}

/// All that the threads of the first pass share.
pub(super) struct Job<'a> {
    pub(super) inputs: &'a [Input],
    /// Key of each input's part.
    pub(super) part_keys: &'a [String],
    pub(super) parts_folder: &'a Path,
    pub(super) encoder: &'a SampleEncoder<'a>,
    pub(super) hold_out: &'a HoldOut,
}

/// The samples of some records.
#[derive(Default)]
pub(super) struct ChunkSamples {
    pub(super) tasks: TaskTable,
    pub(super) rows: Vec<Row>,
    /// Tokens of all rows, one after the other.
    pub(super) tokens: Vec<u32>,
}

/// One sample of a chunk.
pub(super) struct Row {
    pub(super) task: u32,
    pub(super) answer_position: u32,
    pub(super) num_tokens: u32,
}

/// What the caller hears from time to time.
pub(super) struct Step {
    /// Records of a chunk.
    pub(super) records: u64,
    /// Samples of a chunk.
    pub(super) samples: u64,
    /// An input, by its number, whose part is now finished.
    pub(super) finished: Option<(usize, Part)>,
}

struct Work {
    file: usize,
    sequence: u64,
    payload: anyhow::Result<Payload>,
}

enum Payload {
    Chunk(Chunk),
    /// The file is read; its hash.
    End(String),
}

struct Done {
    file: usize,
    sequence: u64,
    outcome: anyhow::Result<Outcome>,
}

enum Outcome {
    Samples(ChunkSamples),
    End(String),
}

/// What the readers take from.
struct Queue<'a> {
    pending: &'a [usize],
    next: AtomicUsize,
    tickets: Mutex<Receiver<()>>,
}

/// Reads the inputs with the given numbers and writes their parts. Fails with the first error of the file that has one;
/// parts that are finished by then stay.
pub(super) fn read_inputs(job: &Job<'_>, pending: &[usize], report: &mut dyn FnMut(Step)) -> anyhow::Result<()> {
    let num_workers = thread::available_parallelism().map_or(1, NonZero::get);
    let num_readers = pending.len().min(MAX_READERS);
    let num_tickets = TICKETS_PER_WORKER * num_workers + num_readers;
    let (give_ticket, tickets) = sync_channel(num_tickets);
    for _ in 0..num_tickets {
        give_ticket.send(()).context("fill the tickets")?;
    }
    let queue = Queue { pending, next: AtomicUsize::new(0), tickets: Mutex::new(tickets) };
    let (send_work, work) = channel();
    let (send_done, done) = channel();
    let work = Mutex::new(work);
    thread::scope(|scope| {
        for number in 0..num_readers {
            let (sender, queue) = (send_work.clone(), &queue);
            let thread = thread::Builder::new().name(format!("cloze-read-{number}"));
            thread.spawn_scoped(scope, move || read_files(job, queue, &sender)).context("start a reader thread")?;
        }
        for number in 0..num_workers {
            let (sender, work) = (send_done.clone(), &work);
            let thread = thread::Builder::new().name(format!("cloze-encode-{number}"));
            thread.spawn_scoped(scope, move || encode_chunks(job, work, &sender)).context("start a worker thread")?;
        }
        drop((send_work, send_done));
        let result = write_parts(job, pending.len(), &done, &give_ticket, report);
        // Closed channels make the threads stop, also when something failed.
        drop((done, give_ticket));
        result
    })
}

fn read_files(job: &Job<'_>, queue: &Queue<'_>, sender: &Sender<Work>) {
    while let Some(&file) = queue.pending.get(queue.next.fetch_add(1, Ordering::Relaxed)) {
        let mut sequence = 0;
        let mut send = |payload| {
            let has_ticket = lock(&queue.tickets).recv().is_ok();
            let sent = has_ticket && sender.send(Work { file, sequence, payload }).is_ok();
            sequence += 1;
            sent
        };
        if !read_file(job, file, &mut send) {
            return;
        }
    }
}

/// Sends the chunks of a file, then its hash or an error; false when there is nobody to go on for.
fn read_file(job: &Job<'_>, file: usize, send: &mut dyn FnMut(anyhow::Result<Payload>) -> bool) -> bool {
    let mut reader = match RecordReader::open(&job.inputs[file], job.parts_folder) {
        Ok(reader) => reader,
        Err(error) => {
            send(Err(error));
            return false;
        }
    };
    loop {
        let payload = match reader.next_chunk() {
            Ok(Some(chunk)) => Ok(Payload::Chunk(chunk)),
            Ok(None) => return send(Ok(Payload::End(reader.content_hash()))),
            Err(error) => Err(error),
        };
        let failed = payload.is_err();
        if !send(payload) || failed {
            return false;
        }
    }
}

fn encode_chunks(job: &Job<'_>, work: &Mutex<Receiver<Work>>, sender: &Sender<Option<Done>>) {
    let _alarm = Alarm(sender);
    let mut memory = TailMemory::default();
    loop {
        let received = lock(work).recv();
        let Ok(Work { file, sequence, payload }) = received else { return };
        let outcome = payload.and_then(|payload| match payload {
            Payload::Chunk(chunk) => samples_of(job, &job.inputs[file], &chunk, &mut memory).map(Outcome::Samples),
            Payload::End(hash) => Ok(Outcome::End(hash)),
        });
        if sender.send(Some(Done { file, sequence, outcome })).is_err() {
            return;
        }
    }
}

/// Tells the caller that a worker panicked; it would wait for the chunk that went with it.
struct Alarm<'a>(&'a Sender<Option<Done>>);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            let _ = self.0.send(None);
        }
    }
}

fn samples_of(job: &Job<'_>, input: &Input, chunk: &Chunk, memory: &mut TailMemory) -> anyhow::Result<ChunkSamples> {
    let mut samples = ChunkSamples::default();
    let mut held_out = Vec::new();
    chunk.for_each(&input.url, |record| {
        let name = record.task.as_deref().unwrap_or(&input.default_task);
        let task = samples.tasks.id(name, record.source.as_deref());
        if task as usize == held_out.len() {
            held_out.push(job.hold_out.task(name));
        }
        add(job, &mut samples, (task, held_out[task as usize]), record, memory)
    })?;
    Ok(samples)
}

fn add(job: &Job<'_>, samples: &mut ChunkSamples, task: (u32, bool), record: &Record<'_>, memory: &mut TailMemory) -> anyhow::Result<()> {
    let (task, held_out) = task;
    let counts = &mut samples.tasks.entries[task as usize].counts;
    counts.read += 1;
    if held_out {
        counts.held_out += 1;
        return Ok(());
    }
    if record.template.as_deref().is_some_and(|template| job.hold_out.templates.is_match(template)) {
        counts.held_out_template += 1;
        return Ok(());
    }
    match job.encoder.encode(&record.inputs, &record.targets, memory)? {
        Verdict::NotSingleToken => counts.not_single_token += 1,
        Verdict::TooLong => counts.too_long += 1,
        Verdict::Sample { tokens, answer_position, truncated } => {
            counts.truncated += u64::from(truncated);
            counts.kept += 1;
            samples.rows.push(Row { task, answer_position, num_tokens: tokens.len() as u32 });
            samples.tokens.extend(tokens);
        }
    }
    Ok(())
}

/// A part that is being written; chunks that come before their turn wait.
struct Unfinished {
    writer: PartWriter,
    next: u64,
    waiting: BTreeMap<u64, anyhow::Result<Outcome>>,
}

fn write_parts(
    job: &Job<'_>,
    num_files: usize,
    done: &Receiver<Option<Done>>,
    give_ticket: &SyncSender<()>,
    report: &mut dyn FnMut(Step),
) -> anyhow::Result<()> {
    let mut unfinished: HashMap<usize, Unfinished> = HashMap::new();
    let mut num_finished = 0;
    while num_finished < num_files {
        let received = done.recv().context("a thread of the preparation stopped early")?;
        let Done { file, sequence, outcome } = received.context("a thread of the preparation panicked")?;
        let mut part = if let Some(part) = unfinished.remove(&file) {
            part
        } else {
            let writer = PartWriter::create(part_path(job.parts_folder, &job.part_keys[file]))?;
            Unfinished { writer, next: 0, waiting: BTreeMap::new() }
        };
        part.waiting.insert(sequence, outcome);
        match part.write_waiting(give_ticket, report)? {
            None => drop(unfinished.insert(file, part)),
            Some(hash) => {
                let finished = Some((file, part.writer.finish(hash)?));
                num_finished += 1;
                report(Step { records: 0, samples: 0, finished });
            }
        }
    }
    Ok(())
}

impl Unfinished {
    /// Writes the chunks whose turn it is; the file's hash when they are all written.
    fn write_waiting(&mut self, give_ticket: &SyncSender<()>, report: &mut dyn FnMut(Step)) -> anyhow::Result<Option<String>> {
        while let Some(outcome) = self.waiting.remove(&self.next) {
            self.next += 1;
            let samples = match outcome? {
                Outcome::Samples(samples) => samples,
                Outcome::End(hash) => {
                    give_ticket.send(()).context("give a ticket back")?;
                    return Ok(Some(hash));
                }
            };
            self.writer.append(&samples)?;
            give_ticket.send(()).context("give a ticket back")?;
            let records = samples.tasks.entries.iter().map(|task| task.counts.read).sum();
            report(Step { records, samples: samples.rows.len() as u64, finished: None });
        }
        Ok(None)
    }
}

/// A thread that panicked takes the others down with the scope anyway, so that a poisoned lock needs no second panic.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
