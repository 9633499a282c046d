//! Ports and endpoints that are not as they should be.

use std::net::TcpListener;
use std::time::{Duration, Instant};

use crate::sandbox::{World, run_command};

#[test]
fn a_taken_port_is_named() {
    let world = World::prepared();
    let taken = TcpListener::bind("127.0.0.1:0").expect("take a port");
    let address = taken.local_addr().expect("read the port").to_string();
    let outcome = world.cloze(&["train", "recipe.yaml", "--run", "run", "--listen", &address]).expect_code(5);
    outcome.expect_words(&["error: the coordinator cannot listen", &address, "Address already in use", "hint: "]);
    drop(taken);
    // Nothing was left behind, so the same command works once the port is free.
    assert!(!world.path("run").exists());
    world.done(&["train", "recipe.yaml", "--run", "run", "--listen", &address]);
    assert_eq!(world.run("run").last_step(), 40);
}

/// A port at which nothing listens, and one at which somebody takes connections and never answers.
#[test]
fn an_endpoint_that_is_gone_or_silent_is_told_in_bounded_time() {
    let world = World::with_corpus(200);
    let silent = TcpListener::bind("127.0.0.1:0").expect("take a port");
    let gone = TcpListener::bind("127.0.0.1:0").expect("take a port");
    let [silent_port, gone_port] = [&silent, &gone].map(|listener| listener.local_addr().expect("read the port").port());
    drop(gone);
    for (port, cause) in [(gone_port, "Connection refused"), (silent_port, "operation timed out")] {
        // One second for a request instead of thirty, so that the test does not take minutes.
        let options = format!("{{endpoint: 'http://127.0.0.1:{port}', allow_http: 'true', timeout: '1 second'}}");
        let sources = format!("data.sources=[{{url: 's3://bucket/corpus', options: {options}}}]");
        let mut command = world.command(&["data", "prepare", "recipe.yaml", "--set", &sources]);
        command.env("AWS_ACCESS_KEY_ID", "key").env("AWS_SECRET_ACCESS_KEY", "secret-2b7e");
        let started = Instant::now();
        let outcome = run_command(&mut command).expect_code(6);
        assert!(started.elapsed() < Duration::from_secs(50), "{:?}", started.elapsed());
        assert!(!outcome.stderr.contains("secret-2b7e"));
        outcome.expect_words(&["s3://bucket/corpus", &format!("127.0.0.1:{port}"), cause, "hint: check the endpoint"]);
    }
    drop(silent);
}
