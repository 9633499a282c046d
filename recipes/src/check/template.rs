//! Templates: which placeholders occur, and how often.

use super::Context;

/// Checks the template of the training samples.
pub(super) fn check_training(context: &mut Context<'_>, path: &str, template: &str) {
    expect_once(context, path, template, "{target}");
    if !template.contains("{inputs}") {
        context.problem(path, "found no `{inputs}`, expected it at least once");
    }
    expect_once(context, path, template, "{anchor}");
    let place = |placeholder| template.find(placeholder);
    if let (Some(anchor), Some(target)) = (place("{anchor}"), place("{target}"))
        && anchor > target
    {
        context.problem(path, "found `{target}` before `{anchor}`, expected the anchor first");
    }
    if let (Some(anchor), Some(inputs)) = (place("{anchor}"), template.rfind("{inputs}"))
        && inputs > anchor
    {
        context.problem(path, "found `{inputs}` after `{anchor}`, expected the inputs first");
    }
    for name in placeholders(template) {
        let is_identifier = name.chars().all(|character| character.is_ascii_alphanumeric() || character == '_');
        if is_identifier && !["inputs", "anchor", "target"].contains(&name) {
            context.mismatch(path, format!("`{{{name}}}`"), "`{inputs}`, `{anchor}` or `{target}`");
        }
    }
}

/// Checks the prompt of an evaluation task; `columns` is empty where the files bring their own names.
pub(super) fn check_evaluation(context: &mut Context<'_>, path: &str, template: &str, columns: &[String]) {
    expect_once(context, path, template, "{mask}");
    expect_at_most_once(context, path, template, "{anchor}");
    if columns.is_empty() {
        return;
    }
    for name in placeholders(template) {
        if name != "anchor" && name != "mask" && !columns.iter().any(|column| column == name) {
            context.mismatch(
                path,
                format!("`{{{name}}}`"),
                format!("`{{anchor}}`, `{{mask}}` or one of the columns {}", columns.join(", ")),
            );
        }
    }
}

fn expect_once(context: &mut Context<'_>, path: &str, template: &str, placeholder: &str) {
    let count = template.matches(placeholder).count();
    if count != 1 {
        context.mismatch(path, format!("`{placeholder}` {count} times"), "it once");
    }
}

fn expect_at_most_once(context: &mut Context<'_>, path: &str, template: &str, placeholder: &str) {
    let count = template.matches(placeholder).count();
    if count > 1 {
        context.mismatch(path, format!("`{placeholder}` {count} times"), "it at most once");
    }
}

/// The texts between braces on one line.
fn placeholders(template: &str) -> Vec<&str> {
    let mut found = Vec::new();
    let mut rest = template;
    while let Some(open) = rest.find('{') {
        rest = &rest[open + 1..];
        let Some(end) = rest.find(['{', '}', '\n']) else { break };
        if end > 0 && rest[end..].starts_with('}') {
            found.push(&rest[..end]);
        }
        rest = &rest[end..];
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn placeholders_stand_between_braces() {
        let table: [(&str, &[&str]); 6] = [
            ("{inputs}\nAnswer: {anchor} {target}", &["inputs", "anchor", "target"]),
            ("none", &[]),
            ("{} {{a}} {b", &["a"]),
            ("{line\nbreak} {c}", &["c"]),
            ("{Question text}", &["Question text"]),
            ("{", &[]),
        ];
        for (template, expected) in table {
            assert_eq!(placeholders(template), expected, "{template}");
        }
    }
}
