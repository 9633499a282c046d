//! Bad input is named by file and line, prepared data is checked, and an interrupted preparation goes on.

use std::fs;
use std::path::Path;
use std::time::{Duration, SystemTime};

use regex::Regex;

use crate::sandbox::{Outcome, Process, RECIPE, World, flip_middle_byte, wait_until};

const GOOD_LINE: &[u8] = b"{\"inputs\": \"Is it good?\", \"targets\": \"yes\", \"task_name\": \"t\"}\n";

/// Prepares one file into a folder of its own, which must fail and leave no manifest.
fn refused(world: &World, file: &str) -> Outcome {
    let sources = format!("data.sources=[{{url: {file}}}]");
    let outcome = world.cloze(&["data", "prepare", RECIPE, "--set", "data.output=other", "--set", &sources]).expect_code(4);
    assert!(!world.path("other/manifest.json").exists());
    outcome
}

#[test]
fn bad_input_is_named_by_file_and_line() {
    let world = World::with_corpus(2000);
    refused(&world, "none.jsonl").expect_words(&["/none.jsonl", "no such file", "hint: "]);

    let packed = world.read("corpus/train/part-0000.jsonl.gz");
    world.write("cut.jsonl.gz", &packed[..packed.len() / 2]);
    let outcome = refused(&world, "cut.jsonl.gz").expect_words(&["cut off or damaged", "hint: "]);
    let with_line = Regex::new(r"where: .*/cut\.jsonl\.gz:[1-9][0-9]*\n").expect("a regular expression");
    assert!(with_line.is_match(&outcome.stderr), "{}", outcome.stderr);

    let cases: [(&str, &[u8], &str, &str); 4] = [
        ("not-utf8.jsonl", b"{\"inputs\": \"caf\xe9\", \"targets\": \"yes\"}\n", "not-utf8.jsonl:3", "UTF-8"),
        ("bare.jsonl", b"{\"inputs\": \"Is it?\"}\n", "bare.jsonl:3", "`targets`"),
        ("number.jsonl", b"{\"inputs\": 7, \"targets\": \"yes\"}\n", "number.jsonl:3", "`inputs`"),
        ("broken.jsonl", b"{\"inputs\": \"Is it?\", \n", "broken.jsonl:3", "JSON"),
    ];
    for (file, line, place, word) in cases {
        world.write(file, [GOOD_LINE, GOOD_LINE, line, GOOD_LINE].concat());
        refused(&world, file).expect_words(&[place, word, "hint: "]);
    }
}

#[test]
fn another_tokenizer_than_the_datas_is_refused_with_both_hashes() {
    let world = World::prepared();
    let tokenizer = world.read("corpus/tokenizer.json");
    // One more space changes no token, and yet it is another file.
    let other = [tokenizer.as_slice(), b" "].concat();
    world.write("other.json", &other);
    let hashes = [&tokenizer, &other].map(|bytes| blake3::hash(bytes).to_hex().to_string());
    let arguments = ["train", RECIPE, "--run", "run", "--set", "model.tokenizer=other.json"];
    let outcome = world.cloze(&arguments).expect_code(8);
    outcome.expect_words(&["error: the data was prepared with another tokenizer", &hashes[0], &hashes[1], "hint: prepare the data again"]);
    assert!(world.run("run").events_named("step").is_empty());
}

#[test]
fn a_damaged_shard_is_named() {
    let world = World::prepared();
    flip_middle_byte(&world.path("prepared/shard-00000.arrow"));
    let words = ["error: shard ", "/prepared/shard-00000.arrow", "expected: ", "hint: "];
    world.cloze(&["data", "verify", RECIPE]).expect_code(7).expect_words(&words);
    world.cloze(&["train", RECIPE, "--run", "run"]).expect_code(7).expect_words(&words);
}

/// Names and contents of the visible files of a folder, and when they were written.
fn snapshot(folder: &Path) -> Vec<(String, Vec<u8>, SystemTime)> {
    let entries = fs::read_dir(folder).expect("list a folder").map(|entry| entry.expect("list a folder"));
    let visible = entries.filter(|entry| !entry.file_name().to_string_lossy().starts_with('.'));
    let mut files: Vec<(String, Vec<u8>, SystemTime)> = visible
        .map(|entry| {
            let written = entry.metadata().and_then(|metadata| metadata.modified()).expect("look at a file");
            let content = fs::read(entry.path()).expect("read a file");
            (entry.file_name().to_string_lossy().into_owned(), content, written)
        })
        .collect();
    files.sort();
    files
}

fn finished_parts(folder: &Path) -> usize {
    let entries = fs::read_dir(folder.join(".parts")).into_iter().flatten().filter_map(Result::ok);
    entries.filter(|entry| entry.path().extension().is_some_and(|extension| extension == "part")).count()
}

#[test]
fn an_interrupted_preparation_goes_on_to_the_same_bytes() {
    let world = World::with_corpus(200_000);
    let prepare = |output: &'static str| ["data", "prepare", RECIPE, "--set", output, "--set", "data.cap_per_task=2000"];
    let process = Process::start(&mut world.command(&prepare("data.output=killed")), "");
    let killed = world.path("killed");
    wait_until("some files are read", Duration::from_secs(90), || finished_parts(&killed) >= 3);
    process.kill();
    assert!(snapshot(&killed).is_empty(), "the kill came too late");

    let outcome = world.done(&prepare("data.output=killed"));
    let goes_on = Regex::new(r"^40 files, [\d.]+ MiB; ([1-9]\d*) finished before\n").expect("a regular expression");
    assert!(goes_on.is_match(&outcome.stderr), "{}", outcome.stderr);
    world.done(&prepare("data.output=whole"));
    let contents = |folder: &str| snapshot(&world.path(folder)).into_iter().map(|(name, bytes, _)| (name, bytes)).collect::<Vec<_>>();
    let whole = contents("whole");
    assert!(whole.len() >= 2, "a manifest and shards");
    assert!(contents("killed") == whole, "the interrupted preparation ended in other bytes");
}

#[test]
fn a_second_preparation_does_nothing_until_the_input_changes() {
    let world = World::prepared();
    let before = snapshot(&world.path("prepared"));
    world.done(&["data", "prepare", RECIPE]).expect_words(&["already prepared, nothing to do"]);
    assert!(snapshot(&world.path("prepared")) == before, "files were written again");

    world.write("corpus/train/more.jsonl", GOOD_LINE);
    let outcome = world.cloze(&["data", "prepare", RECIPE]).expect_code(8);
    outcome.expect_words(&["was prepared from something else", "more.jsonl is new", "hint: prepare it again with `--force`"]);
    assert!(snapshot(&world.path("prepared")) == before, "what was prepared was touched");
    world.done(&["data", "prepare", RECIPE, "--force"]);
    assert!(snapshot(&world.path("prepared")) != before);
    world.done(&["data", "verify", RECIPE]);
}

/// What was held out, cut and filtered must be what the run's recipe says; another seed may share the data.
#[test]
fn data_of_another_recipe_is_refused_and_another_seed_is_not() {
    let world = World::prepared();
    let outcome = world.cloze(&["train", "recipe.yaml", "--run", "run", "--set", "data.hold_out=[sentiment]"]).expect_code(8);
    outcome.expect_words(&["error: the data was prepared by another recipe", "data.hold_out was ", "hint: "]);
    assert!(!world.path("run").exists());
    world.cloze(&["data", "inspect", "recipe.yaml", "--set", "data.max_length=64"]).expect_code(8);
    world.done(&["train", "recipe.yaml", "--run", "run", "--set", "seed=7", "--set", "train.steps=3"]);
}

/// Nothing is written into a folder that holds the user's own files.
#[test]
fn an_output_folder_with_other_files_is_refused() {
    let world = World::with_corpus(50);
    std::fs::create_dir(world.path("mine")).expect("make a folder");
    world.write("mine/notes.txt", "keep me");
    let outcome = world.cloze(&["data", "prepare", "recipe.yaml", "--set", "data.output=mine"]).expect_code(3);
    outcome.expect_words(&["error: the output folder holds something else", "notes.txt"]);
    assert_eq!(std::fs::read_dir(world.path("mine")).expect("read the folder").count(), 1);
}
