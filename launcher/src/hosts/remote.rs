//! One host, and how a command line gets there.

use std::process::Command;

/// A host, and the words that start a command on it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RemoteHost {
    /// Its name, for people and in measurements.
    pub name: String,
    /// Program and arguments that stand before the command, such as `ssh -o BatchMode=yes a` or `srun --nodelist=a --ntasks=1`. Empty
    /// is this machine.
    pub prefix: Vec<String>,
    /// How the command follows.
    pub form: CommandForm,
}

/// How a command follows the prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CommandForm {
    /// As it is, word by word; whoever stands before starts it without a shell, as `srun` does.
    Words,
    /// As one quoted line for a shell at the other end, as `ssh` wants it.
    Line,
}

impl RemoteHost {
    /// A host that a remote shell reaches: `command`, the host, and one quoted command line.
    pub fn by_shell(name: &str, command: &[String]) -> Self {
        let prefix = command.iter().cloned().chain([name.to_owned()]).collect();
        Self { name: name.to_owned(), prefix, form: CommandForm::Line }
    }

    /// This machine, under a name.
    pub fn here(name: &str) -> Self {
        Self { name: name.to_owned(), prefix: Vec::new(), form: CommandForm::Words }
    }

    /// A host of a list: this machine, under the name that it has, where the list means it.
    pub fn of(name: &str, command: &[String], here: &str) -> Self {
        if is_name_of(name, here) { Self::here(here) } else { Self::by_shell(name, command) }
    }

    /// Whether commands are started here.
    pub fn is_here(&self) -> bool {
        self.prefix.is_empty()
    }

    /// The command that starts these words on the host. There must be at least one word.
    pub fn command(&self, words: &[String]) -> Command {
        let mut all = self.prefix.clone();
        match self.form {
            CommandForm::Words => all.extend_from_slice(words),
            CommandForm::Line => all.push(shell_line(words)),
        }
        let mut all = all.into_iter();
        let mut command = Command::new(all.next().unwrap_or_default());
        command.args(all);
        command
    }
}

/// Whether a name in a list of hosts means the machine that is called `here`: by that name, without its domain, or as `localhost`.
pub fn is_name_of(name: &str, here: &str) -> bool {
    name == "localhost" || name == here || here.split('.').next() == Some(name)
}

/// Words as one line that a POSIX shell reads back as the same words.
pub fn shell_line(words: &[String]) -> String {
    words.iter().map(|word| quoted(word)).collect::<Vec<_>>().join(" ")
}

/// In single quotes nothing means anything but a single quote, which is written `'\''`.
fn quoted(word: &str) -> String {
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"_-./:,+@%".contains(&byte);
    if !word.is_empty() && word.bytes().all(is_plain) { word.to_owned() } else { format!("'{}'", word.replace('\'', r"'\''")) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(list: &[&str]) -> Vec<String> {
        list.iter().map(|&word| word.to_owned()).collect()
    }

    #[test]
    fn a_shell_reads_the_same_words_back() {
        let cases = [
            "plain",
            "",
            " ",
            "two words",
            "it's",
            "''",
            "$HOME",
            "`id`",
            "a;b",
            "a&&b|c",
            "\"q\"",
            "\\",
            "*",
            "~",
            "~root",
            "#c",
            "!x",
            "a=b",
            "=ls",
            "line\nbreak",
            "\t",
            "ü",
            "(x)",
            "<>",
            "{a,b}",
            "[a]",
            "-n",
            "a\\'b",
        ];
        let line = shell_line(&words(&["printf", "%s\\0"])) + " " + &shell_line(&words(&cases));
        for shell in ["sh", "bash"] {
            let Ok(output) = Command::new(shell).args(["-c", &line]).output() else { continue };
            let read: Vec<String> = String::from_utf8(output.stdout).unwrap().split_terminator('\0').map(str::to_owned).collect();
            assert_eq!(read, words(&cases), "{shell}");
        }
    }

    #[test]
    fn the_command_follows_its_prefix_in_its_form() {
        let shown = |host: &RemoteHost| {
            let command = host.command(&words(&["cloze", "join", "my run"]));
            std::iter::once(command.get_program())
                .chain(command.get_args())
                .map(|word| word.to_string_lossy().into_owned())
                .collect::<Vec<_>>()
        };
        let ssh = RemoteHost::by_shell("a", &words(&["ssh", "-o", "BatchMode=yes"]));
        assert_eq!(shown(&ssh), ["ssh", "-o", "BatchMode=yes", "a", "cloze join 'my run'"]);
        let srun = RemoteHost { name: "a".into(), prefix: words(&["srun", "--nodelist=a"]), form: CommandForm::Words };
        assert_eq!(shown(&srun), ["srun", "--nodelist=a", "cloze", "join", "my run"]);
        assert_eq!(shown(&RemoteHost::here("a")), ["cloze", "join", "my run"]);
    }
}
