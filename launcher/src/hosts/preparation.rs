//! What is done on a host before anything is started there.

use std::collections::BTreeMap;

use cloze_recipes::site::Site;
use cloze_recipes::study::Resources;

use super::remote::shell_line;

/// Variables of this program that the other hosts are given as well, where they are set; none is a secret.
const VARIABLES: [&str; 3] = ["CLOZE_WORKER", "CLOZE_TORCH", "CLOZE_LOG"];

/// Modules, variables, lines of shell, those of the recipe after the site's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Preparation {
    modules: Vec<String>,
    environment: BTreeMap<String, String>,
    setup: Vec<String>,
}

impl Preparation {
    /// That of a site, for the resources of a recipe.
    pub fn of(site: &Site, resources: &Resources) -> Self {
        Self {
            modules: [site.modules.clone(), resources.modules.clone()].concat(),
            environment: site.environment.clone().into_iter().chain(resources.environment.clone()).collect(),
            setup: [site.setup.clone(), resources.setup.clone()].concat(),
        }
    }

    /// The words before a command that prepare the host for it.
    pub fn words(&self) -> Vec<String> {
        let own = VARIABLES.iter().filter_map(|name| Some(((*name).to_owned(), std::env::var(name).ok()?)));
        let variables: BTreeMap<String, String> = own.chain(self.environment.clone()).collect();
        let mut words = if variables.is_empty() { Vec::new() } else { vec!["env".to_owned()] };
        words.extend(variables.into_iter().map(|(name, value)| format!("{name}={value}")));
        if !self.modules.is_empty() || !self.setup.is_empty() {
            let modules = self.modules.iter().map(|module| format!("module load {}", shell_line(std::slice::from_ref(module))));
            let lines: Vec<String> = modules.chain(self.setup.iter().cloned()).collect();
            // A login shell knows `module`; the command follows as the script's own arguments.
            let script = format!("set -e\n{}\nexec \"$@\"", lines.join("\n"));
            words.extend(["bash".to_owned(), "-lc".to_owned(), script, "cloze".to_owned()]);
        }
        words
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(text: &str) -> Vec<String> {
        text.split(',').map(str::to_owned).collect()
    }

    #[test]
    fn a_host_is_prepared_by_the_words_before_the_command() {
        let preparation = Preparation {
            modules: vec!["a b".to_owned()],
            environment: BTreeMap::from([("NAME".to_owned(), "two words".to_owned())]),
            setup: vec!["module() { :; }".to_owned(), "LINE=set; export LINE".to_owned()],
        };
        let words = Preparation { modules: Vec::new(), ..preparation.clone() }.words();
        let command =
            [words, names("sh,-c").into_iter().chain(["echo $NAME $LINE \"$0\"".to_owned(), "it's".to_owned()]).collect()].concat();
        let output = std::process::Command::new("sh").args(["-c", &shell_line(&command)]).output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap().lines().last(), Some("two words set it's"));
        assert!(preparation.words().iter().any(|word| word.contains("set -e\nmodule load 'a b'\n")));
    }
}
