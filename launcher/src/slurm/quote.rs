//! Text that goes into a shell, quoted by one function.

use cloze_recipes::failure::{Failure, FailureKind};

/// One word of a shell's command line that stands for exactly this text. Fails with kind `Recipe` on control characters: a line end
/// would begin a line of its own in a script, and others would not be seen by whoever reads it.
pub fn shell_word(text: &str) -> Result<String, Failure> {
    refuse_control_characters(text)?;
    let is_plain = |letter: char| letter.is_ascii_alphanumeric() || "-_./:=,+@%^".contains(letter);
    if !text.is_empty() && text.chars().all(is_plain) {
        return Ok(text.to_owned());
    }
    Ok(format!("'{}'", text.replace('\'', r"'\''")))
}

/// The words of a command, each quoted.
pub fn shell_words(words: &[String]) -> Result<String, Failure> {
    Ok(words.iter().map(|word| shell_word(word)).collect::<Result<Vec<_>, _>>()?.join(" "))
}

/// A line of shell that stands as it is, as in `setup`.
pub fn shell_line(text: &str) -> Result<&str, Failure> {
    refuse_control_characters(text)?;
    Ok(text)
}

/// An option of `sbatch` behind `#SBATCH`. The batch system reads that line itself: it takes quotes away and ends an option at a space.
pub fn directive(option: &str) -> Result<String, Failure> {
    refuse_control_characters(option)?;
    if option.contains('"') || option.contains('\\') {
        return Err(refused("an option of the batch system cannot hold a quote or a backslash", option));
    }
    let needs_quotes = option.chars().any(|letter| letter.is_whitespace() || "#'".contains(letter));
    Ok(if needs_quotes { format!("#SBATCH \"{option}\"") } else { format!("#SBATCH {option}") })
}

/// Name of a variable that a shell can set.
pub fn variable_name(name: &str) -> Result<&str, Failure> {
    let starts_well = name.chars().next().is_some_and(|letter| letter.is_ascii_alphabetic() || letter == '_');
    if starts_well && name.chars().all(|letter| letter.is_ascii_alphanumeric() || letter == '_') {
        return Ok(name);
    }
    Err(refused("this is no name of a variable", name).expected("letters, digits and `_`, no digit first"))
}

fn refuse_control_characters(text: &str) -> Result<(), Failure> {
    match text.chars().find(|letter| letter.is_control()) {
        None => Ok(()),
        Some(letter) => Err(refused("a control character cannot go into a script", text).at(format!("character {letter:?}"))),
    }
}

fn refused(what: &str, text: &str) -> Failure {
    Failure::new(FailureKind::Recipe, what).found(format!("{text:?}"))
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn a_shell_gives_the_text_back() {
        let texts =
            ["", "plain-1.0/a", "two words", "it's", "$HOME `id` $(id)", "a\\b", "\"x\"", "*?[]{}~!#&;|<>", "'", "-n", "ä ö", "a=b c"];
        for text in texts {
            let script = format!("printf %s {}", shell_word(text).unwrap());
            let output = Command::new("/bin/sh").args(["-c", &script]).output().unwrap();
            assert_eq!(String::from_utf8(output.stdout).unwrap(), text, "{script}");
        }
        assert_eq!(shell_words(&["a b".to_owned(), "c".to_owned()]).unwrap(), "'a b' c");
    }

    #[test]
    fn what_could_begin_a_line_is_refused() {
        for text in ["a\nrm -rf /", "a\rb", "a\0b", "\u{1b}[2J", "a\u{85}b"] {
            assert!(shell_word(text).is_err() && shell_line(text).is_err() && directive(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn directives_and_names() {
        assert_eq!(directive("--comment=two words").unwrap(), "#SBATCH \"--comment=two words\"");
        assert_eq!(directive("--partition=a,b").unwrap(), "#SBATCH --partition=a,b");
        assert!(directive("--comment=\"x\"").is_err());
        for (name, is_good) in [("A_1", true), ("_x", true), ("1A", false), ("A-B", false), ("A;id", false), ("", false)] {
            assert_eq!(variable_name(name).is_ok(), is_good, "{name}");
        }
    }
}
