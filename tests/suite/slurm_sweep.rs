//! A sweep as arrays of jobs on a real SLURM cluster ends with every trial done once.

use std::collections::BTreeMap;
use std::fs;
use std::time::Duration;

use serde_json::Value;

use crate::sandbox::{Process, RECIPE_TEXT, SlurmCluster, SlurmOptions, World, run_command, wait_until};

/// Longest wait for something of the cluster to happen; it finds out after some 15 s that a node is gone.
const PATIENCE: Duration = Duration::from_mins(3);

/// Records of a study by name.
fn records(world: &World) -> BTreeMap<String, Value> {
    let Ok(entries) = fs::read_dir(world.path("studies/queued/trials")) else { return BTreeMap::new() };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.extension().is_some_and(|e| e == "json"));
    paths
        .map(|path| {
            let record: Value = serde_json::from_slice(&fs::read(path).expect("read a record")).expect("a record is whole");
            (record["name"].as_str().expect("a name").to_owned(), record)
        })
        .collect()
}

/// Steps that a trial has done so far, in order.
fn steps(world: &World, name: &str) -> Vec<u64> {
    let events = world.run(&format!("studies/queued/runs/{name}")).events_named("step");
    events.iter().filter_map(|event| event["step"].as_u64()).collect()
}

#[test]
fn a_sweep_survives_its_controller_and_a_node() {
    let Some(cluster) = SlurmCluster::start("a sweep on SLURM", SlurmOptions { num_nodes: 4, ..SlurmOptions::default() }) else { return };
    let world = World::with_corpus(2000);
    let recipe = RECIPE_TEXT.replace("name: small", "name: queued").replace("steps: 40", "steps: 600");
    let around = "\
resources: {nodes: 1, workers_per_node: 1, cpus_per_worker: 2, time_limit_minutes: 10}
sweep: {seeds: [1, 2, 3, 4, 5, 6], concurrency: 4, pack: 2, metric: {score: loss}}
";
    world.write("queued.yaml", recipe + around);
    world.write("cluster.yaml", "version: 1\nname: tests\nkind: slurm\nslurm: {partition: main, poll_s: 1}\n");
    let cloze = |arguments: &[&str]| world.command_by(cluster.command(crate::sandbox::CLOZE), arguments);
    let process = Process::start(&mut cloze(&["sweep", "run", "queued.yaml", "--cluster", "cluster.yaml"]), "");
    let training = |at_least: usize| records(&world).keys().filter(|name| steps(&world, name).len() >= at_least).count();
    wait_until("four trials of two elements train", PATIENCE, || training(40) >= 4);
    process.kill();
    let jobs = || cluster.run("squeue", &["--noheader", "--array", "--format=%i %T %N"]).stdout;
    let queue = jobs();
    assert_eq!(queue.lines().count(), 3, "{queue}");
    assert_eq!(queue.lines().filter(|line| line.contains("RUNNING")).count(), 2, "{queue}");

    let node = queue.lines().find(|line| line.contains("RUNNING")).and_then(|line| line.split_whitespace().last()).unwrap().to_owned();
    cluster.kill_node(&node);
    let outcome = run_command(&mut cloze(&["sweep", "resume", "studies/queued"])).expect_code(0);
    outcome.expect_words(&["6 trials of an earlier controller are out", "6 of 6 done"]);
    for (name, record) in records(&world) {
        assert_eq!((record["state"].as_str(), record["attempts"].as_u64()), (Some("done"), Some(1)), "{name}");
        let mut done = steps(&world, &name);
        done.sort_unstable();
        done.dedup();
        assert_eq!(done, (1..=600).collect::<Vec<u64>>(), "{name}");
    }
    assert!(jobs().is_empty(), "{}", jobs());
}
