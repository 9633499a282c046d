//! The check before step 0 names the node that a run must not use, and says why.

use serde_json::Value;

use crate::sandbox::{Network, World, run_command};

const NUM_HOSTS: usize = 4;
/// The host whose link becomes slow.
const SLOW_HOST: usize = 2;

/// Names of the bad nodes in a verdict.
fn bad_nodes(report: &Value) -> Vec<&str> {
    report["bad_nodes"].as_array().expect("a list of bad nodes").iter().map(|bad| bad["node"].as_str().expect("a name")).collect()
}

#[test]
fn pretended_nodes_of_one_machine_are_good() {
    let world = World::with_corpus(10);
    // One machine computes for all of them, and for other tests: a slow moment of one node is no fault here.
    let arguments = ["preflight", "recipe.yaml", "--max-slowdown", "1000", "--min-bandwidth-share", "0.001"];
    for nodes in ["one", "a,b,c"] {
        let outcome = world.done(&[arguments.as_slice(), &["--nodes", nodes]].concat());
        let report: Value = serde_json::from_str(&outcome.stdout).expect("the verdict is JSON");
        assert_eq!((&report["ok"], bad_nodes(&report)), (&true.into(), vec![]), "{report}");
        let num_nodes = nodes.split(',').count();
        assert_eq!(report["nodes"].as_array().map(Vec::len), Some(num_nodes));
        assert_eq!(report["pairs"].as_array().map(Vec::len), Some(num_nodes * (num_nodes - 1) / 2));
        for node in report["nodes"].as_array().expect("a list of nodes") {
            assert!(node["devices"][0]["gflops"].as_f64().expect("a speed") > 0.0, "{node}");
            assert!(node["store_s"].is_f64() && node["clock_skew_s"].as_f64().expect("a skew").abs() < 5.0, "{node}");
        }
        assert!(report["pairs"].as_array().expect("pairs").iter().all(|pair| pair["mbit_per_s"].as_f64() > Some(1.0)), "{report}");
        outcome.expect_words(&["| node", "good"]);
    }
    // Nothing was left in the place of the checkpoints, nor was the place made.
    assert!(!world.path("runs").exists());
}

#[test]
fn nodes_that_fail_are_named_with_what_they_say() {
    let world = World::with_corpus(10);
    let shell = "case $1 in b) echo 'no route to b' >&2; exit 255;; *) exec sh -c \"$2\";; esac";
    world.write("shell.sh", shell);
    let arguments = ["preflight", "recipe.yaml", "--nodes", "a,b", "--remote-shell", "sh shell.sh", "--max-slowdown", "1000"];
    let outcome = world.cloze(&arguments).expect_code(5);
    let report: Value = serde_json::from_str(&outcome.stdout).expect("the verdict is JSON");
    assert_eq!(bad_nodes(&report), ["b"], "{report}");
    outcome.expect_words(&["error: 1 of 2 nodes must not be used", "b: nothing can be started there", "no route to b", "exit code 255"]);

    let nowhere = "checkpoint={url: /proc/nowhere, every_steps: 5}";
    let outcome = world.cloze(&["preflight", "recipe.yaml", "--nodes", "a", "--set", nowhere]).expect_code(5);
    outcome.expect_words(&["checkpoints cannot be stored from here"]);
    world.cloze(&["preflight", "recipe.yaml", "--nodes", "a,a"]).expect_code(3).expect_words(&["does not name every node once"]);
    world.cloze(&["preflight", "recipe.yaml", "--nodes", "a", "--launch", "srun"]).expect_code(3).expect_words(&["{node}"]);
}

#[test]
fn a_node_with_a_slow_link_is_named() {
    let Some(network) = Network::new("a node with a slow link", NUM_HOSTS) else { return };
    let world = World::with_corpus(10);
    network.slow(SLOW_HOST);
    let nodes: Vec<String> = (0..NUM_HOSTS).map(|host| format!("host-{host}={}", network.address(host))).collect();
    // The remote shell is a script with a branch for each host: the words that start a program there.
    let branch = |host: usize| {
        let command = network.command(host, "sh");
        let words: Vec<String> =
            std::iter::once(command.get_program()).chain(command.get_args()).map(|word| format!("'{}'", word.to_string_lossy())).collect();
        format!("host-{host}) exec {} -c \"$2\" ;;\n", words.join(" "))
    };
    let branches: String = (0..NUM_HOSTS).map(branch).collect();
    world.write("shell.sh", format!("case $1 in\n{branches}esac\n"));
    let mut command = world.command(&["preflight", "recipe.yaml", "--nodes", &nodes.join(","), "--remote-shell", "sh shell.sh"]);
    // Ten megabits are less than that share of what a bridge in memory carries, however busy the machine is.
    command.args(["--max-slowdown", "1000", "--min-bandwidth-share", "0.03"]);
    let outcome = run_command(&mut command).expect_code(5);
    let report: Value = serde_json::from_str(&outcome.stdout).expect("the verdict is JSON");
    let slow = format!("host-{SLOW_HOST}");
    assert_eq!(bad_nodes(&report), [slow.as_str()], "{report}");
    let reason = report["bad_nodes"][0]["reason"].as_str().expect("a reason");
    assert!(reason.starts_with("3 of its 3 links are slow: "), "{reason}");
    // Every node has been told from the others by its own name.
    let hosts: Vec<&Value> = report["nodes"].as_array().expect("nodes").iter().map(|node| &node["host"]).collect();
    assert_eq!(hosts, ["host-0", "host-1", "host-2", "host-3"]);
}
