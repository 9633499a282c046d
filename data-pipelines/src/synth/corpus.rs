//! Writing a generated corpus.

use std::io::Write;
use std::path::Path;

use anyhow::Context;
use flate2::Compression;
use flate2::write::GzEncoder;
use serde::Serialize;

use super::dice::Dice;
use super::files::{part_name, prepare_folder, remove_parts_from};
use super::instances::Instance;
use super::tasks::{EVALUATION_FILES, EvaluationFile, TASKS, Task};
use super::vocabulary::{Vocabulary, check_answers, tokenizer_config};
use super::words::answer_words;
use crate::files::write_whole;

/// Rows of one training file.
const ROWS_PER_PART: u64 = 5000;

/// Rows of one evaluation file.
const ROWS_PER_EVALUATION_FILE: u64 = 200;

/// Training rows from which the vocabulary is learnt, whatever the size of the corpus: one seed, one tokenizer.
const VOCABULARY_ROWS: u64 = 4000;

/// Instances tried until one has an answer among an evaluation file's labels. At least half of every task's have.
const MAX_TRIES: usize = 100;

/// What to generate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SynthOptions {
    /// Decides every row.
    pub seed: u64,
    /// Training rows.
    pub examples: u64,
}

/// What was generated.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SynthReport {
    /// Training rows, those of held-out templates included.
    pub examples: u64,
    /// Training rows of held-out templates.
    pub held_out_examples: u64,
    /// Training files.
    pub parts: usize,
    /// Number of tasks.
    pub tasks: usize,
    /// Evaluation files.
    pub evaluation_files: usize,
    /// Rows of all evaluation files.
    pub evaluation_rows: u64,
    /// Tokens of the tokenizer.
    pub vocab_size: usize,
}

/// A row in FLAN's form.
#[derive(Serialize)]
struct TrainingRow {
    inputs: String,
    targets: String,
    task_name: &'static str,
    task_source: &'static str,
    template_type: String,
}

/// A row to score.
#[derive(Serialize)]
struct EvaluationRow {
    inputs: String,
    targets: String,
}

/// Writes a corpus to `out`: `train/part-0000.jsonl.gz` and on, `eval/*.jsonl`, `tokenizer.json` and `tokenizer_config.json`.
///
/// The same options give the same bytes. Rows of held-out templates, the only ones in the evaluation files, carry a template
/// type `zs_held_out_N`, the others `zs_N`. Fails where the folder holds something else or a file cannot be written.
pub fn synth(out: &Path, options: &SynthOptions) -> anyhow::Result<SynthReport> {
    let evaluation_names: Vec<String> = EVALUATION_FILES.iter().map(evaluation_name).collect();
    prepare_folder(out, &evaluation_names)?;
    let vocabulary = write_tokenizer(out, options.seed)?;
    let (parts, held_out_examples) = write_training(&out.join("train"), options)?;
    for (number, file) in EVALUATION_FILES.iter().enumerate() {
        let lines = evaluation_lines(options.seed, number, file)?;
        write_whole(&out.join("eval").join(evaluation_name(file)), &lines)?;
    }
    Ok(SynthReport {
        examples: options.examples,
        held_out_examples,
        parts,
        tasks: TASKS.len(),
        evaluation_files: EVALUATION_FILES.len(),
        evaluation_rows: EVALUATION_FILES.len() as u64 * ROWS_PER_EVALUATION_FILE,
        vocab_size: vocabulary.len(),
    })
}

fn evaluation_name(file: &EvaluationFile) -> String {
    format!("{}.jsonl", file.name)
}

fn write_tokenizer(out: &Path, seed: u64) -> anyhow::Result<Vocabulary> {
    let texts = (0..VOCABULARY_ROWS).map(|row| {
        let row = training_row(seed, row);
        format!("{}\nAnswer: {}", row.inputs, row.targets)
    });
    let vocabulary = Vocabulary::learn(texts, &answer_words())?;
    let bytes = pretty(&vocabulary.tokenizer_json())?;
    check_answers(&bytes, &answer_words())?;
    write_whole(&out.join("tokenizer.json"), &bytes)?;
    write_whole(&out.join("tokenizer_config.json"), &pretty(&tokenizer_config())?)?;
    Ok(vocabulary)
}

fn pretty(value: &serde_json::Value) -> anyhow::Result<Vec<u8>> {
    let mut bytes = serde_json::to_vec_pretty(value).context("serialise a tokenizer file")?;
    bytes.push(b'\n');
    Ok(bytes)
}

/// Writes the training files; returns how many there are and how many rows are of held-out templates.
fn write_training(train: &Path, options: &SynthOptions) -> anyhow::Result<(usize, u64)> {
    let mut held_out = 0;
    let num_parts = options.examples.div_ceil(ROWS_PER_PART);
    for part in 0..num_parts {
        let mut lines = Vec::new();
        for number in part * ROWS_PER_PART..((part + 1) * ROWS_PER_PART).min(options.examples) {
            let row = training_row(options.seed, number);
            held_out += u64::from(row.template_type.contains("held_out"));
            serde_json::to_writer(&mut lines, &row).context("serialise a training row")?;
            lines.push(b'\n');
        }
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(&lines).context("compress a training file")?;
        let bytes = encoder.finish().context("compress a training file")?;
        write_whole(&train.join(part_name(part as usize)), &bytes)?;
    }
    remove_parts_from(train, num_parts as usize)?;
    Ok((num_parts as usize, held_out))
}

fn training_row(seed: u64, number: u64) -> TrainingRow {
    let dice = &mut Dice::training(seed, number);
    let task = &TASKS[dice.below(TASKS.len())];
    let num_templates = task.family.templates.len();
    let choice = dice.below(num_templates + task.family.held_out.len());
    let (template, template_type) = match choice.checked_sub(num_templates) {
        None => (task.family.templates[choice], format!("zs_{choice}")),
        Some(held_out) => (task.family.held_out[held_out], format!("zs_held_out_{held_out}")),
    };
    let instance = (task.make)(dice);
    TrainingRow { inputs: render(template, &instance), targets: instance.answer, task_name: task.name, task_source: "Synth", template_type }
}

/// The lines of an evaluation file: its family's tasks in turn, held-out templates only, answers among the labels only.
fn evaluation_lines(seed: u64, file_number: usize, file: &EvaluationFile) -> anyhow::Result<Vec<u8>> {
    let tasks: Vec<&Task> = TASKS.iter().filter(|task| task.family.name == file.family.name).collect();
    let mut lines = Vec::new();
    for number in 0..ROWS_PER_EVALUATION_FILE {
        let dice = &mut Dice::evaluation(seed, file_number as u64, number);
        let task = tasks[number as usize % tasks.len()];
        let instance = (0..MAX_TRIES).map(|_| (task.make)(dice)).find(|instance| file.labels.contains(&instance.answer.as_str()));
        let instance = instance.with_context(|| format!("find an instance of {} whose answer is a label", task.name))?;
        let row = EvaluationRow { inputs: render(dice.pick(file.family.held_out), &instance), targets: instance.answer };
        serde_json::to_writer(&mut lines, &row).context("serialise an evaluation row")?;
        lines.push(b'\n');
    }
    Ok(lines)
}

/// Fills the places of a template. No value holds a brace, so the order of the places does not matter.
fn render(template: &str, instance: &Instance) -> String {
    instance.fields.iter().fold(template.to_owned(), |text, (name, value)| text.replace(&format!("{{{name}}}"), value))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::fs;
    use std::io::Read;

    use flate2::read::GzDecoder;
    use serde_json::Value;

    use super::*;

    fn read_tree(folder: &Path) -> BTreeMap<String, Vec<u8>> {
        let mut files = BTreeMap::new();
        for part in ["", "train", "eval"] {
            for entry in fs::read_dir(folder.join(part)).unwrap() {
                let path = entry.unwrap().path();
                if path.is_file() {
                    files.insert(path.strip_prefix(folder).unwrap().display().to_string(), fs::read(&path).unwrap());
                }
            }
        }
        files
    }

    fn rows(bytes: &[u8]) -> Vec<Value> {
        std::str::from_utf8(bytes).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
    }

    fn unzip(bytes: &[u8]) -> Vec<u8> {
        let mut text = Vec::new();
        GzDecoder::new(bytes).read_to_end(&mut text).unwrap();
        text
    }

    #[test]
    fn the_same_options_give_the_same_files() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let options = SynthOptions { seed: 3, examples: 5100 };
        let report = synth(first.path(), &options).unwrap();
        // A larger corpus of another seed lies there before, and leaves nothing behind.
        synth(second.path(), &SynthOptions { seed: 4, examples: 10_001 }).unwrap();
        assert_eq!(synth(second.path(), &options).unwrap(), report);
        let files = read_tree(first.path());
        assert_eq!(files, read_tree(second.path()));
        let names: Vec<&str> = files.keys().map(String::as_str).collect();
        let expected = [
            "eval/arithmetic.jsonl",
            "eval/choice.jsonl",
            "eval/entailment.jsonl",
            "eval/lookup.jsonl",
            "eval/sentiment.jsonl",
            "tokenizer.json",
            "tokenizer_config.json",
            "train/part-0000.jsonl.gz",
            "train/part-0001.jsonl.gz",
        ];
        assert_eq!(names, expected);
        assert_eq!((report.examples, report.parts, report.tasks, report.evaluation_rows), (5100, 2, TASKS.len(), 1000));
        assert!(report.vocab_size <= 1024);
    }

    #[test]
    fn training_rows_are_in_flan_form_and_evaluation_rows_are_held_out() {
        let folder = tempfile::tempdir().unwrap();
        let report = synth(folder.path(), &SynthOptions { seed: 9, examples: 2000 }).unwrap();
        let files = read_tree(folder.path());
        let training = rows(&unzip(&files["train/part-0000.jsonl.gz"]));
        assert_eq!(training.len(), 2000);
        let held_out = training.iter().filter(|row| row["template_type"].as_str().unwrap().starts_with("zs_held_out_")).count();
        assert_eq!(held_out as u64, report.held_out_examples);
        assert!((200..700).contains(&held_out), "{held_out}");
        for row in &training {
            assert_eq!(
                row.as_object().unwrap().keys().collect::<Vec<_>>(),
                ["inputs", "targets", "task_name", "task_source", "template_type"]
            );
            assert!(row["template_type"].as_str().unwrap().starts_with("zs_"));
        }
        for file in &EVALUATION_FILES {
            let rows = rows(&files[&format!("eval/{}.jsonl", file.name)]);
            assert_eq!(rows.len() as u64, ROWS_PER_EVALUATION_FILE);
            for label in file.labels {
                let count = rows.iter().filter(|row| row["targets"] == *label).count();
                assert!(count > 0, "{}: no row has the answer {label}", file.name);
            }
            assert!(rows.iter().all(|row| file.labels.contains(&row["targets"].as_str().unwrap())));
        }
    }

    #[test]
    fn texts_are_short_and_some_answers_are_for_the_filter() {
        let folder = tempfile::tempdir().unwrap();
        synth(folder.path(), &SynthOptions { seed: 1, examples: 1 }).unwrap();
        let tokenizer = tokenizers::Tokenizer::from_file(folder.path().join("tokenizer.json")).unwrap();
        let length = |text: String| tokenizer.encode(text, true).unwrap().len();
        let empty = length("Answer: [unused0]".to_owned());
        let mut several = 0;
        for number in 0..3000 {
            let row = training_row(1, number);
            assert!(length(row.inputs.clone()) <= 60, "{}", row.inputs);
            several += usize::from(length(format!("Answer: [unused0] {}", row.targets)) > empty + 1);
        }
        assert!((10..300).contains(&several), "{several}");
    }
}
