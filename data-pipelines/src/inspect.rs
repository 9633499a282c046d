//! Showing the examples of a step as text, with masks and labels visible.

use std::collections::BTreeMap;
use std::io::Write;

use anyhow::Context;
use cloze_recipes::recipe::Auxiliary;

use crate::batch::{BatchSpec, SampleSource, Slot, slots};
use crate::mask::{ExampleKind, MaskSpec, MaskedExample, NOT_SCORED, mask_example};
use crate::tokenizer::Tokenizer;

/// Most kinds of labels in one example's count line; the rest is summed up.
const MAX_LABEL_KINDS: usize = 12;

/// Which examples to show.
#[derive(Clone, Copy, Debug)]
pub struct Inspection<'a> {
    /// The batches they belong to.
    pub spec: &'a BatchSpec,
    /// First step, counted from 0.
    pub step: u64,
    /// Number of examples, from the step's first slot on; they may go into later steps.
    pub count: usize,
}

/// Writes the examples of an inspection, as the model gets them. The same dataset and recipe give the same text.
///
/// Each is a line about the example, its text with line ends as `\n`, and the count of each label. A scored position reads
/// `[shown→label]`: what the model sees there and what it must predict, `MASK` standing for the mask token.
/// Fails where a sample cannot be read or `out` cannot be written.
pub fn inspect<S: SampleSource>(source: &S, tokenizer: &Tokenizer, inspection: &Inspection<'_>, out: &mut dyn Write) -> anyhow::Result<()> {
    let spec = inspection.spec;
    let stream = (inspection.step..).flat_map(|step| slots(&spec.plan, step));
    for slot in stream.take(inspection.count) {
        let sample = source.read(slot.sample)?;
        let example = mask_example(&spec.mask, &slot, &sample);
        let text = example_text(tokenizer, spec.mask.tokens.mask_id, &example);
        let labels = label_counts(tokenizer, &example);
        writeln!(out, "{}", head_line(&slot, source.task_name(sample.task), &spec.mask, &example))
            .and_then(|()| writeln!(out, "  text: {text}\n  labels: {labels}"))
            .context("write the inspected examples")?;
    }
    Ok(())
}

fn head_line(slot: &Slot, task: &str, spec: &MaskSpec, example: &MaskedExample) -> String {
    let kind = match (example.kind, spec.objective.auxiliary) {
        (ExampleKind::Answer, _) => "answer",
        (ExampleKind::Auxiliary, Auxiliary::DummyMlm) => "dummy",
        (ExampleKind::Auxiliary, _) => "mlm",
    };
    let Slot { index, epoch, sample } = slot;
    format!("slot {index}  epoch {epoch}  sample {sample}  task {task}  kind {kind}  length {}", example.input_ids.len())
}

/// The whole text; tokens between scored positions are decoded together, so that characters of several tokens survive.
fn example_text(tokenizer: &Tokenizer, mask_id: u32, example: &MaskedExample) -> String {
    let mut text = String::new();
    let mut plain = Vec::new();
    for (&id, &label) in example.input_ids.iter().zip(&example.labels) {
        if label == NOT_SCORED {
            plain.push(id);
            continue;
        }
        text.push_str(&tokenizer.decode(&plain, false));
        plain.clear();
        let shown = if id == mask_id { "MASK".to_owned() } else { tokenizer.decode(&[id], false) };
        text.push_str(&["[", &shown, "→", &label_text(tokenizer, label), "]"].concat());
    }
    text.push_str(&tokenizer.decode(&plain, false));
    one_line(&text)
}

/// The number of labels, then each with its count, the most frequent first.
fn label_counts(tokenizer: &Tokenizer, example: &MaskedExample) -> String {
    let mut counts: BTreeMap<i32, usize> = BTreeMap::new();
    for &label in example.labels.iter().filter(|&&label| label != NOT_SCORED) {
        *counts.entry(label).or_default() += 1;
    }
    let mut sorted: Vec<(i32, usize)> = counts.into_iter().collect();
    sorted.sort_by_key(|&(label, count)| (std::cmp::Reverse(count), label));
    let shown = sorted.iter().take(MAX_LABEL_KINDS);
    let mut parts: Vec<String> = shown.map(|&(label, count)| format!("{count} x {:?}", label_text(tokenizer, label))).collect();
    let rest: usize = sorted.iter().skip(MAX_LABEL_KINDS).map(|(_, count)| count).sum();
    if rest > 0 {
        parts.push(format!("{rest} x other"));
    }
    format!("{} ({})", example.num_labels(), parts.join(", "))
}

fn label_text(tokenizer: &Tokenizer, label: i32) -> String {
    tokenizer.decode(&[label as u32], false)
}

fn one_line(text: &str) -> String {
    text.replace('\r', "\\r").replace('\n', "\\n")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batch::fixture::{VecSource, batch_spec};
    use crate::dataset::Sample;
    use crate::synth::vocabulary::Vocabulary;

    const TEXT: &str = "Is it good?\nAnswer: [unused0] yes";

    /// A tokenizer in which every word of [`TEXT`] is one token.
    fn tokenizer() -> Tokenizer {
        let folder = tempfile::tempdir().unwrap();
        let vocabulary = Vocabulary::learn(["Is it good?\nAnswer: yes".to_owned()], &["yes", "no"]).unwrap();
        std::fs::write(folder.path().join("tokenizer.json"), vocabulary.tokenizer_json().to_string()).unwrap();
        Tokenizer::load(folder.path()).unwrap()
    }

    /// One sample, so that every slot holds it, whatever the order.
    fn shown(tokenizer: &Tokenizer, count: usize, change: fn(&mut BatchSpec)) -> String {
        let tokens = tokenizer.encode(TEXT, true).unwrap();
        let source = VecSource::new(vec![Sample { answer_position: tokens.len() as u32 - 2, tokens, task: 2 }]);
        let mut spec = batch_spec(&source, 2, 64);
        change(&mut spec);
        let mut out = Vec::new();
        inspect(&source, tokenizer, &Inspection { spec: &spec, step: 3, count }, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    }

    #[test]
    fn answers_show_their_label_and_slots_run_on() {
        let expected = "\
slot 6  epoch 6  sample 0  task third  kind answer  length 12
  text: [CLS]Is it good?\\nAnswer: [unused0][MASK→ yes][SEP]
  labels: 1 (1 x \" yes\")
slot 7  epoch 7  sample 0  task third  kind answer  length 12
  text: [CLS]Is it good?\\nAnswer: [unused0][MASK→ yes][SEP]
  labels: 1 (1 x \" yes\")
slot 8  epoch 8  sample 0  task third  kind answer  length 12
  text: [CLS]Is it good?\\nAnswer: [unused0][MASK→ yes][SEP]
  labels: 1 (1 x \" yes\")
";
        assert_eq!(shown(&tokenizer(), 3, |spec| spec.mask.objective.auxiliary_ratio = 0.0), expected);
    }

    #[test]
    fn auxiliary_examples_show_every_label() {
        let change = |spec: &mut BatchSpec| {
            spec.mask.objective.auxiliary = Auxiliary::Mlm;
            spec.mask.objective.auxiliary_ratio = 1.0;
            spec.mask.objective.mask_probability = 1.0;
        };
        let text = shown(&tokenizer(), 1, change);
        let expected =
            "  text: [CLS][MASK→Is][MASK→ it][MASK→ good][MASK→?][MASK→\\n][MASK→Answer][MASK→:][MASK→ ][MASK→[unused0]][MASK→ yes][SEP]";
        assert_eq!(text.lines().nth(1).unwrap(), expected);
        assert!(text.lines().next().unwrap().contains("kind mlm"));
        assert_eq!(text.lines().nth(2).unwrap().matches("1 x ").count(), 10);
    }

    #[test]
    fn dummy_examples_predict_the_mask() {
        let change = |spec: &mut BatchSpec| {
            spec.mask.objective.auxiliary_ratio = 1.0;
            spec.mask.objective.mask_probability = 0.0;
        };
        let expected = "\
slot 6  epoch 6  sample 0  task third  kind dummy  length 12
  text: [CLS]Is it good?\\nAnswer: [unused0][MASK→[MASK]][SEP]
  labels: 1 (1 x \"[MASK]\")
";
        assert_eq!(shown(&tokenizer(), 1, change), expected);
    }
}
