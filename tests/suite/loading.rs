//! `cloze` starts on a machine without libtorch; only the worker needs it.

use std::process::Command;

use crate::sandbox::{CLOZE, WORKER, run_command};

fn libraries(program: &str) -> String {
    let mut command = Command::new("ldd");
    command.arg(program).env_remove("LD_LIBRARY_PATH");
    run_command(&mut command).expect_code(0).stdout
}

#[test]
fn only_the_worker_needs_libtorch() {
    let of_cloze = libraries(CLOZE);
    assert!(of_cloze.contains("libc.so") && !of_cloze.contains("torch"), "{of_cloze}");
    assert!(libraries(WORKER).contains("libtorch_cpu.so"), "the worker does not need it either, so the test says nothing");
    let mut command = Command::new(CLOZE);
    let outcome = run_command(command.arg("--version").env_clear()).expect_code(0);
    assert!(outcome.stdout.starts_with("cloze "), "{}", outcome.stdout);
}

#[test]
fn a_missing_worker_is_the_machines_fault() {
    let mut command = Command::new(CLOZE);
    command.args(["predict", "--model", "model", "text"]).env("CLOZE_WORKER", "/nowhere/cloze-worker");
    run_command(&mut command).expect_code(5).expect_words(&["error: the worker binary is not there", "/nowhere/cloze-worker", "hint: "]);
}
