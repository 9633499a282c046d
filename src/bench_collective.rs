//! Times the all-reduce of the local ring between processes on this machine, one JSON line for each size.
//!
//! Every rank is a process of its own, as the workers of a run are. The parent starts them, tells them each other's addresses, and passes on what rank 0
//! prints. `algbw` is bytes divided by time; `busbw` is that times 2 (n - 1) / n, the usual figure of a ring.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpListener;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use cloze_cluster::secret::Secret;
use serde_json::{Value, json};

use crate::collective::Collective;
use crate::collective::local::{Ring, RingOptions};

/// Longest time to form the ring, and longest time without progress in it.
const TIMEOUT_S: u64 = 60;
/// Without a number of repetitions, each size moves about this much: enough that the median is steady.
const VOLUME_MIB: u64 = 512;
const REPEATS_MIN: u64 = 3;
const REPEATS_MAX: u64 = 50;
const FLOATS_PER_MIB: usize = 1 << 18;
const BYTES_PER_MIB: f64 = 1_048_576.0;

/// What is timed.
#[derive(Clone, Debug)]
pub struct CollectiveBenchOptions {
    /// Number of processes.
    pub ranks: usize,
    /// Sizes of the vectors.
    pub mib: Vec<u64>,
    /// Timed operations of each size; without it, as many as move a fixed volume.
    pub repeat: Option<u64>,
    /// The rank that this process is; without it, it starts all of them.
    pub rank: Option<usize>,
}

/// Starts the ranks, or is one of them.
pub fn run(options: &CollectiveBenchOptions) -> Result<()> {
    ensure!(options.ranks > 0 && !options.mib.contains(&0), "expected at least one rank and sizes of at least 1 MiB");
    match options.rank {
        None => lead(options),
        Some(rank) => take_part(options, rank),
    }
}

/// The parent: starts all ranks, introduces them to each other, and prints what rank 0 measures.
fn lead(options: &CollectiveBenchOptions) -> Result<()> {
    let mut ranks = (0..options.ranks).map(|rank| RankProcess::start(options, rank)).collect::<Result<Vec<_>>>()?;
    let addresses = ranks.iter_mut().map(RankProcess::line).collect::<Result<Vec<_>>>()?;
    let introduction = format!("{} {}\n", Secret::random()?.expose(), addresses.join(" "));
    for rank in &mut ranks {
        let stdin = rank.process.stdin.as_mut().context("reach a rank's input")?;
        stdin.write_all(introduction.as_bytes()).context("introduce the ranks to each other")?;
    }
    let mut stdout = std::io::stdout().lock();
    for _ in &options.mib {
        writeln!(stdout, "{}", ranks[0].line()?).context("print the figures")?;
    }
    for (rank, process) in ranks.iter_mut().enumerate() {
        let status = process.process.wait().with_context(|| format!("wait for rank {rank}"))?;
        ensure!(status.success(), "rank {rank} ended with {status}");
    }
    Ok(())
}

/// A child: one rank of the ring.
fn take_part(options: &CollectiveBenchOptions, rank: usize) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").context("open the rank's socket")?;
    let mut stdout = std::io::stdout().lock();
    writeln!(stdout, "{}", listener.local_addr().context("read the rank's address")?).context("tell the rank's address")?;
    let mut introduction = String::new();
    std::io::stdin().read_line(&mut introduction).context("read the addresses of the ranks")?;
    let mut words = introduction.split_whitespace().map(str::to_owned);
    let key = words.next().context("read the key of the ring")?;
    let peers: Vec<String> = words.collect();
    let timeout = Duration::from_secs(TIMEOUT_S);
    let interrupt = Arc::new(AtomicBool::new(false));
    let mut ring = Ring::connect(RingOptions { listener, rank, peers, key, generation: 1, timeout, interrupt })?;
    for mib in &options.mib {
        let median_s = time(&mut ring, *mib, options.repeat.unwrap_or_else(|| repeats(*mib)))?;
        if rank == 0 {
            writeln!(stdout, "{}", figures(options.ranks, *mib, median_s)).context("print the figures")?;
        }
    }
    Ok(())
}

/// Median time of an all-reduce, in seconds, after one that is not counted.
fn time(ring: &mut Ring, mib: u64, repeats: u64) -> Result<f64> {
    let mut data = vec![1.0_f32; mib as usize * FLOATS_PER_MIB];
    ring.all_reduce_sum(&mut data)?;
    let mut times = Vec::new();
    for _ in 0..repeats.max(1) {
        ring.barrier()?;
        let started = Instant::now();
        ring.all_reduce_sum(&mut data)?;
        times.push(started.elapsed());
    }
    times.sort_unstable();
    Ok(times[times.len() / 2].as_secs_f64())
}

/// How often a size is timed, where nobody says it.
fn repeats(mib: u64) -> u64 {
    (VOLUME_MIB / mib).clamp(REPEATS_MIN, REPEATS_MAX)
}

fn figures(ranks: usize, mib: u64, median_s: f64) -> Value {
    let rounded = |value: f64, digits: i32| (value * 10_f64.powi(digits)).round() / 10_f64.powi(digits);
    let gb_per_second = mib as f64 * BYTES_PER_MIB / median_s / 1e9;
    let on_the_bus = gb_per_second * 2.0 * (ranks - 1) as f64 / ranks as f64;
    json!({
        "backend": "cloze-local",
        "ranks": ranks,
        "mib": mib,
        "median_ms": rounded(1e3 * median_s, 2),
        "algbw_gb_s": rounded(gb_per_second, 3),
        "busbw_gb_s": rounded(on_the_bus, 3),
    })
}

/// A rank's process, which does not outlive this one's interest in it.
struct RankProcess {
    process: Child,
    stdout: BufReader<ChildStdout>,
}

impl RankProcess {
    fn start(options: &CollectiveBenchOptions, rank: usize) -> Result<Self> {
        let sizes: Vec<String> = options.mib.iter().map(u64::to_string).collect();
        let mut command = Command::new(std::env::current_exe().context("find this program")?);
        command.args(["bench-collective", "--ranks", &options.ranks.to_string(), "--mib", &sizes.join(",")]);
        if let Some(repeat) = options.repeat {
            command.args(["--repeat", &repeat.to_string()]);
        }
        command.args(["--rank", &rank.to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = command.spawn().with_context(|| format!("start rank {rank}"))?;
        let stdout = BufReader::new(process.stdout.take().context("reach a rank's output")?);
        Ok(Self { process, stdout })
    }

    /// The next line that the rank prints.
    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        let count = self.stdout.read_line(&mut line).context("read a rank's output")?;
        ensure!(count > 0, "a rank ended without its figures; what it says stands above");
        Ok(line.trim_end().to_owned())
    }
}

impl Drop for RankProcess {
    fn drop(&mut self) {
        // A rank that has ended cannot be killed, and is waited for at once.
        drop(self.process.kill());
        drop(self.process.wait());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_figures_of_the_baseline() {
        let line = figures(4, 16, 0.008_388_608).to_string();
        assert_eq!(line, r#"{"backend":"cloze-local","ranks":4,"mib":16,"median_ms":8.39,"algbw_gb_s":2.0,"busbw_gb_s":3.0}"#);
    }

    #[test]
    fn small_sizes_are_timed_often_and_large_ones_at_least_a_few_times() {
        assert_eq!([1, 16, 256, 4096].map(repeats), [50, 32, 3, 3]);
    }

    #[test]
    fn a_ring_of_one_is_timed_too() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peers = vec![listener.local_addr().unwrap().to_string()];
        let (timeout, interrupt) = (Duration::from_secs(TIMEOUT_S), Arc::new(AtomicBool::new(false)));
        let key = "key".to_owned();
        let mut ring = Ring::connect(RingOptions { listener, rank: 0, peers, key, generation: 1, timeout, interrupt }).unwrap();
        assert!(time(&mut ring, 1, 0).unwrap() >= 0.0);
    }
}
