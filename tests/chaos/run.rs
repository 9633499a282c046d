//! The whole of it: the runs to compare with, the run with the faults, and what must hold at its end.

use std::fs;
use std::io::Write as _;
use std::net::{IpAddr, Ipv4Addr};
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use serde_json::Value;

use super::faults::{await_drill, perform};
use super::history::History;
use super::remains::{self, CHECKPOINTS};
use super::schedule::{Fault, Means, NUM_OTHER_HOSTS, Segment, schedule};
use super::stage::{Props, RECIPE, RUN, Stage, with_keys};
use super::table::{Measured, table};
use crate::sandbox::{FaultProxy, Network, Process, SeaweedFs, SmallDisk, World, number, run_command, skipped, tool};

/// Faults of the short schedule: as many as there are kinds on one host, so that each comes once.
const SHORT_FAULTS: usize = 15;
/// Steps that a fault takes, on an idle machine of two cores: about 130 in a second, and a fault of the store lasts about that long.
const STEPS_PER_FAULT: u64 = 120;
/// Steps besides those.
const MORE_STEPS: u64 = 300;
/// Steps from the start of a segment to its first drill, and from one drill to the next.
const FIRST_DRILL_STEPS: u64 = 20;
const DRILL_INTERVAL_STEPS: u64 = 40;
/// Room for two checkpoints, one of which is on its way out of the cache.
const CACHE_SIZE: &str = "4m";
/// Longest time for a run without faults, and for what is left of the run after the last fault, for each of its steps. A step takes
/// some milliseconds.
const TIMEOUT_PER_STEP: Duration = Duration::from_millis(150);
/// One drill in this many, and one in any case, may be missed because its worker was replaced for another reason, such as a second of
/// silence on a loaded machine.
const MISSED_DRILLS_SHARE: usize = 4;

/// How much, and with which seed.
pub struct ChaosOptions {
    faults: usize,
    seed: u64,
    has_network: bool,
    /// What the workers share out, with replicas.
    shard: Option<String>,
    report: Option<PathBuf>,
}

impl ChaosOptions {
    /// What `scripts/chaos.sh` sets; without that, the short schedule.
    pub fn from_environment() -> Self {
        let report = std::env::var_os("CLOZE_CHAOS_REPORT").filter(|path| !path.is_empty()).map(PathBuf::from);
        Self {
            faults: setting("CLOZE_CHAOS_FAULTS", SHORT_FAULTS),
            seed: setting("CLOZE_CHAOS_SEED", 1),
            has_network: setting("CLOZE_CHAOS_NETWORK", 0_u8) == 1,
            shard: std::env::var("CLOZE_CHAOS_SHARD").ok().filter(|shard| !shard.is_empty()),
            report,
        }
    }
}

/// Runs a schedule of faults, and prints what was measured.
pub fn run(options: &ChaosOptions) {
    let Some(weed) = tool("faults of every kind", "weed") else { return };
    let started = Instant::now();
    let mut network = None;
    if options.has_network {
        network = Network::new("faults of every kind", 1 + NUM_OTHER_HOSTS);
        if network.is_none() {
            return;
        }
    }
    let steps = MORE_STEPS + STEPS_PER_FAULT * options.faults as u64;
    let sharing = options.shard.as_ref().map_or_else(String::new, |shard| format!("  shard: {shard}\n  replicate_shards: true\n"));
    let mut stage = set_up(SeaweedFs::start(&weed), network, &format!("train:\n  steps: {steps}\n  audit_samples: true\n{sharing}"));
    train_without_faults(&stage, steps);
    let means = Means { network: stage.network.is_some(), small_disk: stage.disk.is_some() };
    let mut measured = Vec::new();
    let segments = schedule(options.seed, options.faults, means);
    let mut num_missed = 0;
    for (place, segment) in segments.iter().enumerate() {
        let first_step = if place == 0 { 0 } else { stage.stop() };
        num_missed += perform_segment(&mut stage, segment, first_step, &mut measured);
    }
    stage.finish(TIMEOUT_PER_STEP * steps as u32);
    let num_drills: usize = segments.iter().map(|segment| segment.drills.len()).sum();
    assert!(num_missed <= 1.max(num_drills / MISSED_DRILLS_SHARE), "{num_missed} of {num_drills} drills did not come");
    let unwritten = check(&stage, steps);
    let summary = format!(
        "{}\n{} faults, seed {}, {} workers, {steps} steps, {:.0} s; {num_missed} drills missed; {unwritten} steps of which a worker did \
         not live to write down its share\n",
        table(&measured),
        measured.len(),
        options.seed,
        stage.num_workers(),
        started.elapsed().as_secs_f64(),
    );
    std::io::stdout().write_all(summary.as_bytes()).expect("print the table");
    if let Some(path) = &options.report {
        fs::write(path, &summary).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    }
}

/// A number from the environment.
fn setting<T: FromStr>(name: &str, default: T) -> T {
    let Some(text) = std::env::var_os(name).filter(|text| !text.is_empty()) else { return default };
    let text = text.to_string_lossy().into_owned();
    text.parse().unwrap_or_else(|_| panic!("{name} is `{text}`, which is no number of its kind"))
}

/// The run's folder, recipes (`train` is their section), bucket and disk; nothing is started yet.
fn set_up(server: SeaweedFs, network: Option<Network>, train: &str) -> Stage {
    let world = World::prepared();
    let disk = SmallDisk::mount(world.path("disk"), CACHE_SIZE);
    let mut cache = String::new();
    if disk.is_some() {
        cache.push_str("  cache: disk/cache\n");
    } else {
        skipped("a full cache disk among the faults", "this process may not mount a file system; root in a virtual machine may");
    }
    let address = network.as_ref().map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), Network::bridge_address);
    let proxy = FaultProxy::start(address, server.s3_port());
    let (url, bucket_options) = (SeaweedFs::url(CHECKPOINTS), SeaweedFs::options_through(&proxy));
    // The bounds are short, so that a fault costs seconds. What is a second too short on a loaded machine costs a restart, no more.
    world.write("long.yaml", format!("version: 1\nextends: recipe.yaml\n{train}"));
    let recipe = format!(
        "version: 1\nextends: long.yaml\n\
         checkpoint:\n  url: {url}\n  options: {bucket_options}\n  every_steps: 20\n  upload_timeout_s: 30\n{cache}\
         cluster:\n  heartbeat_timeout_ms: 1000\n  collective_timeout_ms: 20000\n  max_restarts: 100000\n  retries_per_step: 3\n  \
         hang: {{step_s: 3, data_s: 10, init_s: 60, checkpoint_s: 60}}\n"
    );
    world.write(RECIPE, recipe);
    Stage::new(Props { world, server, proxy, disk, network })
}

/// Two runs to compare with: one worker, for the samples, and as many as the run with the faults, for the weights.
fn train_without_faults(stage: &Stage, steps: u64) {
    let workers = stage.num_workers().to_string();
    let start = |name: &str, workers: &str| {
        let arguments = ["train", "long.yaml", "--run", name, "--workers", workers, "--quiet", "--set", "checkpoint.every_steps=1000000"];
        Process::start(&mut stage.world.command(&arguments), "")
    };
    for process in [start("reference", "1"), start("undisturbed", &workers)] {
        process.wait_within(TIMEOUT_PER_STEP * steps as u32).expect_code(0);
    }
}

/// Starts or resumes the run and lets the faults of a segment happen; returns the number of drills that did not come.
fn perform_segment(stage: &mut Stage, segment: &Segment, first_step: u64, measured: &mut Vec<Measured>) -> usize {
    let step_of = |place: usize| first_step + FIRST_DRILL_STEPS + DRILL_INTERVAL_STEPS * place as u64;
    let told = |(place, fault): (usize, &Fault)| {
        let kind = fault.kind.drill().expect("a drill");
        format!("{kind}:{}@{}", fault.target, step_of(place))
    };
    let drills: Vec<String> = segment.drills.iter().enumerate().map(told).collect();
    let mut mark = stage.mark();
    stage.start(&drills);
    let mut num_missed = 0;
    for (place, fault) in segment.drills.iter().enumerate() {
        match await_drill(stage, *fault, step_of(place), &mut mark) {
            Some(found) => measured.push(found),
            None => num_missed += 1,
        }
    }
    stage.wait_steps(mark, 1);
    for fault in &segment.others {
        measured.push(perform(stage, *fault));
    }
    num_missed
}

/// What must hold at the end; returns the number of steps of which a share was not written down.
fn check(stage: &Stage, steps: u64) -> usize {
    let world = &stage.world;
    let manifest: Value = serde_json::from_slice(&world.read("prepared/manifest.json")).expect("the manifest is JSON");
    let (reference, history) = (History::of(&world.run("reference")), History::of(&stage.run));
    let epochs = reference.check_epochs(number(&manifest["samples"])).and_then(|()| history.compare(&reference, steps));
    let findings = epochs.unwrap_or_else(|complaints| panic!("{complaints}"));
    let (losses, undisturbed) = (stage.run.losses(), world.run("undisturbed").losses());
    for (step, loss) in &losses {
        assert_eq!(loss.to_bits(), undisturbed[step].to_bits(), "step {step}: loss {loss}, undisturbed {}", undisturbed[step]);
    }
    assert!(losses.contains_key(&steps), "the last step was not reported");
    let cloze = |arguments: &[&str]| {
        let mut command = world.command(arguments);
        with_keys(&mut command);
        run_command(&mut command).expect_code(0)
    };
    for (name, output) in [(RUN, "weights"), ("undisturbed", "undisturbed-weights")] {
        cloze(&["export", name, "--output", output]);
    }
    let [weights, expected] = ["weights", "undisturbed-weights"].map(|folder| world.read(&format!("{folder}/model.safetensors")));
    assert!(weights == expected, "the weights are not those of the undisturbed run");
    cloze(&["checkpoints", "verify", RUN]);
    remains::check(stage);
    findings.unwritten
}
