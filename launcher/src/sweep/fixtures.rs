//! A plan and a cluster for the tests of this folder.

use cloze_recipes::site::Site;
use cloze_recipes::study::{Metric, Score};

use super::folder::{PlannedTrial, SweepPlan};
use crate::sample::resources;

/// A plan of these trials, four at the same time on this machine.
pub(super) fn plan(trials: Vec<PlannedTrial>) -> SweepPlan {
    SweepPlan {
        version: 1,
        concurrency: 4,
        pack: 1,
        early_stopping: None,
        metric: Metric { task: None, score: Score::Loss },
        resources: resources(),
        site: None,
        journal: None,
        trials,
    }
}

/// A trial that the sweep asks for.
pub(super) fn trial(hash: &str) -> PlannedTrial {
    PlannedTrial {
        hash: hash.to_owned(),
        name: format!("demo-{hash}"),
        parameters: serde_json::Map::new(),
        seed: 1,
        data_hash: "d".to_owned(),
        data_seed: 1,
        parent: None,
        wanted: true,
        is_stage: false,
    }
}

/// An earlier stage that nobody asks for by itself.
pub(super) fn stage(hash: &str) -> PlannedTrial {
    PlannedTrial { wanted: false, is_stage: true, ..trial(hash) }
}

/// The site of a cluster file of this name, with these lines.
pub(super) fn site(name: &str, lines: &str) -> Site {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("cluster.yaml");
    std::fs::write(&path, format!("version: 1\nname: {name}\n{lines}\n")).unwrap();
    cloze_recipes::load_site(&path).unwrap()
}
