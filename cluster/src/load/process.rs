//! What Linux says about a process, and what a load test needs of it: file descriptors, a core of its own, memory, processor time.

use std::ffi::OsString;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Context as _;
use cloze_recipes::failure::{Failure, FailureKind};

/// Binds a process to cores; part of util-linux.
pub(super) const PINNING_PROGRAM: &str = "taskset";

/// File descriptors that a process needs besides one for each worker.
const OTHER_DESCRIPTORS: u64 = 256;

/// Clock ticks per second of /proc. Linux has shown 100 to programs on every architecture for decades, whatever the kernel counts in.
const TICKS_PER_S: f64 = 100.0;

/// Raises the soft limit of file descriptors, then becomes the program.
const RAISE_SCRIPT: &str = r#"ulimit -S -n "$1" && shift && exec "$@""#;

/// Which cores the two sides of a load test run on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The coordinator's.
    pub coordinator: usize,
    /// The pretended workers'; a list as `taskset -c` takes it.
    pub workers: String,
}

impl Placement {
    /// The first core for the coordinator and the others for the workers; `None` where there is only one core or no program to bind with.
    pub fn of_this_machine() -> anyhow::Result<Option<Self>> {
        let status = fs::read_to_string("/proc/self/status").context("read /proc/self/status")?;
        let cores = status.lines().find_map(|line| line.strip_prefix("Cpus_allowed_list:")).map(cores).unwrap_or_default();
        let [coordinator, workers @ ..] = cores.as_slice() else { return Ok(None) };
        if workers.is_empty() || !can_pin() {
            return Ok(None);
        }
        let workers = workers.iter().map(usize::to_string).collect::<Vec<_>>().join(",");
        Ok(Some(Self { coordinator: *coordinator, workers }))
    }
}

/// A command that runs a program with enough file descriptors for so many workers, on the workers' cores.
///
/// Fails with kind `Environment` when the system allows fewer file descriptors.
pub fn prepared_command(program: &Path, arguments: &[OsString], workers: u32, placement: Option<&Placement>) -> anyhow::Result<Command> {
    let needed = needed_descriptors(workers);
    let (_, hard) = descriptor_limits()?;
    if hard < needed {
        return Err(too_few(needed, hard).into());
    }
    let mut command = Command::new("sh");
    command.arg("-c").arg(RAISE_SCRIPT).arg("sh").arg(needed.to_string());
    if let Some(placement) = placement {
        command.arg(PINNING_PROGRAM).arg("-c").arg(&placement.workers);
    }
    command.arg(program).args(arguments);
    Ok(command)
}

/// Fails with kind `Environment` when this process may not open a connection for each of so many workers.
pub(super) fn check_descriptors(workers: u32) -> anyhow::Result<()> {
    let (soft, _) = descriptor_limits()?;
    let needed = needed_descriptors(workers);
    if soft < needed { Err(too_few(needed, soft).into()) } else { Ok(()) }
}

/// Bytes of memory that a process has at the moment.
pub(super) fn resident_bytes(process_id: u32) -> anyhow::Result<u64> {
    let path = format!("/proc/{process_id}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    resident_of(&status).with_context(|| format!("find VmRSS in {path}"))
}

/// Processor seconds that a process has used, in its own code and in the kernel.
pub(super) fn processor_seconds(process_id: u32) -> anyhow::Result<f64> {
    let path = format!("/proc/{process_id}/stat");
    let stat = fs::read_to_string(&path).with_context(|| format!("read {path}"))?;
    Ok(ticks_of(&stat).with_context(|| format!("find the processor time in {path}"))? as f64 / TICKS_PER_S)
}

fn needed_descriptors(workers: u32) -> u64 {
    u64::from(workers) + OTHER_DESCRIPTORS
}

fn too_few(needed: u64, allowed: u64) -> Failure {
    Failure::new(FailureKind::Environment, "a process may not open enough files for so many workers")
        .expected(format!("at least {needed} file descriptors"))
        .found(allowed)
        .hint(format!("raise the limit with `ulimit -H -n {needed}` as root, or take fewer workers"))
}

fn can_pin() -> bool {
    let version = Command::new(PINNING_PROGRAM).arg("--version").stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status();
    version.is_ok_and(|status| status.success())
}

/// Soft and hard limit of open files.
fn descriptor_limits() -> anyhow::Result<(u64, u64)> {
    let limits = fs::read_to_string("/proc/self/limits").context("read /proc/self/limits")?;
    limits_of(&limits).context("find the limit of open files in /proc/self/limits")
}

fn limits_of(limits: &str) -> Option<(u64, u64)> {
    let line = limits.lines().find_map(|line| line.strip_prefix("Max open files"))?;
    let mut numbers = line.split_whitespace().map(|word| if word == "unlimited" { Some(u64::MAX) } else { word.parse().ok() });
    Some((numbers.next()??, numbers.next()??))
}

fn resident_of(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// User and system time, fields 14 and 15. The name in parentheses may hold blanks, so counting starts behind it, at field 3.
fn ticks_of(stat: &str) -> Option<u64> {
    let (_, fields) = stat.rsplit_once(')')?;
    let mut times = fields.split_whitespace().skip(11).map(|field| field.parse::<u64>().ok());
    Some(times.next()?? + times.next()??)
}

/// Cores of a list such as `0-3,8`; what is not understood is left out.
fn cores(list: &str) -> Vec<usize> {
    list.trim()
        .split(',')
        .filter_map(|range| {
            let (first, last) = range.split_once('-').unwrap_or((range, range));
            Some(first.parse::<usize>().ok()?..=last.parse::<usize>().ok()?)
        })
        .flatten()
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_of_cores_are_read() {
        assert_eq!(cores("\t0-3,8,10-11\n"), [0, 1, 2, 3, 8, 10, 11]);
        assert_eq!(cores("5"), [5]);
        assert!(cores("").is_empty());
    }

    #[test]
    fn limits_memory_and_time_are_read() {
        let limits = "Limit                     Soft Limit           Hard Limit           Units     \n\
                      Max processes             95957                95957                processes \n\
                      Max open files            1024                 unlimited            files     \n";
        assert_eq!(limits_of(limits), Some((1024, u64::MAX)));
        assert_eq!(resident_of("Name:\tcloze\nVmRSS:\t    2048 kB\n"), Some(2 << 20));
        let stat = "77 (a (b) c) S 1 77 77 0 -1 4194560 500 0 0 0 130 45 0 0 20 0 3 0 100 0 0";
        assert_eq!(ticks_of(stat), Some(175));
    }

    #[test]
    fn this_process_has_memory_and_limits() {
        let process_id = std::process::id();
        assert!(resident_bytes(process_id).unwrap() > 100 << 10);
        assert!(processor_seconds(process_id).unwrap() >= 0.0);
        let (soft, hard) = descriptor_limits().unwrap();
        assert!(soft > 0 && soft <= hard);
    }

    #[test]
    fn a_prepared_program_has_its_descriptors_and_arguments() {
        let arguments: [OsString; 4] = ["-c".into(), "ulimit -S -n; echo \"$1\"".into(), "sh".into(), "two words".into()];
        let output = prepared_command(Path::new("sh"), &arguments, 7, None).unwrap().output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), "263\ntwo words\n");
    }

    #[test]
    fn too_many_workers_are_refused_with_both_numbers() {
        let failure = too_few(10_256, 1024);
        assert_eq!(failure.kind, FailureKind::Environment);
        assert_eq!((failure.expected.as_deref(), failure.found.as_deref()), (Some("at least 10256 file descriptors"), Some("1024")));
    }
}
