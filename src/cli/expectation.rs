//! What a study is compared with: what its recipe expects today, as long as the recipe still states the trials that the study has.

use std::io::Write as _;
use std::path::Path;

use anyhow::{Context as _, Result};
use cloze_launcher::sweep::folder::{StudyFolder, StudyInfo, SweepOptions, SweepPlan, study_hash};
use cloze_launcher::sweep::graph::Graph;
use cloze_recipes::failure::Failure;
use cloze_recipes::study::Expected;

/// What the recipe of a study says today.
#[derive(Debug, PartialEq)]
enum Today {
    /// The same as when the study was made.
    Same,
    /// Something else, of the same trials.
    Changed(Box<Option<Expected>>),
    /// Nothing that counts, for this reason: what the study was made with stays.
    Unusable(String),
}

/// What the recipe of the study in this folder expects, where that has changed since the study was made and nothing that decides about its
/// trials has; a line on standard error says so, and says why where the recipe cannot be used. `None` leaves what the study was made with.
pub(super) fn expected_today(folder: &Path) -> Result<Option<Expected>> {
    // A folder that a report reads although it lacks something has no recipe to look at.
    let Ok(info) = StudyFolder::find(folder).and_then(|found| found.info()) else { return Ok(None) };
    let recipe = info.file.display();
    let (line, expected) = match today(&info, folder) {
        Today::Same => return Ok(None),
        // To expect nothing any more is no reason to compare with nothing.
        Today::Changed(expected) if expected.is_none() => {
            (format!("{recipe} expects nothing any more: compared with what it expected when the study was made"), None)
        }
        Today::Changed(expected) => {
            (format!("compared with what {recipe} expects now, which is not what it expected when the study was made"), *expected)
        }
        Today::Unusable(_) if info.expected.is_none() => return Ok(None),
        Today::Unusable(reason) => (format!("compared with what {recipe} expected when the study was made: {reason}"), None),
    };
    writeln!(std::io::stderr(), "{line}").context("say what is expected")?;
    Ok(expected)
}

fn today(info: &StudyInfo, folder: &Path) -> Today {
    if !info.file.is_file() {
        return Today::Unusable("it is not there any more".to_owned());
    }
    match read(info, folder) {
        Err(error) => {
            let what = error.downcast_ref::<Failure>().map_or_else(|| format!("{error:#}"), |failure| failure.what.clone());
            Today::Unusable(format!("it cannot be used ({})", what.lines().next().unwrap_or_default()))
        }
        Ok((hash, _)) if hash != info.hash => Today::Unusable("it states other trials now".to_owned()),
        Ok((_, expected)) if expected == info.expected => Today::Same,
        Ok((_, expected)) => Today::Changed(Box::new(expected)),
    }
}

/// The hash of the study that the recipe states today, and what it expects.
fn read(info: &StudyInfo, folder: &Path) -> Result<(String, Option<Expected>)> {
    let study = cloze_recipes::load_study(&info.file, &info.overrides, info.profile.as_deref())?;
    let root = std::path::absolute(folder).context("find the current folder")?;
    let graph = Graph::new(study.trials(&root)?)?;
    let hash = study_hash(&SweepPlan::new(&study, &graph, SweepOptions::default()))?;
    Ok((hash, study.expected))
}
