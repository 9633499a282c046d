//! A sweep as arrays of jobs on a real SLURM cluster ends with every trial done once.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::time::Duration;

use serde_json::Value;

use crate::sandbox::{Process, RECIPE_TEXT, SlurmCluster, SlurmOptions, World, run_command, wait_until};

/// Longest wait for something of the cluster to happen; it finds out after some 15 s that a node is gone.
const PATIENCE: Duration = Duration::from_mins(3);

/// Records of a study by name.
fn records(world: &World, study: &str) -> BTreeMap<String, Value> {
    let Ok(entries) = fs::read_dir(world.path(&format!("studies/{study}/trials"))) else { return BTreeMap::new() };
    let paths = entries.filter_map(|entry| Some(entry.ok()?.path())).filter(|path| path.extension().is_some_and(|e| e == "json"));
    paths
        .map(|path| {
            let record: Value = serde_json::from_slice(&fs::read(path).expect("read a record")).expect("a record is whole");
            (record["name"].as_str().expect("a name").to_owned(), record)
        })
        .collect()
}

/// Steps that a trial has done so far, in order.
fn steps(world: &World, study: &str, name: &str) -> Vec<u64> {
    let events = world.run(&format!("studies/{study}/runs/{name}")).events_named("step");
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
    let training =
        |at_least: usize| records(&world, "queued").keys().filter(|name| steps(&world, "queued", name).len() >= at_least).count();
    wait_until("four trials of two elements train", PATIENCE, || training(40) >= 4);
    process.kill();
    let jobs = || cluster.run("squeue", &["--noheader", "--array", "--format=%i %T %N"]).stdout;
    let queue = jobs();
    assert_eq!(queue.lines().count(), 3, "{queue}");
    assert_eq!(queue.lines().filter(|line| line.contains("RUNNING")).count(), 2, "{queue}");

    let status = run_command(&mut cloze(&["sweep", "status", "studies/queued"])).expect_code(0).stdout;
    assert_eq!(status.lines().filter(|line| line.contains(" training ")).count(), 4, "{status}");
    assert!(status.contains(" queued ") && status.contains("0 of 6 done, 4 running, 2 queued; no controller lives"), "{status}");

    // What keeps an array away from bad nodes reaches the element that waits, and SLURM complains of the others in these words.
    let job = queue.split('_').next().expect("an array");
    let told = cluster.run("scontrol", &["update", &format!("JobId={job}"), "ExcNodeList=n4"]);
    assert!(told.stderr.contains("no longer pending"), "{}", told.stderr);
    let shown = cluster.run("scontrol", &["-o", "show", "job", job]).expect_code(0).stdout;
    let waiting: Vec<&str> = shown.lines().filter(|line| line.contains("JobState=PENDING")).collect();
    assert!(waiting.len() == 1 && waiting[0].contains(" ExcNodeList=n4 "), "{shown}");

    // A cluster of another name is another one, whatever the cluster file calls it.
    let study = String::from_utf8(world.read("studies/queued/study.json")).unwrap();
    let name = serde_json::from_str::<Value>(&study).unwrap()["cluster"].as_str().expect("the cluster has a name").to_owned();
    world.write("studies/queued/study.json", study.replace(&format!("\"{name}\""), "\"elsewhere\""));
    let refused = run_command(&mut cloze(&["sweep", "resume", "studies/queued"])).expect_code(8);
    refused.expect_words(&["in another cluster", "`elsewhere`", &format!("`{name}`")]);
    world.write("studies/queued/study.json", &study);

    let node = queue.lines().find(|line| line.contains("RUNNING")).and_then(|line| line.split_whitespace().last()).unwrap().to_owned();
    cluster.kill_node(&node);
    let resumed = Process::start(&mut cloze(&["sweep", "resume", "studies/queued"]), "");
    let status = || run_command(&mut cloze(&["sweep", "status", "studies/queued"])).expect_code(0).stdout;
    wait_until("the trials of the lost node wait in the queue again", PATIENCE, || {
        let text = status();
        // They need not wait at the same time.
        text.contains(" queued again; controlled by process ") && text.lines().any(|line| line.contains(" queued again "))
    });
    let outcome = resumed.wait().expect_code(0);
    outcome.expect_words(&["6 trials of an earlier controller are out", "6 of 6 done"]);
    for (name, record) in records(&world, "queued") {
        assert_eq!((record["state"].as_str(), record["attempts"].as_u64()), (Some("done"), Some(1)), "{name}");
        let mut done = steps(&world, "queued", &name);
        done.sort_unstable();
        done.dedup();
        assert_eq!(done, (1..=600).collect::<Vec<u64>>(), "{name}");
    }
    assert!(jobs().is_empty(), "{}", jobs());
}

/// SLURM starts the element again, and by then the sweep has its outcome and goes on with the trial in another job.
#[test]
fn an_element_that_is_requeued_leaves_its_trial_to_the_sweep() {
    let options = SlurmOptions { num_nodes: 1, gpus_per_node: 0, ..SlurmOptions::default() };
    let Some(cluster) = SlurmCluster::start("a requeued element of a sweep", options) else { return };
    let world = World::with_corpus(2000);
    let recipe = RECIPE_TEXT.replace("name: small", "name: again").replace("steps: 40", "steps: 400");
    let around = "\
resources: {nodes: 1, workers_per_node: 1, cpus_per_worker: 2, time_limit_minutes: 10}
sweep: {seeds: [1], metric: {score: loss}}
";
    world.write("again.yaml", recipe + around);
    world.write("cluster.yaml", "version: 1\nname: tests\nkind: slurm\nslurm: {partition: main, poll_s: 1}\n");
    let arguments = ["sweep", "run", "again.yaml", "--cluster", "cluster.yaml"];
    let process = Process::start(&mut world.command_by(cluster.command(crate::sandbox::CLOZE), &arguments), "");
    let done = || records(&world, "again").keys().map(|name| steps(&world, "again", name).len()).max().unwrap_or(0);
    wait_until("the trial trains", PATIENCE, || done() >= 40);
    let job: u64 = cluster.run("squeue", &["--noheader", "--format=%A"]).expect_code(0).stdout.trim().parse().expect("one job");
    cluster.run("scontrol", &["requeue", &format!("{job}_0")]).expect_code(0);
    process.wait().expect_code(0).expect_words(&["was stopped at step", "1 of 1 done"]);
    let log = || String::from_utf8(world.read(&format!("studies/again/jobs/job-{job}_0.log"))).expect("a log is text");
    wait_until("the element has begun again", PATIENCE, || log().contains("nothing is left to do here: the outcome of again-"));
    let text = log();
    assert!(text.matches("error: stopped").count() == 1 && !text.contains("cloze resume"), "{text}");
    wait_until("it ends well", PATIENCE, || {
        let told = cluster.run("scontrol", &["-o", "show", "job", &format!("{job}_0")]).expect_code(0).stdout;
        told.contains("JobState=COMPLETED") && told.contains("Restarts=1") && told.contains("ExitCode=0:0")
    });
}

/// Hosts of the workers of a trial.
fn hosts(world: &World, study: &str, name: &str) -> BTreeSet<String> {
    let joined = world.run(&format!("studies/{study}/runs/{name}")).events_named("worker_joined");
    joined.iter().map(|event| event["host"].as_str().expect("a worker has a host").to_owned()).collect()
}

#[test]
fn trials_of_two_nodes_use_both() {
    let options = SlurmOptions { num_nodes: 4, gpus_per_node: 0, ..SlurmOptions::default() };
    let Some(cluster) = SlurmCluster::start("a sweep of trials on two nodes each", options) else { return };
    let world = World::with_corpus(2000);
    let recipe = RECIPE_TEXT.replace("name: small", "name: pairs");
    let around = "\
resources: {nodes: 2, workers_per_node: 1, cpus_per_worker: 2, time_limit_minutes: 10}
sweep: {seeds: [1, 2], concurrency: 2, metric: {score: loss}}
";
    world.write("pairs.yaml", recipe + around);
    let cluster_file = "version: 1\nname: tests\nkind: slurm\nslurm: {partition: main, poll_s: 1}\npreflight: {timeout_s: 120}\n";
    world.write("cluster.yaml", cluster_file);
    let sweep = |settings: &[&str]| {
        let arguments = [["sweep", "run", "pairs.yaml", "--cluster", "cluster.yaml"].as_slice(), settings].concat();
        world.command_by(cluster.command(crate::sandbox::CLOZE), &arguments)
    };
    let shared = ["--folder", "studies/shared", "--set", "sweep.pack=2"];
    run_command(&mut sweep(&shared)).expect_code(3).expect_words(&["sweep.pack", "resources.nodes"]);
    assert!(!world.path("studies/shared").exists(), "a folder was made for nothing");
    warned_and_done(&world, &cluster, &mut sweep(&["--set", "train.steps=400"]));

    // A trial that waits at a rung leaves its nodes, and goes on from there with others.
    let rungs = ["--folder", "studies/rungs", "--set", "sweep.early_stopping={first_step: 20, factor: 2}"];
    run_command(&mut sweep(&rungs)).expect_code(0).expect_words(&["to step 20", "1 of 2 done, 1 stopped early"]);
    let ends: BTreeMap<String, u64> =
        records(&world, "rungs").into_iter().map(|(name, record)| (name, record["step"].as_u64().expect("a step"))).collect();
    for (name, end) in &ends {
        assert_eq!(steps(&world, "rungs", name), (1..=*end).collect::<Vec<u64>>(), "{name}");
        assert_eq!(world.run(&format!("studies/rungs/runs/{name}")).events_named("generation_started")[0]["world_size"], 2, "{name}");
    }
    let mut ends: Vec<u64> = ends.into_values().collect();
    ends.sort_unstable();
    assert_eq!(ends, [20, 40]);
}

/// A warning, as ahead of a time limit, makes a trial save on both of its nodes; it goes on in another job, and no step is done twice.
fn warned_and_done(world: &World, cluster: &SlurmCluster, sweep: &mut std::process::Command) {
    let process = Process::start(sweep, "");
    let begun = || records(world, "pairs").keys().filter(|name| steps(world, "pairs", name).len() >= 30).count();
    wait_until("both trials train", PATIENCE, || begun() == 2);
    let queue = cluster.run("squeue", &["--noheader", "--array", "--format=%i %D"]).expect_code(0).stdout;
    let jobs: Vec<Vec<&str>> = queue.lines().map(|line| line.split_whitespace().collect()).collect();
    assert!(jobs.len() == 2 && jobs.iter().all(|job| job[1] == "2"), "{queue}");
    cluster.run("scancel", &["--batch", "--signal=USR2", jobs[0][0]]).expect_code(0);
    process.wait().expect_code(0).expect_words(&["was stopped at step", "2 of 2 done"]);
    let mut attempts = Vec::new();
    for (name, record) in records(world, "pairs") {
        assert_eq!(record["state"].as_str(), Some("done"), "{name}");
        attempts.push(record["attempts"].as_u64().expect("a number"));
        assert_eq!(steps(world, "pairs", &name), (1..=400).collect::<Vec<u64>>(), "{name}");
        assert!(hosts(world, "pairs", &name).len() >= 2, "{name}: {:?}", hosts(world, "pairs", &name));
        let scores = world.read(&format!("studies/pairs/runs/{name}/eval/eval.json"));
        assert!(serde_json::from_slice::<Value>(&scores).expect("scores are JSON")["tasks"].is_array(), "{name}");
    }
    attempts.sort_unstable();
    assert_eq!(attempts, [1, 2], "only the one that was warned began again");
}

#[test]
fn a_trial_that_loses_a_node_goes_on_with_another() {
    let options = SlurmOptions { num_nodes: 3, gpus_per_node: 0, ..SlurmOptions::default() };
    let Some(cluster) = SlurmCluster::start("a trial that loses one of its nodes", options) else { return };
    let world = World::with_corpus(2000);
    let recipe = RECIPE_TEXT.replace("name: small", "name: lost").replace("steps: 40", "steps: 600");
    let around = "\
resources: {nodes: 2, workers_per_node: 1, cpus_per_worker: 2, time_limit_minutes: 10}
sweep: {seeds: [1], metric: {score: loss}}
";
    world.write("lost.yaml", recipe + around);
    let cluster_file = "version: 1\nname: tests\nkind: slurm\nslurm: {partition: main, poll_s: 1}\npreflight: {enabled: false}\n";
    world.write("cluster.yaml", cluster_file);
    let arguments = ["sweep", "run", "lost.yaml", "--cluster", "cluster.yaml"];
    let process = Process::start(&mut world.command_by(cluster.command(crate::sandbox::CLOZE), &arguments), "");
    let done = || records(&world, "lost").keys().map(|name| steps(&world, "lost", name).len()).max().unwrap_or(0);
    wait_until("the trial trains", PATIENCE, || done() >= 40);
    let job = cluster.run("squeue", &["--noheader", "--format=%A"]).expect_code(0).stdout.trim().parse().expect("one job");
    // The other node of the two: what works on the trial lives.
    let (first, nodes) = (cluster.batch_node(job), cluster.nodes_of(job));
    let lost = nodes.iter().find(|node| **node != first).expect("the trial has two nodes").clone();
    cluster.kill_node(&lost);
    process.wait().expect_code(0).expect_words(&["1 of 1 done"]);
    let name = records(&world, "lost").into_keys().next().expect("the trial has a record");
    let mut all = steps(&world, "lost", &name);
    all.sort_unstable();
    all.dedup();
    assert_eq!(all, (1..=600).collect::<Vec<u64>>());
    assert_eq!(hosts(&world, "lost", &name), ["n1", "n2", "n3"].map(str::to_owned).into(), "the third node took the place of {lost}");
}

/// The node lives, but every worker that starts there ends at once, so all restarts of the run are used up.
#[test]
fn a_trial_leaves_a_node_out_where_no_worker_stays_alive() {
    let options = SlurmOptions { num_nodes: 3, gpus_per_node: 0, ..SlurmOptions::default() };
    let Some(cluster) = SlurmCluster::start("a trial on a node where no worker stays alive", options) else { return };
    let world = World::with_corpus(2000);
    let around = "\
resources: {nodes: 2, workers_per_node: 1, cpus_per_worker: 2, time_limit_minutes: 10}
sweep: {seeds: [1], metric: {score: loss}}
";
    world.write("broken.yaml", RECIPE_TEXT.replace("name: small", "name: broken") + around);
    let cluster_file = "version: 1\nname: tests\nkind: slurm\nslurm: {partition: main, poll_s: 1}\npreflight: {enabled: false}\n";
    world.write("cluster.yaml", cluster_file);
    let worker = world.worker_broken_on("n2", 1);
    let arguments = ["sweep", "run", "broken.yaml", "--cluster", "cluster.yaml"];
    let outcome = run_command(world.command_by(cluster.command(crate::sandbox::CLOZE), &arguments).env("CLOZE_WORKER", worker));
    outcome.expect_code(0).expect_words(&["no job that begins from now on uses n2", "tried again", "1 of 1 done"]);
    let (name, record) = records(&world, "broken").pop_first().expect("the trial has a record");
    assert_eq!((record["state"].as_str(), record["attempts"].as_u64()), (Some("done"), Some(2)));
    assert_eq!(steps(&world, "broken", &name), (1..=40).collect::<Vec<u64>>());
    assert!(!hosts(&world, "broken", &name).contains("n2"), "{:?}", hosts(&world, "broken", &name));
    let script = |batch: u32| String::from_utf8(world.read(&format!("studies/broken/jobs/batch-{batch:06}.sh"))).expect("a script is text");
    assert!(!script(1).contains("--exclude") && script(2).contains("#SBATCH --exclude=n2\n"), "{}", script(2));
    // The node lives, and nothing of the study is left on it.
    cluster.wait_for_idle_nodes();
}

/// Each trial has a node of its own; that of one of them fails its pre-flight, so the trial is tried elsewhere before it has begun.
#[test]
fn a_trial_of_one_node_leaves_a_node_that_fails_its_preflight() {
    let options = SlurmOptions { num_nodes: 3, gpus_per_node: 0, ..SlurmOptions::default() };
    let Some(cluster) = SlurmCluster::start("the pre-flight of trials of one node", options) else { return };
    let world = World::with_corpus(2000);
    let around = "\
resources: {nodes: 1, workers_per_node: 1, cpus_per_worker: 4, time_limit_minutes: 10}
sweep: {seeds: [1, 2, 3], concurrency: 3, metric: {score: loss}}
";
    world.write("unfit.yaml", RECIPE_TEXT.replace("name: small", "name: unfit") + around);
    world.write("cluster.yaml", "version: 1\nname: tests\nkind: slurm\nslurm: {partition: main, poll_s: 1}\n");
    let worker = world.worker_broken_on("n2", 1);
    let arguments = ["sweep", "run", "unfit.yaml", "--cluster", "cluster.yaml"];
    let outcome = run_command(world.command_by(cluster.command(crate::sandbox::CLOZE), &arguments).env("CLOZE_WORKER", worker));
    outcome.expect_code(0).expect_words(&["no job that begins from now on uses n2", "the node of the job cannot be used", "3 of 3 done"]);
    let records = records(&world, "unfit");
    let mut attempts: Vec<u64> = records.values().map(|record| record["attempts"].as_u64().expect("a number")).collect();
    attempts.sort_unstable();
    assert_eq!(attempts, [1, 1, 2]);
    for (name, record) in &records {
        assert_eq!((record["state"].as_str(), steps(&world, "unfit", name)), (Some("done"), (1..=40).collect()), "{name}");
        assert!(!hosts(&world, "unfit", name).contains("n2"), "{:?}", hosts(&world, "unfit", name));
        if record["attempts"] == 2 {
            let hash = record["hash"].as_str().expect("a hash");
            let first: Value = serde_json::from_slice(&world.read(&format!("studies/unfit/jobs/outcomes/{hash}-1.json"))).expect("JSON");
            assert_eq!((first["bad_nodes"][0].as_str(), first["failure"]["place"].as_str()), (Some("n2"), Some("n2")), "{first}");
            assert!(first["failure"]["cause"].as_str().expect("a cause").contains("its devices could not be checked"), "{first}");
        }
    }
    // The node lives, and nothing of the study is left on it.
    cluster.wait_for_idle_nodes();
}

/// Nobody takes in what happens to a trial while no controller lives; whoever asks is told all the same.
#[test]
fn a_trial_whose_job_is_gone_is_not_shown_as_training() {
    let options = SlurmOptions { num_nodes: 1, gpus_per_node: 0, ..SlurmOptions::default() };
    let Some(cluster) = SlurmCluster::start("the status of a trial whose job is gone", options) else { return };
    let world = World::with_corpus(2000);
    let recipe = RECIPE_TEXT.replace("name: small", "name: left").replace("steps: 40", "steps: 400");
    let around = "\
resources: {nodes: 1, workers_per_node: 1, cpus_per_worker: 2, time_limit_minutes: 10}
sweep: {seeds: [1], metric: {score: loss}}
";
    world.write("left.yaml", recipe + around);
    world.write("cluster.yaml", "version: 1\nname: tests\nkind: slurm\nslurm: {partition: main, poll_s: 1}\n");
    let arguments = ["sweep", "run", "left.yaml", "--cluster", "cluster.yaml"];
    let process = Process::start(&mut world.command_by(cluster.command(crate::sandbox::CLOZE), &arguments), "");
    let done = || records(&world, "left").keys().map(|name| steps(&world, "left", name).len()).max().unwrap_or(0);
    wait_until("the trial trains", PATIENCE, || done() >= 40);
    process.kill();
    let status = |more: &[&str]| {
        let arguments = [["sweep", "status", "studies/left"].as_slice(), more].concat();
        run_command(&mut world.command_by(cluster.command(crate::sandbox::CLOZE), &arguments)).expect_code(0).stdout
    };
    let text = status(&[]);
    assert!(text.contains("training") && text.contains("no controller lives here; the last one, process "), "{text}");
    let job: u64 = cluster.run("squeue", &["--noheader", "--format=%A"]).expect_code(0).stdout.trim().parse().expect("one job");
    cluster.kill_script(job);
    wait_until("the job is seen to be gone", PATIENCE, || status(&[]).contains(" is gone: job "));
    let text = status(&[]);
    assert!(!text.contains("training") && text.contains("1 gone;") && text.contains("`cloze sweep resume "), "{text}");
    let json: Value = serde_json::from_str(&status(&["--json"])).expect("the status is JSON");
    assert_eq!(json["gone"].as_object().map(serde_json::Map::len), Some(1), "{json}");
    // Where nobody can ask, that is said.
    let mut blind = world.command(&["sweep", "status", "studies/left"]);
    let blind = run_command(blind.env("PATH", "/nowhere")).expect_code(0).stdout;
    assert!(blind.contains("what is out may be gone: the batch system could not be asked"), "{blind}");
    let resume = ["sweep", "resume", "studies/left"];
    let resumed = run_command(&mut world.command_by(cluster.command(crate::sandbox::CLOZE), &resume));
    resumed.expect_code(0).expect_words(&["1 of 1 done"]);
}

/// Without accounting nobody knows how a job has ended once SLURM has forgotten it. The controller stands still meanwhile, so that it has not
/// heard of the end before.
#[test]
fn a_trial_whose_job_is_forgotten_is_tried_again() {
    let options = SlurmOptions { num_nodes: 1, gpus_per_node: 0, accounting: false, remembers_s: 2 };
    let Some(cluster) = SlurmCluster::start("jobs that SLURM forgets", options) else { return };
    let world = World::with_corpus(2000);
    let recipe = RECIPE_TEXT.replace("name: small", "name: forgotten").replace("steps: 40", "steps: 400");
    let around = "\
resources: {nodes: 1, workers_per_node: 1, cpus_per_worker: 2, time_limit_minutes: 10}
sweep: {seeds: [1], metric: {score: loss}}
";
    world.write("forgotten.yaml", recipe + around);
    world.write("cluster.yaml", "version: 1\nname: tests\nkind: slurm\nslurm: {partition: main, poll_s: 1}\n");
    let arguments = ["sweep", "run", "forgotten.yaml", "--cluster", "cluster.yaml"];
    let process = Process::start(&mut world.command_by(cluster.command(crate::sandbox::CLOZE), &arguments), "");
    let done = || records(&world, "forgotten").keys().map(|name| steps(&world, "forgotten", name).len()).max().unwrap_or(0);
    wait_until("the trial trains", PATIENCE, || done() >= 40);
    process.signal("STOP");
    let job: u64 = cluster.run("squeue", &["--noheader", "--format=%A"]).expect_code(0).stdout.trim().parse().expect("one job");
    cluster.kill_script(job);
    cluster.wait_for_change("the job is forgotten", || cluster.job_state(job).is_none());
    assert!(cluster.run("sacct", &["--jobs", &job.to_string()]).stderr.contains("disabled"), "the accounting knows nothing either");
    assert!(done() < 400, "it was killed on its way");

    process.signal("CONT");
    process.wait().expect_code(0).expect_words(&["ended without a word; tried again", "1 of 1 done"]);
    for (name, record) in records(&world, "forgotten") {
        assert_eq!((record["state"].as_str(), record["attempts"].as_u64()), (Some("done"), Some(2)), "{name}");
        let mut all = steps(&world, "forgotten", &name);
        all.sort_unstable();
        all.dedup();
        assert_eq!(all, (1..=400).collect::<Vec<u64>>(), "{name}");
    }
}
