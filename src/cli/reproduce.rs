//! `cloze reproduce`: everything that one table of a paper needs, and the table.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Args;
use cloze_launcher::report::{ReportFormat, report_folders};
use cloze_recipes::failure::{Failure, FailureKind};
use cloze_recipes::nearest;

use super::expectation::expected_today;
use super::plan::plan_study;
use super::run::write_last_line;
use super::sweep::{WishArguments, preview, run_study};

/// Most recipe files that are looked at for a list.
const MAX_FILES: usize = 10_000;

/// Arguments of `cloze reproduce`.
#[derive(Args)]
pub struct ReproduceArguments {
    /// Paper and table, as in `its-all-in-the-mask/table1`; `--list` says which there are
    #[arg(required_unless_present = "list")]
    pub table: Option<String>,
    /// What is asked for.
    #[command(flatten)]
    pub wish: WishArguments,
    /// Folder of the recipes
    #[arg(long, value_name = "DIR", default_value = "recipes")]
    pub recipes: PathBuf,
    /// List the tables that there are
    #[arg(long)]
    pub list: bool,
    /// Say what it takes, trials, stages, jobs and what is wrong, and start nothing
    #[arg(long, conflicts_with = "list")]
    pub preview: bool,
}

/// Runs a table's sweep, or goes on with it, and ends in the report.
pub fn reproduce(arguments: &ReproduceArguments, stdout: &mut dyn Write) -> Result<ExitCode> {
    let tables = tables(&arguments.recipes)?;
    let Some(table) = arguments.table.as_ref().filter(|_| !arguments.list) else {
        for table in &tables {
            writeln!(stdout, "{table}").context("print the tables")?;
        }
        return Ok(ExitCode::SUCCESS);
    };
    let file = arguments.recipes.join(format!("{table}.yaml"));
    if !tables.contains(table) {
        return Err(unknown(table, &tables, &arguments.recipes).into());
    }
    let wish = &arguments.wish;
    let study = wish.study(&file)?;
    let site = wish.site()?;
    let folder = wish.folder_of(&table.replace('/', "-"), site.as_ref());
    if arguments.preview {
        preview(&study, &folder, site.as_ref(), stdout)?;
        return plan_study(&study, site.as_ref(), (wish.cluster.as_deref(), &folder), stdout);
    }
    let driven = run_study(&study, &folder, site, wish)?;
    driven.check()?;
    report_study(&driven.folder, stdout)?;
    driven.warn()?;
    driven.check_trials()?;
    Ok(ExitCode::SUCCESS)
}

/// Prints the table of a study, and writes its report into its folder.
pub(super) fn report_study(folder: &Path, stdout: &mut dyn Write) -> Result<()> {
    let report = report_folders(&[folder.to_owned()], expected_today(folder)?)?;
    let output = folder.join("report");
    // Whoever may only read a study gets its table all the same.
    stdout.write_all(report.render(ReportFormat::Table)?.as_bytes()).context("print the table")?;
    report.write_all(&output).map_err(|error| {
        let failure = Failure::new(FailureKind::Storage, "the report is printed, and nothing was saved").at(output.display());
        failure.because(format!("{error:#}")).hint(format!("`cloze report {} --format html > FILE` writes it elsewhere", folder.display()))
    })?;
    write_last_line(&mut std::io::stderr(), &format!("report: {}", output.join("report.html").display()))
}

/// Recipe files that say what is expected of them, as `PAPER/TABLE`.
fn tables(recipes: &Path) -> Result<Vec<String>> {
    let list = |folder: &Path| -> Result<Vec<PathBuf>> {
        let unreadable = |error: std::io::Error| {
            Failure::new(FailureKind::Input, "the folder of the recipes cannot be read")
                .at(folder.display())
                .because(error)
                .hint("name it with `--recipes DIR`")
        };
        let entries = std::fs::read_dir(folder).map_err(unreadable)?.take(MAX_FILES);
        let mut paths = entries.map(|entry| entry.map(|entry| entry.path())).collect::<std::io::Result<Vec<_>>>().map_err(unreadable)?;
        paths.sort();
        Ok(paths)
    };
    let mut found = Vec::new();
    for paper in list(recipes)?.iter().filter(|path| path.is_dir()) {
        for file in list(paper)?.iter().filter(|path| path.extension().is_some_and(|extension| extension == "yaml")) {
            let text = std::fs::read_to_string(file).with_context(|| format!("read {}", file.display()))?;
            let has_table = text.lines().any(|line| line.starts_with("expected:"));
            if let (true, Some(paper), Some(table)) = (has_table, paper.file_name(), file.file_stem()) {
                found.push(format!("{}/{}", paper.display(), table.display()));
            }
        }
    }
    Ok(found)
}

fn unknown(table: &str, tables: &[String], recipes: &Path) -> Failure {
    let failure = Failure::new(FailureKind::Recipe, "there is no such table")
        .at(recipes.display())
        .expected(if tables.is_empty() { "a recipe with `expected:`, and there is none".to_owned() } else { tables.join(", ") })
        .found(table);
    let of_some_paper = || tables.iter().find(|known| known.ends_with(&format!("/{table}"))).map(String::as_str);
    match nearest(table, tables.iter().map(String::as_str)).or_else(of_some_paper) {
        Some(meant) => failure.hint(format!("did you mean `{meant}`?")),
        None => failure,
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

    use super::super::arguments::{Arguments, Command};
    use super::*;

    #[test]
    fn the_changes_that_are_asked_for_reach_every_trial_of_a_table() {
        let url = "s3://elsewhere/flan-2022";
        let set = format!("data.sources.0.url={url}");
        let line = ["cloze", "reproduce", "its-all-in-the-mask/table1", "--set", &set, "--set", "train.micro_batch_tokens=4096"];
        let Command::Reproduce(arguments) = Arguments::try_parse_from(line).unwrap().command else { panic!("another command") };
        let recipes = Path::new(env!("CARGO_MANIFEST_DIR")).join("recipes");
        let study = arguments.wish.study(&recipes.join("its-all-in-the-mask/table1.yaml")).unwrap();
        let trials = study.trials(Path::new("/studies/table1")).unwrap();
        assert_eq!(trials.len(), 9);
        for trial in &trials {
            let found = (trial.recipe.data.sources[0].url.as_str(), trial.recipe.train.micro_batch_tokens);
            assert_eq!(found, (url, 4096), "{:?}", trial.parameters);
        }
    }

    #[test]
    fn a_table_is_a_recipe_that_says_what_is_expected() {
        let root = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = root.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        write("paper/base.yaml", "version: 1\n");
        write("paper/table2.yaml", "extends: base.yaml\nexpected: {}\n");
        write("paper/table1.yaml", "extends: base.yaml\nexpected:\n  source: x\n");
        write("paper/notes.md", "expected: nothing\n");
        let found = tables(root.path()).unwrap();
        assert_eq!(found, ["paper/table1", "paper/table2"]);
        let failure = unknown("paper/table3", &found, root.path());
        assert_eq!((failure.kind, failure.expected.as_deref()), (FailureKind::Recipe, Some("paper/table1, paper/table2")));
        for (stated, hint) in [("papr/table2", Some("paper/table2")), ("table1", Some("paper/table1")), ("glue", None)] {
            let hint = hint.map(|hint| format!("did you mean `{hint}`?"));
            assert_eq!(unknown(stated, &found, root.path()).hint, hint, "{stated}");
        }
        assert!(tables(&root.path().join("none")).is_err());
    }
}
