//! Right files: what comes out of them.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::json;

use super::{Files, RUN, folder, owned, shown};
use crate::study::{Container, Distribution, EarlyStopping, Metric, RowSource, Score, Study, Trial};
use crate::{check_file, load, load_study, load_with_profile};

const SECTIONS: &str = "profiles:
  toy: {train: {steps: 4}, sweep: {seeds: [1], grid: {objective.auxiliary_ratio: [0.5]}}}
resources: {nodes: 2, workers_per_node: 4, cpus_per_worker: 2, modules: [cuda/13], environment: {A: \"1\"}, setup: [ulimit -n 65536],
  container: {image: img, mounts: [\"/a:/b\", \"/c:/d:ro\"]}}
sweep:
  grid: {objective.auxiliary_ratio: [0.1, 0.2]}
  random: {samples: 2, seed: 3, keys: {train.learning_rate: {log_uniform: [1e-5, 1e-3]}}}
  seeds: [7, 8]
  concurrency: 4
  pack: 2
  metric: {task: t}
  early_stopping: {first_step: 2}
expected:
  source: a paper
  columns: [{name: T, task: t, tolerance: 1.5}, {name: Loss, score: loss}]
  rows: [{name: low, arm: {objective.auxiliary_ratio: 0.1}, values: {T: 37.07}}, {name: high, arm: {objective.auxiliary_ratio: 0.2}}, {name: quoted, values: {Loss: 1}}, {name: best, best_of: {}}]
  orders: [{column: T, best_first: [[high], [low]]}]
";

fn study(files: &Files) -> Study {
    load_study(&files.recipe(), &[], None).unwrap()
}

fn trials(sections: &str) -> Vec<Trial> {
    study(&Files::with(sections)).trials(folder()).unwrap()
}

#[test]
fn every_section_is_read() {
    let files = Files::with(SECTIONS);
    let study = study(&files);
    assert_eq!(study.file, files.recipe());
    assert_eq!(study.recipe, load(&files.recipe(), &[]).unwrap());
    let resources = &study.resources;
    assert_eq!((resources.nodes, resources.workers_per_node, resources.gpus_per_node, resources.cpus_per_worker), (2, 4, 0, Some(2)));
    assert_eq!(resources.container, Some(Container { image: "img".to_owned(), mounts: owned(&["/a:/b", "/c:/d:ro"]) }));
    assert_eq!((resources.modules.clone(), resources.setup.clone()), (owned(&["cuda/13"]), owned(&["ulimit -n 65536"])));
    assert_eq!(resources.environment["A"], "1");

    let sweep = study.sweep.as_ref().unwrap();
    assert_eq!(sweep.keys(), ["objective.auxiliary_ratio", "train.learning_rate"]);
    assert_eq!((sweep.num_trials(), sweep.concurrency, sweep.pack), (8, 4, 2));
    assert_eq!(sweep.metric, Metric { task: Some("t".to_owned()), score: Score::Accuracy });
    assert_eq!(sweep.early_stopping, Some(EarlyStopping { first_step: 2, factor: 3 }));
    let random = sweep.space.random.as_ref().unwrap();
    assert_eq!((random.samples, random.seed), (2, 3));
    assert_eq!(random.keys, [("train.learning_rate".to_owned(), Distribution::LogUniform(1e-5, 1e-3))]);

    let expected = study.expected.unwrap();
    assert_eq!(expected.columns[1].metric, Metric { task: None, score: Score::Loss });
    assert_eq!(expected.rows[0].ours, RowSource::Arm(vec![("objective.auxiliary_ratio".to_owned(), json!(0.1))]));
    assert_eq!((&expected.rows[2].ours, expected.rows[2].values["Loss"].to_string()), (&RowSource::Quoted, "1".to_owned()));
    assert_eq!(expected.rows[3].ours, RowSource::BestOf(Vec::new()));
    assert_eq!(expected.orders[0].groups, [owned(&["high"]), owned(&["low"])]);
    let text = serde_json::to_string(&expected).unwrap();
    assert_eq!(serde_json::from_str::<crate::study::Expected>(&text).unwrap(), expected, "it goes into study.json and back");
}

#[test]
fn the_sections_around_a_run_change_neither_its_recipe_nor_its_hash() {
    let (plain, with) = (Files::with(""), Files::with(SECTIONS));
    let text = |files: &Files| load(&files.recipe(), &[]).unwrap().to_yaml().replace(&files.path.display().to_string(), "/FOLDER");
    assert_eq!(text(&plain), text(&with));
    let recipe = load(&with.recipe(), &[]).unwrap();
    std::fs::write(with.path.join("copy.yaml"), recipe.to_yaml()).unwrap();
    assert_eq!(load(&with.path.join("copy.yaml"), &[]).unwrap().hash(), recipe.hash());
}

#[test]
fn a_profile_changes_the_run_and_the_sweep() {
    let files = Files::with(SECTIONS);
    assert_eq!(load_with_profile(&files.recipe(), &[], Some("toy")).unwrap().train.steps, Some(4));
    assert_eq!(load_with_profile(&files.recipe(), &owned(&["train.steps=5"]), Some("toy")).unwrap().train.steps, Some(5));
    let study = load_study(&files.recipe(), &[], Some("toy")).unwrap();
    let trials = study.trials(folder()).unwrap();
    assert_eq!(trials.len(), 2, "one ratio, two draws, one seed");
    assert!(trials.iter().all(|trial| trial.recipe.train.steps == Some(4) && trial.recipe.seed == 1));

    let checked = check_file(&files.recipe(), &[], None).unwrap();
    assert_eq!((checked.trials.len(), checked.profiles), (8, vec![("toy".to_owned(), 2)]));
    let checked = check_file(&files.recipe(), &[], Some("toy")).unwrap();
    assert_eq!((checked.trials.len(), checked.profiles), (2, vec![]));
}

#[test]
fn points_become_checked_runs() {
    let table: [(&str, &[&str]); 5] = [
        ("", &["seed=42"]),
        ("sweep: {seeds: [1, 2]}", &["seed=1", "seed=2"]),
        (
            "sweep: {grid: {train.steps: [5, 6], objective.loss_norm: [per_example]}}",
            &["train.steps=5 objective.loss_norm=\"per_example\" seed=42", "train.steps=6 objective.loss_norm=\"per_example\" seed=42"],
        ),
        (
            "sweep: {paired: [{train.steps: [5, 6], train.batch_examples: [8, 9]}]}",
            &["train.steps=5 train.batch_examples=8 seed=42", "train.steps=6 train.batch_examples=9 seed=42"],
        ),
        (
            "sweep: {list: [{objective.auxiliary: none}, {train.steps: null, train.epochs: 2}], seeds: [3]}",
            &["objective.auxiliary=\"none\" seed=3", "train.steps=null train.epochs=2 seed=3"],
        ),
    ];
    for (sections, expected) in table {
        assert_eq!(shown(&trials(sections)), expected, "{sections}");
    }
    let trial = trials("sweep: {list: [{train.steps: null, train.epochs: 2}]}").remove(0);
    assert_eq!((trial.recipe.train.steps, trial.recipe.train.epochs), (None, Some(2.0)));
    let trial = trials("sweep: {grid: {train.schedule: [{kind: constant}], data.sources.0.task: [x]}}").remove(0);
    assert_eq!(trial.recipe.train.schedule.kind, crate::recipe::ScheduleKind::Constant);
    assert_eq!(trial.recipe.data.sources[0].task.as_deref(), Some("x"));
}

#[test]
fn trials_are_the_same_everywhere_and_have_places_of_their_own() {
    let sections = "sweep: {grid: {train.steps: [5, 6]}, seeds: [1, 2]}\ncheckpoint: {url: s3://bucket/runs/, cache: /cache}";
    let files = Files::with(sections);
    let study = study(&files);
    let (here, there) = (study.trials(folder()).unwrap(), study.trials(Path::new("/elsewhere")).unwrap());
    assert_eq!(here, study.trials(folder()).unwrap());
    let hashes = |trials: &[Trial]| trials.iter().map(|trial| trial.hash.clone()).collect::<Vec<_>>();
    assert_eq!(hashes(&here), hashes(&there));
    assert_eq!(hashes(&here).iter().collect::<BTreeSet<_>>().len(), 4);
    for trial in &here {
        assert_eq!(trial.hash.len(), 64);
        assert_eq!(trial.recipe.name, format!("demo-{}", &trial.hash[..8]));
        assert_eq!(trial.recipe.data.output, folder().join("data").join(&trial.data_hash));
        assert_eq!(trial.recipe.checkpoint.url, Some(format!("s3://bucket/runs/{}", trial.recipe.name)));
        assert_eq!(trial.recipe.checkpoint.cache, Some(Path::new("/cache").join(&trial.recipe.name)));
        assert_eq!(trial.data_hash, here[0].data_hash, "steps and seeds do not change the data");
    }
}

#[test]
fn the_hash_follows_what_is_computed_and_not_where() {
    let files = Files::with("checkpoint: {url: s3://bucket/runs}");
    let hash = |overrides: &[&str]| load_study(&files.recipe(), &owned(overrides), None).unwrap().trials(folder()).unwrap().remove(0).hash;
    for places in ["name=other", "data.output=/x", "checkpoint.url=s3://other/place", "checkpoint.cache=/c", "resources.nodes=3"] {
        assert_eq!(hash(&[places]), hash(&[]), "{places}");
    }
    for meaning in ["seed=1", "train.steps=11", "model.tokenizer=/other", "data.sources.0.url=/other", "data.max_length=100"] {
        assert_ne!(hash(&[meaning]), hash(&[]), "{meaning}");
    }
}

#[test]
fn seeds_share_their_data_and_a_cap_takes_the_recipes_own() {
    let sections = "sweep: {seeds: [1, 2], grid: {data.cap_per_task: [null, 5]}}";
    let trials = trials(sections);
    let data: Vec<&str> = trials.iter().map(|trial| trial.data_hash.as_str()).collect();
    assert!(data[0] == data[1] && data[2] == data[3] && data[1] != data[2], "{data:?}");
    assert!(trials.iter().all(|trial| trial.data_seed == 42 && trial.data_recipe().seed == 42));
    let files = Files::with(sections);
    let other = load_study(&files.recipe(), &owned(&["seed=5"]), None).unwrap().trials(folder()).unwrap();
    assert_eq!(
        (other[0].hash.len(), other[0].data_seed, other[2].data_seed),
        (64, 42, 5),
        "the seed matters only where samples are capped"
    );
}

#[test]
fn paths_in_a_sweep_start_at_the_file_that_states_them() {
    let base = format!("{RUN}sweep: {{paired: [{{data.sources.0.url: [one, ../two]}}]}}");
    let files = Files::new(&[("base/b.yaml", &base), ("r.yaml", "extends: base/b.yaml\n")]);
    let urls: Vec<String> =
        study(&files).trials(folder()).unwrap().into_iter().map(|trial| trial.recipe.data.sources[0].url.clone()).collect();
    let expected = [files.path.join("base/one"), files.path.join("two")].map(|path| path.display().to_string());
    assert_eq!(urls, expected);
}

/// A first stage that extends nothing.
fn stage(sections: &str) -> String {
    format!("{RUN}{sections}").replace("name: demo", "name: first")
}

#[test]
fn an_earlier_stage_is_built_once_and_its_export_is_the_model() {
    let text = format!("{RUN}after: {{recipe: sub/first.yaml, set: {{train.steps: 100}}}}\nsweep: {{seeds: [1, 2]}}\n");
    let files = Files::new(&[("r.yaml", &text), ("sub/first.yaml", &stage(""))]);
    let study = study(&files);
    let after = study.after.as_ref().unwrap();
    assert_eq!((after.recipe.clone(), after.overrides.clone()), (files.path.join("sub/first.yaml"), owned(&["train.steps=100"])));
    let trials = study.trials(folder()).unwrap();
    let parents: Vec<&Trial> = trials.iter().map(|trial| trial.parent.as_deref().unwrap()).collect();
    assert_eq!(parents[0], parents[1], "seeds of the run share the stage");
    let parent = parents[0];
    assert_eq!((parent.recipe.train.steps, parent.recipe.seed), (Some(100), 42));
    assert_eq!(parent.parameters, [("train.steps".to_owned(), json!(100))]);
    assert_eq!(parent.recipe.name, format!("first-{}", &parent.hash[..8]));
    assert_eq!(parent.recipe.model.tokenizer, files.path.join("sub/t"));
    for trial in &trials {
        assert_eq!(trial.recipe.model.path, Some(folder().join("models").join(&parent.hash)));
        assert_eq!(trial.recipe.model.shape, None, "the export has its shape");
        assert_eq!(trial.recipe.model.tokenizer, files.path.join("t"), "its own, because it states one");
    }
    let elsewhere = study.trials(Path::new("/elsewhere")).unwrap();
    assert_eq!(elsewhere[1].hash, trials[1].hash);
    assert_eq!(elsewhere[1].recipe.model.path, Some(Path::new("/elsewhere/models").join(&parent.hash)));
}

#[test]
fn a_sweep_changes_the_earlier_stage_and_may_leave_it_out() {
    let sections = "after: {recipe: first.yaml, set: {train.steps: 100}}
sweep:
  list:
    - {after.recipe: null}
    - {after.train.steps: 7}
    - {after.recipe: second.yaml}
    - {after.train.steps: null, after.train.epochs: 1, after.seed: 9}
";
    let files = Files::new(&[
        ("r.yaml", &format!("{RUN}{sections}")),
        ("first.yaml", &stage("")),
        ("second.yaml", &stage("").replace("first", "second")),
    ]);
    let trials = study(&files).trials(folder()).unwrap();
    let parent = |index: usize| trials[index].parent.as_ref();
    assert!(parent(0).is_none() && trials[0].recipe.model.shape.is_some(), "the recipe's own model");
    assert_eq!(parent(1).unwrap().recipe.train.steps, Some(7));
    assert!(parent(2).unwrap().recipe.name.starts_with("second-"));
    assert_eq!(parent(2).unwrap().recipe.train.steps, Some(100));
    let last = &parent(3).unwrap().recipe;
    assert_eq!((last.train.steps, last.train.epochs, last.seed), (None, Some(1.0), 9));
}

#[test]
fn stages_may_follow_each_other_and_a_file_may_follow_itself() {
    let text = format!("{RUN}after: {{recipe: r.yaml, set: {{after.recipe: null, train.steps: 3}}}}\n");
    let files = Files::new(&[("r.yaml", &text)]);
    let trial = study(&files).trials(folder()).unwrap().remove(0);
    let parent = trial.parent.unwrap();
    assert_eq!((trial.recipe.train.steps, parent.recipe.train.steps, parent.parent.is_none()), (Some(10), Some(3), true));

    let second = stage("after: {recipe: first.yaml}\n").replace("first\n", "second\n");
    let third = format!("{RUN}after: {{recipe: second.yaml, set: {{after.train.steps: 6}}}}\n");
    let files = Files::new(&[("r.yaml", &third), ("second.yaml", &second), ("first.yaml", &stage(""))]);
    let trial = study(&files).trials(folder()).unwrap().remove(0);
    let second = trial.parent.unwrap();
    let first = second.parent.as_ref().unwrap();
    assert_eq!((second.recipe.name[..6].to_owned(), first.recipe.train.steps), ("second".to_owned(), Some(6)));
    assert_eq!(second.recipe.model.path, Some(folder().join("models").join(&first.hash)));
}

#[test]
fn a_run_after_a_stage_needs_no_model_of_its_own() {
    let text = RUN.replace("model: {preset: tiny, tokenizer: t}\n", "after: {recipe: sub/first.yaml}\n");
    let files = Files::new(&[("r.yaml", &text), ("sub/first.yaml", &stage(""))]);
    let study = study(&files);
    let first = load(&files.path.join("sub/first.yaml"), &[]).unwrap();
    assert_eq!(study.recipe.model, first.model, "until there is an export, what the stage itself starts from");
    let trial = study.trials(folder()).unwrap().remove(0);
    assert_eq!(trial.recipe.model.tokenizer, first.model.tokenizer);
    assert_eq!(trial.recipe.model.path, Some(folder().join("models").join(trial.parent.unwrap().hash)));
}

#[test]
fn the_profile_holds_in_the_earlier_stage_where_it_has_one() {
    let profile = "profiles: {toy: {train: {steps: 2}}}\n";
    let text = format!("{RUN}{profile}after: {{recipe: first.yaml}}\n");
    for (stage_sections, expected) in [(profile, Some(2)), ("", Some(10))] {
        let files = Files::new(&[("r.yaml", &text), ("first.yaml", &stage(stage_sections))]);
        let study = load_study(&files.recipe(), &[], Some("toy")).unwrap();
        let trial = study.trials(folder()).unwrap().remove(0);
        assert_eq!((trial.recipe.train.steps, trial.parent.unwrap().recipe.train.steps), (Some(2), expected));
    }
}

#[test]
fn overrides_reach_the_sweep_and_the_stage() {
    let text = format!("{RUN}after: {{recipe: first.yaml}}\nsweep: {{seeds: [1, 2, 3]}}\n");
    let files = Files::new(&[("r.yaml", &text), ("first.yaml", &stage(""))]);
    let overrides = owned(&["sweep.seeds=[5]", "sweep.grid={train.steps: [1, 2]}", "after.train.steps=4"]);
    let trials = load_study(&files.recipe(), &overrides, None).unwrap().trials(folder()).unwrap();
    assert_eq!(shown(&trials), ["train.steps=1 seed=5", "train.steps=2 seed=5"]);
    assert_eq!(trials[0].parent.as_ref().unwrap().recipe.train.steps, Some(4));
}

#[test]
fn a_long_name_leaves_room_for_the_hash() {
    let files = Files::new(&[("r.yaml", &RUN.replace("name: demo", &format!("name: {}", "n".repeat(100))))]);
    let trial = study(&files).trials(folder()).unwrap().remove(0);
    assert_eq!(trial.recipe.name.len(), 100);
    assert!(trial.recipe.name.ends_with(&format!("n-{}", &trial.hash[..8])));
}

#[test]
fn a_full_sweep_of_ten_thousand_is_expanded() {
    let values: Vec<String> = (1..=10_000).map(|steps| steps.to_string()).collect();
    let trials = trials(&format!("sweep: {{grid: {{train.steps: [{}]}}}}", values.join(", ")));
    assert_eq!(trials.len(), 10_000);
}

#[test]
fn paths_of_a_linked_file_start_at_the_link() {
    let files = Files::new(&[("sub/real.yaml", RUN)]);
    std::os::unix::fs::symlink(files.path.join("sub/real.yaml"), files.recipe()).unwrap();
    let study = study(&files);
    assert_eq!(study.file, files.recipe());
    let trial = study.trials(folder()).unwrap().remove(0);
    assert_eq!(trial.recipe.data.sources, study.recipe.data.sources);
    assert_eq!(trial.recipe.data.sources[0].url, files.path.join("corpus").display().to_string());
}
