//! The text of a sample.

use cloze_recipes::failure::{Failure, FailureKind};

const INPUTS: &str = "{inputs}";
const ANCHOR: &str = "{anchor}";
const TARGET: &str = "{target}";

/// A template cut at its placeholders: prompt, anchor, answer. What is put in is never searched for placeholders.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Template {
    /// What stands between the inputs, before the anchor.
    prompt: Vec<String>,
    /// From the anchor up to the answer.
    before: String,
    /// After the answer.
    after: String,
}

impl Template {
    /// Cuts a template and puts the anchor in. Fails unless inputs, anchor and target come in this order.
    pub(super) fn parse(text: &str, anchor: &str) -> Result<Self, Failure> {
        let wrong = |what: &str| {
            Failure::new(FailureKind::Recipe, format!("template {what}"))
                .at("data.template")
                .expected("`{inputs}`, then `{anchor}`, then `{target}`, as in \"{inputs}\\nAnswer: {anchor} {target}\"")
                .found(format!("{text:?}"))
        };
        let (prompt_and_anchor, after) = text.split_once(TARGET).ok_or_else(|| wrong("has no `{target}`"))?;
        let (prompt, between) = prompt_and_anchor.rsplit_once(ANCHOR).ok_or_else(|| wrong("has no `{anchor}` before `{target}`"))?;
        if between.contains(INPUTS) || after.contains(INPUTS) || after.contains(TARGET) {
            return Err(wrong("has its placeholders in the wrong order"));
        }
        Ok(Self {
            prompt: prompt.replace(ANCHOR, anchor).split(INPUTS).map(str::to_owned).collect(),
            before: format!("{anchor}{between}"),
            after: after.replace(ANCHOR, anchor),
        })
    }

    /// The whole text.
    pub(super) fn render(&self, inputs: &str, target: &str) -> String {
        let mut text = self.prompt.join(inputs);
        text.push_str(&self.tail(target));
        text
    }

    /// The text from the anchor on.
    pub(super) fn tail(&self, target: &str) -> String {
        [self.before.as_str(), target, self.after.as_str()].concat()
    }

    /// From the anchor up to the answer.
    pub(super) fn before(&self) -> &str {
        &self.before
    }

    /// What stands between the inputs and the anchor, such as `Answer: `; empty without inputs.
    pub(super) fn cue(&self) -> &str {
        if self.prompt.len() > 1 { self.prompt.last().map_or("", String::as_str) } else { "" }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_are_filled_and_contents_are_left_alone() {
        let template = Template::parse("Q: {inputs}\nAnswer: {anchor} {target}.", "[A]").unwrap();
        assert_eq!(template.render("what is {target}?", "{inputs}"), "Q: what is {target}?\nAnswer: [A] {inputs}.");
        assert_eq!(template.tail("yes"), "[A] yes.");
        assert_eq!(template.before(), "[A] ");
        assert_eq!(template.cue(), "\nAnswer: ");
    }

    #[test]
    fn inputs_may_be_missing_or_repeated() {
        assert_eq!(Template::parse("{anchor}{target}", "[A]").unwrap().cue(), "");
        let twice = Template::parse("{inputs} {anchor} {inputs} {anchor} {target}", "[A]").unwrap();
        assert_eq!(twice.render("x", "y"), "x [A] x [A] y");
    }

    #[test]
    fn the_order_is_checked() {
        for text in ["{inputs}", "{inputs} {target}", "{anchor} {inputs} {target}", "{target} {anchor}", "{anchor} {target} {target}"] {
            assert_eq!(Template::parse(text, "[A]").unwrap_err().kind, FailureKind::Recipe, "{text}");
        }
    }
}
