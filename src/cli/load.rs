//! `cloze bench-coordinator`: how one coordinator holds up under thousands of workers.
//!
//! The command starts itself twice: once with enough file descriptors, on the cores of the pretended workers, and from there once more
//! as the coordinator, on a core of its own.

use std::ffi::OsString;
use std::io::{BufReader, Write};
use std::os::unix::process::CommandExt as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Args;
use cloze_cluster::load::{LoadOptions, LoadReport, Placement, measure, prepared_command, serve};
use cloze_recipes::failure::{Failure, FailureKind};
use comfy_table::{CellAlignment, Table, presets};

/// Name of the subcommand, under which it starts itself.
const COMMAND: &str = "bench-coordinator";

/// Arguments of `cloze bench-coordinator`.
#[derive(Args)]
pub struct LoadArguments {
    /// Number of workers that are pretended
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=i64::from(cloze_cluster::load::MAX_WORKERS)))]
    pub workers: u32,
    /// Seconds in which heartbeats are measured
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(2..=3600))]
    pub seconds: u64,
    /// Secure the connections by TLS, as `cluster.tls` does
    #[arg(long)]
    pub tls: bool,
    /// Print one line of JSON
    #[arg(long)]
    pub json: bool,
    /// What this process is; chosen by the command itself
    #[arg(long, hide = true, value_enum, default_value_t = LoadRole::Outer)]
    pub role: LoadRole,
    /// Core of the coordinator; chosen by the command itself
    #[arg(long, hide = true)]
    pub coordinator_cpu: Option<usize>,
}

/// The three processes of a load test.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum LoadRole {
    /// As typed by a user.
    Outer,
    /// Has enough file descriptors and pretends to be the workers.
    Workers,
    /// Runs the coordinator.
    Coordinator,
}

/// Measures a coordinator.
pub fn bench_coordinator(arguments: &LoadArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    match arguments.role {
        LoadRole::Outer => prepare(arguments),
        LoadRole::Workers => {
            let report = measure(&options(arguments)?)?;
            let text = if arguments.json { serde_json::to_string(&report).context("write the report as JSON")? } else { table(&report) };
            writeln!(stdout, "{text}").context("print the report")?;
            Ok(ExitCode::SUCCESS)
        }
        LoadRole::Coordinator => {
            serve(arguments.workers, BufReader::new(std::io::stdin()), stdout)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Becomes the process of the workers; returns only when that fails.
fn prepare(arguments: &LoadArguments) -> Result<ExitCode> {
    let placement = Placement::of_this_machine()?;
    let mut own = own_arguments(arguments.workers, "workers");
    own.extend(["--seconds".into(), arguments.seconds.to_string().into()]);
    for (flag, is_set) in [("--tls", arguments.tls), ("--json", arguments.json)] {
        if is_set {
            own.push(flag.into());
        }
    }
    if let Some(placement) = &placement {
        own.extend(["--coordinator-cpu".into(), placement.coordinator.to_string().into()]);
    }
    let program = std::env::current_exe().context("find this program")?;
    let error = prepared_command(&program, &own, arguments.workers, placement.as_ref())?.exec();
    Err(Failure::new(FailureKind::Environment, "the load test cannot be started").because(error).into())
}

fn options(arguments: &LoadArguments) -> Result<LoadOptions> {
    Ok(LoadOptions {
        workers: arguments.workers,
        tls: arguments.tls,
        measured: Duration::from_secs(arguments.seconds),
        program: std::env::current_exe().context("find this program")?,
        arguments: own_arguments(arguments.workers, "coordinator"),
        coordinator_cpu: arguments.coordinator_cpu,
    })
}

/// Arguments with which the command starts itself in a role.
fn own_arguments(workers: u32, role: &str) -> Vec<OsString> {
    vec![COMMAND.into(), "--workers".into(), workers.to_string().into(), "--role".into(), role.into()]
}

fn table(report: &LoadReport) -> String {
    let mut table = Table::new();
    table
        .load_style(presets::UTF8_HORIZONTAL_ONLY)
        .set_header(["coordinator under load".to_owned(), format!("{} workers", report.workers)]);
    let core = report.coordinator_cpu.map_or_else(|| "any".to_owned(), |cpu| cpu.to_string());
    let mebibytes = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1_u32 << 20));
    let rows = [
        ("connections", if report.tls { "by TLS" } else { "in clear" }.to_owned()),
        ("core of the coordinator", core),
        ("all joined after", format!("{:.2} s", report.joined_s)),
        ("all told to start after", format!("{:.2} s", report.started_s)),
        ("heartbeats answered", format!("{} in {:.1} s", report.answers, report.measured_s)),
        ("answer took, median", format!("{:.2} ms", report.latency_p50_ms)),
        ("answer took, 99th percentile", format!("{:.2} ms", report.latency_p99_ms)),
        ("answer took, longest", format!("{:.2} ms", report.latency_max_ms)),
        ("questions left out, as one was open", report.late.to_string()),
        ("memory before", mebibytes(report.resident_before_bytes)),
        ("memory with all workers", mebibytes(report.resident_after_bytes)),
        ("memory per worker", format!("{:.1} KiB", report.resident_bytes_per_worker / 1024.0)),
        ("processor seconds until all started", format!("{:.2} s", report.processor_start_s)),
        ("share of one core afterwards", format!("{:.1} %", report.processor_share * 100.0)),
    ];
    for (name, value) in rows {
        table.add_row([name.to_owned(), value]);
    }
    for column in table.column_iter_mut().skip(1) {
        column.set_cell_alignment(CellAlignment::Right);
    }
    table.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn report() -> LoadReport {
        LoadReport {
            workers: 10_000,
            tls: true,
            coordinator_cpu: Some(0),
            joined_s: 4.25,
            started_s: 6.5,
            measured_s: 30.0,
            answers: 299_900,
            late: 3,
            latency_p50_ms: 0.4,
            latency_p99_ms: 2.5,
            latency_max_ms: 40.0,
            resident_before_bytes: 10 << 20,
            resident_after_bytes: 210 << 20,
            resident_bytes_per_worker: 20_971.52,
            processor_start_s: 5.0,
            processor_share: 0.125,
        }
    }

    #[test]
    fn a_report_reads_well() {
        let text = table(&report());
        for (name, value) in [
            ("connections", "by TLS"),
            ("all joined after", "4.25 s"),
            ("answer took, 99th percentile", "2.50 ms"),
            ("memory with all workers", "210.0 MiB"),
            ("memory per worker", "20.5 KiB"),
            ("share of one core afterwards", "12.5 %"),
        ] {
            assert!(text.lines().any(|line| line.contains(name) && line.contains(value)), "{name}: {text}");
        }
        assert!(table(&LoadReport { tls: false, ..report() }).contains("in clear"));
    }

    #[test]
    fn the_command_starts_itself_in_a_role() {
        let expected: Vec<OsString> = ["bench-coordinator", "--workers", "7", "--role", "workers"].map(OsString::from).to_vec();
        assert_eq!(own_arguments(7, "workers"), expected);
    }
}
