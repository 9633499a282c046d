//! Whole recipe files: sections around the run, trials, profiles, earlier stages, and what is wrong with them.

mod errors;
mod papers;
mod right;

use std::path::{Path, PathBuf};

use crate::failure::Failure;

/// A run without sections around it; its evaluation has the tasks `t` and `u`.
const RUN: &str = "version: 1
name: demo
model: {preset: tiny, tokenizer: t}
data: {sources: [{url: corpus}], output: out, max_length: 128}
train: {steps: 10, batch_examples: 4, micro_batch_tokens: 256, learning_rate: 1e-3}
evaluation: [{name: t, files: [f], labels: [{value: a}, {value: b}]}, {name: u, files: [f], labels: [{value: a}, {value: b}]}]
";

/// A folder with recipe files, its path free of links.
struct Files {
    _folder: tempfile::TempDir,
    path: PathBuf,
}

impl Files {
    fn new(files: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().canonicalize().unwrap();
        for (name, text) in files {
            std::fs::create_dir_all(path.join(name).parent().unwrap()).unwrap();
            std::fs::write(path.join(name), text).unwrap();
        }
        Self { _folder: folder, path }
    }

    /// One file `r.yaml`: the run and sections.
    fn with(sections: &str) -> Self {
        Self::new(&[("r.yaml", &format!("{RUN}{sections}"))])
    }

    fn recipe(&self) -> PathBuf {
        self.path.join("r.yaml")
    }

    /// The lines of an error below its headline, with paths relative to the folder.
    fn lines<T: std::fmt::Debug>(&self, result: anyhow::Result<T>) -> Vec<String> {
        let error = result.unwrap_err();
        let text = error.downcast_ref::<Failure>().expect("a failure").to_string();
        let text = text.replace(&format!("{}/", self.path.display()), "");
        text.lines().skip(1).map(str::to_owned).collect()
    }
}

fn owned(texts: &[&str]) -> Vec<String> {
    texts.iter().map(|text| (*text).to_owned()).collect()
}

/// `key=value` of each parameter, and the seed.
fn shown(trials: &[crate::study::Trial]) -> Vec<String> {
    let line = |trial: &crate::study::Trial| {
        let parameters = trial.parameters.iter().map(|(key, value)| format!("{key}={value}"));
        parameters.chain([format!("seed={}", trial.recipe.seed)]).collect::<Vec<_>>().join(" ")
    };
    trials.iter().map(line).collect()
}

fn folder() -> &'static Path {
    Path::new("/studies/demo")
}
