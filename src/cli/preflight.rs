//! `cloze preflight`: checks the machines of an allocation before step 0, and the agent that it starts on each of them.

use std::io::{Read as _, Write};
use std::path::Path;
use std::process::{Child, Command, ExitCode, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use cloze_cluster::Secret;
use cloze_launcher::RunPaths;
use cloze_launcher::hosts::{CommandForm, RemoteHost};
use cloze_launcher::preflight::{AgentTools, DeviceMeasurement, NodeOptions, PreflightOptions, PreflightReport, Setup};
use cloze_launcher::preflight::{run_agent, run_preflight};
use cloze_launcher::run_folder::{read_info, read_recipe};
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::recipe::{Device, Precision, Recipe};
use cloze_recipes::site::Preflight;
use comfy_table::{Table, presets};

use super::places::{open_place, try_place};
use super::run::RUNS_FOLDER;
use super::worker_process::worker_binary;

/// What stands for a node's name in `--launch`.
const NODE_PLACE: &str = "{node}";
/// Interval at which the device check is looked at.
const POLL: Duration = Duration::from_millis(20);

/// Arguments of `cloze preflight`.
#[derive(Args)]
pub struct PreflightArguments {
    /// Run folder, or recipe file
    pub target: std::path::PathBuf,
    /// Change a value of a recipe; not for a run
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub overrides: Vec<String>,
    /// Nodes, separated by commas; NAME=ADDRESS states where the others reach one
    #[arg(long, value_name = "NODES", value_delimiter = ',', required = true)]
    pub nodes: Vec<String>,
    /// Words that start a command on a node, which follows word by word; `{node}` stands for its name [default: start everything here]
    #[arg(long, value_name = "WORDS")]
    pub launch: Option<String>,
    /// Remote shell and its options, after which come the node and one quoted command line, as in `ssh -o BatchMode=yes`
    #[arg(long, value_name = "WORDS", conflicts_with = "launch")]
    pub remote_shell: Option<String>,
    /// Devices of each node that are checked
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=64))]
    pub devices: u32,
    /// A link below this share of what is usual is slow
    #[arg(long, value_name = "SHARE", default_value_t = 0.3)]
    pub min_bandwidth_share: f64,
    /// A device that takes this many times as long as the median one is slow
    #[arg(long, value_name = "TIMES", default_value_t = 3.0)]
    pub max_slowdown: f64,
    /// Longest time for everything, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 300, value_parser = clap::value_parser!(u32).range(5..=86_400))]
    pub timeout: u32,
}

/// Checks the nodes: a table on standard error, JSON on standard output. Bad nodes are exit code 5.
pub fn preflight(arguments: &PreflightArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    let (recipe, place) = what_is_run(arguments)?;
    let limits = Preflight {
        enabled: true,
        min_bandwidth_share: arguments.min_bandwidth_share,
        max_slowdown: arguments.max_slowdown,
        timeout_s: arguments.timeout,
    };
    let report = measure(MachineCheck {
        nodes: nodes(arguments)?,
        agent: agent_words()?,
        recipe: &recipe,
        place,
        devices: arguments.devices,
        limits,
    })?;
    writeln!(stdout, "{}", serde_json::to_string(&report).context("encode the report")?).context("print the report")?;
    verdict(&report)?;
    Ok(ExitCode::SUCCESS)
}

/// What is checked before a run.
pub(super) struct MachineCheck<'a> {
    /// The nodes.
    pub nodes: Vec<NodeOptions>,
    /// The words that start an agent on a node.
    pub agent: Vec<String>,
    /// The run's recipe.
    pub recipe: &'a Recipe,
    /// Where its checkpoints go.
    pub place: String,
    /// Devices of each node.
    pub devices: u32,
    /// When a node is bad.
    pub limits: Preflight,
}

/// The words that start an agent.
pub(super) fn agent_words() -> Result<Vec<String>> {
    Ok(vec![std::env::current_exe().context("find this program")?.display().to_string(), "preflight-agent".to_owned()])
}

/// Measures, with a table on standard error.
pub(super) fn measure(check: MachineCheck<'_>) -> Result<PreflightReport> {
    // Where nobody reads it, the verdict matters all the same.
    let mut say = |line: &str| drop(writeln!(std::io::stderr(), "{line}"));
    let setup = setup(&check)?;
    let MachineCheck { nodes, agent, limits, .. } = check;
    let report = run_preflight(PreflightOptions { nodes, agent, setup, limits, progress: &mut say })?;
    say(&table(&report));
    report.warnings.iter().for_each(|warning| say(&format!("warning: {warning}")));
    Ok(report)
}

/// Fails where there are bad nodes, naming each with its reason.
pub(super) fn verdict(report: &PreflightReport) -> Result<(), Failure> {
    if report.ok {
        return Ok(());
    }
    let bad: Vec<String> = report.bad_nodes.iter().map(|bad| format!("{}: {}", bad.node, bad.reason)).collect();
    let failure = Failure::new(FailureKind::Environment, format!("{} of {} nodes must not be used", bad.len(), report.nodes.len()));
    Err(failure.because(bad.join("\n    ")).hint("exclude them, or mend what the reasons say"))
}

/// The agent of one node; it talks through standard input and output, and ends with its input.
pub fn agent(stdout: &mut dyn Write) -> Result<ExitCode> {
    let tools = AgentTools { check_devices: &check_devices, try_store: &try_store };
    run_agent(&tools, &mut std::io::stdin().lock(), &mut &mut *stdout)?;
    Ok(ExitCode::SUCCESS)
}

/// The recipe, and where its checkpoints go.
fn what_is_run(arguments: &PreflightArguments) -> Result<(Recipe, String)> {
    let (recipe, folder) = if arguments.target.is_dir() {
        if !arguments.overrides.is_empty() {
            return Err(Failure::new(FailureKind::Recipe, "`--set` does not change a run").into());
        }
        let paths = RunPaths::find(&arguments.target)?;
        (read_recipe(&paths, &read_info(&paths)?)?, paths.checkpoints())
    } else {
        (cloze_recipes::load(&arguments.target, &arguments.overrides)?, Path::new(RUNS_FOLDER).to_owned())
    };
    let folder = std::path::absolute(&folder).context("find the run folder")?;
    let place = recipe.checkpoint.url.clone().unwrap_or_else(|| folder.display().to_string());
    Ok((recipe, place))
}

fn setup(check: &MachineCheck<'_>) -> Result<Setup> {
    let recipe = check.recipe;
    let is_gpu = recipe.train.device == Device::Cuda;
    Ok(Setup {
        secret: Secret::random()?,
        node: String::new(),
        worker_binary: worker_binary()?,
        device: if is_gpu { "cuda" } else { "cpu" }.to_owned(),
        num_devices: check.devices,
        bfloat16: is_gpu && recipe.train.precision == Precision::Bfloat16,
        place: check.place.clone(),
        options: recipe.checkpoint.options.clone(),
        task_timeout_s: u64::from(check.limits.timeout_s),
    })
}

fn nodes(arguments: &PreflightArguments) -> Result<Vec<NodeOptions>> {
    let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
    if let Some(launch) = arguments.launch.as_ref().filter(|launch| !launch.contains(NODE_PLACE)) {
        let failure = Failure::new(FailureKind::Recipe, "`--launch` does not say where the node's name goes").found(launch);
        return Err(failure.expected(format!("words with `{NODE_PLACE}` among them")).into());
    }
    let mut nodes: Vec<NodeOptions> = Vec::new();
    for text in &arguments.nodes {
        let (name, address) = text.split_once('=').map_or((text.as_str(), None), |(name, address)| (name, Some(address.to_owned())));
        if name.is_empty() || nodes.iter().any(|node| node.host.name == name) {
            let failure = Failure::new(FailureKind::Recipe, "`--nodes` does not name every node once").found(arguments.nodes.join(","));
            return Err(failure.expected("names, separated by commas").into());
        }
        let host = match (&arguments.launch, &arguments.remote_shell) {
            (Some(launch), _) => {
                let prefix = words(launch).iter().map(|word| word.replace(NODE_PLACE, name)).collect();
                RemoteHost { name: name.to_owned(), prefix, form: CommandForm::Words }
            }
            (None, Some(shell)) => RemoteHost::by_shell(name, &words(shell)),
            (None, None) => RemoteHost::here(name),
        };
        nodes.push(NodeOptions { host, address });
    }
    Ok(nodes)
}

/// Lets the worker check this node's devices, within the time of one task.
fn check_devices(setup: &Setup) -> Result<Vec<DeviceMeasurement>> {
    let mut command = Command::new(&setup.worker_binary);
    command.args(["preflight", "--device", &setup.device, "--devices", &setup.num_devices.to_string()]);
    if setup.bfloat16 {
        command.arg("--bfloat16");
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit());
    let mut child = command.spawn().with_context(|| format!("start {}", setup.worker_binary.display()))?;
    let result = read_within(&mut child, Duration::from_secs(setup.task_timeout_s));
    // One that does not end in time must not stay behind.
    drop(child.kill());
    drop(child.wait());
    serde_json::from_str(&result?).context("read what the worker measured")
}

fn read_within(child: &mut Child, patience: Duration) -> Result<String> {
    let deadline = Instant::now() + patience;
    let mut stdout = child.stdout.take().context("take the worker's output")?;
    let reader = std::thread::spawn(move || {
        let mut text = String::new();
        stdout.read_to_string(&mut text).map(|_| text)
    });
    let status = loop {
        if let Some(status) = child.try_wait().context("wait for the worker")? {
            break status;
        }
        if Instant::now() >= deadline {
            bail!("the devices do not answer within {} s", patience.as_secs());
        }
        sleep(POLL);
    };
    if !status.success() {
        bail!("the worker ended with {status}");
    }
    match reader.join() {
        Ok(text) => text.context("read the worker's output"),
        Err(_) => bail!("the thread that reads the worker's output failed"),
    }
}

fn try_store(setup: &Setup) -> Result<()> {
    let tried = open_place(&setup.place, &setup.options).and_then(|store| try_place(&store));
    tried.map(drop).map_err(|error| match error.downcast_ref::<Failure>() {
        // One line of it, for a table.
        Some(failure) => anyhow::anyhow!("{}", failure.to_string().split('\n').map(str::trim).collect::<Vec<_>>().join(" ")),
        None => error,
    })
}

fn table(report: &PreflightReport) -> String {
    let mut table = Table::new();
    table.load_style(presets::ASCII_MARKDOWN).set_header([
        "node",
        "slowest device",
        "GFLOP/s",
        "slowest link, Mbit/s",
        "store, s",
        "clock, s",
        "verdict",
    ]);
    for node in &report.nodes {
        let slowest = node
            .devices
            .iter()
            .filter(|device| device.seconds.is_some())
            .max_by(|a, b| a.seconds.unwrap_or(0.0).total_cmp(&b.seconds.unwrap_or(0.0)));
        let links = report.pairs.iter().filter(|pair| pair.a == node.node || pair.b == node.node).filter_map(|pair| pair.mbit_per_s);
        let link = links.reduce(f64::min);
        let number = |value: Option<f64>, digits: usize| value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"));
        let verdict = report.bad_nodes.iter().find(|bad| bad.node == node.node).map_or("good", |bad| bad.reason.as_str());
        table.add_row([
            node.node.clone(),
            slowest.map_or_else(|| "-".to_owned(), |device| device.device.clone()),
            number(slowest.and_then(|device| device.gflops), 0),
            number(link, 0),
            number(node.store_s, 2),
            number(node.clock_skew_s, 2),
            verdict.to_owned(),
        ]);
    }
    table.to_string()
}
