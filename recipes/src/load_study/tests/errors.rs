//! Wrong files: each problem with its place.

use super::{Files, RUN, folder, owned};
use crate::{check_file, load_study};

/// What `check_file` says about the run and these sections.
fn problems(sections: &str) -> Vec<String> {
    let files = Files::with(sections);
    files.lines(check_file(&files.recipe(), &[], None))
}

/// Sections that are wrong in one thing, and the line for it; sections start in line 7.
fn assert_each(table: &[(&str, &str)]) {
    for (sections, expected) in table {
        assert_eq!(problems(sections), [*expected], "{sections}");
    }
}

#[test]
fn the_form_of_a_section_is_strict() {
    assert_each(&[
        ("resources: {node: 2}", "r.yaml:7:13: resources.node: unknown key; did you mean `nodes`?"),
        ("resources: {nodes: 0}", "r.yaml:7:20: resources.nodes: found 0, expected an integer from 1 to 4096"),
        ("after: {recipee: x}", "r.yaml:7:9: after.recipee: unknown key; did you mean `recipe`?"),
        ("sweep: {grids: {}}", "r.yaml:7:9: sweep.grids: unknown key; did you mean `grid`?"),
        ("sweep: {grid: {train.steps: 3}}", "r.yaml:7:29: sweep.grid.train.steps: found 3, expected a list"),
        ("sweep: {metric: {score: f1}}", "r.yaml:7:25: sweep.metric.score: found `f1`, expected `accuracy`, `macro_f1` or `loss`"),
        (
            "sweep: {random: {samples: 2, keys: {train.steps: {intger: [1, 2]}}}}",
            "r.yaml:7:51: sweep.random.keys.train.steps.intger: unknown key; did you mean `integer`?",
        ),
        (
            "expected: {source: p, columns: [{name: A, score: loss}], rows: [{name: a, value: {}}]}",
            "r.yaml:7:75: expected.rows.0.value: unknown key; did you mean `values`?",
        ),
        ("profiles: {toy: 3}", "r.yaml:7:17: profiles.toy: found 3, expected a map"),
    ]);
}

#[test]
fn resources_fit_together_and_hold_no_secrets() {
    assert_each(&[
        (
            "resources: {environment: {HF_TOKEN: x}}",
            "r.yaml:7:37: resources.environment.HF_TOKEN: a secret does not belong into this file; set it in the environment that the program is started in",
        ),
        (
            "resources: {environment: {A-B: x}}",
            "r.yaml:7:32: resources.environment.A-B: found `A-B`, expected letters, digits and `_`, the first no digit",
        ),
        ("resources: {setup: [\"a\\nb\"]}", "r.yaml:7:21: resources.setup.0: found `a\\nb`, expected one line without control characters"),
        (
            "resources: {modules: [\"a b\"]}",
            "r.yaml:7:23: resources.modules.0: found `a b`, expected one word without blanks, quotes, `$`, `;` and control characters, the first character not `-`",
        ),
        (
            "resources: {container: {image: i, mounts: [a]}}",
            "r.yaml:7:44: resources.container.mounts.0: found `a`, expected `SRC:DST` or `SRC:DST:FLAGS`, without commas",
        ),
    ]);
    let files = Files::with("resources: {workers_per_node: 4, gpus_per_node: 2}");
    let found = files.lines(load_study(&files.recipe(), &owned(&["train.device=cuda"]), None));
    let expected = "r.yaml:7:49: resources.gpus_per_node: found 2, expected at least resources.workers_per_node, which is 4: a worker takes a GPU of its own";
    assert_eq!(found, [expected]);
}

#[test]
fn a_sweep_contradicts_neither_itself_nor_the_recipe() {
    assert_each(&[
        ("sweep: {grid: {train.steps: []}}", "r.yaml:7:16: sweep.grid.train.steps: found an empty list, expected at least one value"),
        ("sweep: {grid: {seed: [1]}}", "r.yaml:7:16: sweep.grid.seed: seeds are stated in `sweep.seeds`"),
        ("sweep: {list: [{name: a}]}", "r.yaml:7:23: sweep.list.0.name: `name` is not a part of a run that a sweep can change"),
        (
            "sweep: {grid: {data.output: [a]}}",
            "r.yaml:7:16: sweep.grid.data.output: each trial has a place of its own; the sweep cannot change it",
        ),
        (
            "sweep: {grid: {train.steps: [1]}, list: [{train.steps: 2}]}",
            "r.yaml:7:56: sweep.list.0.train.steps: found this key a second time in the sweep, expected keys that do not overlap",
        ),
        (
            "sweep: {grid: {train.schedule: [{}], train.schedule.kind: [linear]}}",
            "r.yaml:7:38: sweep.grid.train.schedule.kind: found `train.schedule.kind` beside `train.schedule`, expected keys that do not overlap",
        ),
        (
            "sweep: {paired: [{train.steps: [1, 2], train.batch_examples: [1]}]}",
            "r.yaml:7:40: sweep.paired.0.train.batch_examples: found 1 values, expected as many as `train.steps` has, which is 2, and at least one",
        ),
        ("sweep: {random: {samples: 2, keys: {}}}", "r.yaml:7:30: sweep.random.keys: found no keys, expected at least one key to draw"),
        (
            "sweep: {random: {samples: 2, keys: {train.learning_rate: {log_uniform: [0, 1e-4]}}}}",
            "r.yaml:7:37: sweep.random.keys.train.learning_rate: found 0, expected numbers above 0, whose logarithm is drawn",
        ),
        (
            "sweep: {random: {samples: 2, keys: {train.steps: {integer: [9, 1]}}}}",
            "r.yaml:7:37: sweep.random.keys.train.steps: found 9 before 1, expected the smaller number first",
        ),
        (
            "sweep: {random: {samples: 2, keys: {train.steps: {integer: [1, 9], choice: [1]}}}}",
            "r.yaml:7:37: sweep.random.keys.train.steps: expected exactly one of `choice`, `uniform`, `log_uniform` and `integer`",
        ),
        ("sweep: {seeds: []}", "r.yaml:7:16: sweep.seeds: found a list of 0, expected a list of at least 1"),
        ("sweep: {seeds: [1, 1]}", "r.yaml:7:20: sweep.seeds.1: found 1 a second time, expected seeds that differ"),
        ("sweep: {pack: 3, concurrency: 2}", "r.yaml:7:15: sweep.pack: found 3, expected at most sweep.concurrency, which is 2"),
        ("sweep: {metric: {task: z}}", "r.yaml:7:24: sweep.metric.task: found `z`, expected a task of `evaluation`: `t`, `u`"),
        (
            "sweep: {metric: {task: t, score: loss}}",
            "r.yaml:7:24: sweep.metric.task: found `t` with `score: loss`, expected no task: the loss is of the training",
        ),
        (
            "sweep: {grid: {after.train.steps: [1]}}",
            "r.yaml:7:1: sweep: found `after.train.steps`, but there is no earlier stage; name its recipe in `after.recipe`",
        ),
        (
            "sweep: {random: {samples: 200, keys: {train.steps: {integer: [1, 9]}}}, seeds: [1, 2], grid: {train.batch_examples: [1, 2], train.epsilon: [1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 1e-9, 1e-10, 1e-11, 1e-12]}}",
            "r.yaml:7:1: sweep: found 10400 trials, expected at most 10000",
        ),
    ]);
}

#[test]
fn every_trial_is_checked_like_a_recipe_and_named() {
    assert_each(&[
        (
            "sweep: {grid: {train.lerning_rate: [1, 2]}, seeds: [1, 2]}",
            "r.yaml:7:16: train.lerning_rate: unknown key; did you mean `learning_rate`? (in the trial train.lerning_rate=1, seed 1)",
        ),
        (
            "sweep: {grid: {train.steps: [5, -1], train.batch_examples: [1, 2]}}",
            "r.yaml:7:33: train.steps: found -1, expected an integer from 1 to 1000000000 (in the trial train.steps=-1, train.batch_examples=1)",
        ),
        (
            "sweep: {list: [{data.max_length: 512}]}",
            "r.yaml:5:59: train.micro_batch_tokens: found 256, expected at least data.max_length, which is 512 (in the trial data.max_length=512)",
        ),
        (
            "sweep: {list: [{train.steps.x: 512}]}",
            "r.yaml:7:32: train.steps.x: found 10, expected a map or a list that has `x` (in the trial train.steps.x=512)",
        ),
        (
            "sweep: {grid: {train.steps: [5, 6, 5]}}",
            "r.yaml:7:1: sweep: found the same run twice: train.steps=5 and train.steps=5, expected points that differ in what they train",
        ),
        (
            "sweep: {list: [{}, {objective.mask_probability: 0.3}]}",
            "r.yaml:7:1: sweep: found the same run twice: the recipe as it is and objective.mask_probability=0.3, expected points that differ in what they train",
        ),
    ]);
    let found = problems("sweep: {list: [{train.steps: 0}, {train.batch_examples: 0}]}");
    assert_eq!(found.len(), 2, "all trials at once: {found:?}");
}

#[test]
fn an_expectation_names_what_exists() {
    let expected = |rest: &str| format!("sweep: {{grid: {{train.steps: [1, 2]}}}}\nexpected: {{source: p, {rest}}}");
    let rows = "rows: [{name: a, arm: {train.steps: 1}, values: {T: 1}}, {name: b, arm: {train.steps: 2}}, {name: q}]";
    let columns = "columns: [{name: T, task: t}]";
    let table = [
        (
            format!("columns: [{{name: T, task: z}}], {rows}"),
            "expected.columns.0.task: found `z`, expected a task of `evaluation`: `t`, `u`",
        ),
        (
            format!("columns: [{{name: T, task: t}}, {{name: T, task: u}}], {rows}"),
            "expected.columns.1.name: found `T` a second time, expected names that differ",
        ),
        (
            format!("{columns}, rows: [{{name: a}}, {{name: a}}]"),
            "expected.rows.1.name: found `a` a second time, expected names that differ",
        ),
        (
            format!("{columns}, rows: [{{name: a, values: {{X: 1}}}}]"),
            "expected.rows.0.values.X: found no such column, expected one of `T`",
        ),
        (
            format!("{columns}, rows: [{{name: a, arm: {{train.epochs: 1}}}}]"),
            "expected.rows.0.arm.train.epochs: found `train.epochs`, expected a key of the sweep: `train.steps`",
        ),
        (
            format!("{columns}, rows: [{{name: a, best_of: {{train.epochs: 1}}}}]"),
            "expected.rows.0.best_of.train.epochs: found `train.epochs`, expected a key of the sweep: `train.steps`",
        ),
        (
            format!("{columns}, rows: [{{name: a, arm: {{}}, best_of: {{}}}}]"),
            "expected.rows.0.best_of: found beside `arm`, expected one of the two",
        ),
        (
            format!("{columns}, rows: [{{name: a, arm: {{train.steps: 1}}}}, {{name: b, arm: {{train.steps: 1}}}}]"),
            "expected.rows.1.arm: found the arm of row `a`, expected arms that differ",
        ),
        (
            format!("{columns}, {rows}, orders: [{{column: X, best_first: [[a], [b]]}}]"),
            "expected.orders.0.column: found `X`, expected one of the columns `T`",
        ),
        (
            format!("{columns}, {rows}, orders: [{{column: T, best_first: [[a], [c]]}}]"),
            "expected.orders.0.best_first.1.0: found `c`, expected the name of a row",
        ),
        (
            format!("{columns}, {rows}, orders: [{{column: T, best_first: [[a], [a]]}}]"),
            "expected.orders.0.best_first.1.0: found `a` a second time, expected each row once",
        ),
        (
            format!("{columns}, {rows}, orders: [{{column: T, best_first: [[a, q], [b]]}}]"),
            "expected.orders.0.best_first.0.1: found `q`, which is only quoted, expected a row with an `arm` or `best_of`",
        ),
        (
            format!("{columns}, {rows}, orders: [{{column: T, best_first: [[a]]}}]"),
            "expected.orders.0.best_first: found a list of 1, expected a list of at least 2",
        ),
    ];
    for (rest, message) in table {
        let found = problems(&expected(&rest));
        assert_eq!(found.len(), 1, "{rest}: {found:?}");
        assert!(found[0].starts_with("r.yaml:8:") && found[0].ends_with(message), "{rest}: {}", found[0]);
    }
}

#[test]
fn a_misspelt_swept_key_is_blamed_and_not_what_is_expected_of_it() {
    let expected = "expected: {source: p, columns: [{name: T, task: t}], rows: [{name: a, arm: {train.steps: 1}}]}";
    let found = problems(&format!("sweep: {{grid: {{train.stepz: [1, 2]}}}}\n{expected}"));
    assert_eq!(found, ["r.yaml:7:16: train.stepz: unknown key; did you mean `steps`? (in the trial train.stepz=1)"]);
}

#[test]
fn an_expected_arm_is_one_of_the_sweep() {
    let expected = |arm: &str| format!("expected: {{source: p, columns: [{{name: T, task: t}}], rows: [{{name: a, arm: {arm}}}]}}\n");
    let sweep = "sweep: {paired: [{train.steps: [1, 2], objective.masking: [all_mask, 80_10_10]}]}\n";
    let all = [sweep, "profiles: {toy: {sweep: {paired: [{train.steps: [3], objective.masking: [80_10_10]}]}}}\n"].concat();
    let table = [
        ("{train.steps: 3}", "arm.train.steps: found `3`, expected a value that the sweep takes: `1`, `2`"),
        (
            "{train.steps: 1.0, objective.masking: 80_10_1}",
            "arm.objective.masking: found `80_10_1`, expected a value that the sweep takes: `all_mask`, `80_10_10`; did you mean `80_10_10`?",
        ),
        (
            "{train.steps: 1, objective.masking: 80_10_10}",
            "arm: found values that no trial has together, expected those of one point of the sweep",
        ),
    ];
    for (arm, message) in table {
        let found = problems(&(all.clone() + &expected(arm)));
        assert_eq!(found.len(), 1, "{arm}: {found:?}");
        assert!(found[0].ends_with(&format!("expected.rows.0.{message}")), "{arm}: {}", found[0]);
    }
    // A value that only the recipe states counts too.
    let list = "sweep: {list: [{train.steps: 1}, {objective.mask_probability: 0.5}]}\n";
    let files = Files::with(&(list.to_owned() + &expected("{train.steps: 10, objective.mask_probability: 0.5}")));
    assert_eq!(check_file(&files.recipe(), &[], None).unwrap().trials.len(), 2);
}

#[test]
fn every_profile_is_checked() {
    let sections = "profiles:
  right: {train: {steps: 5}}
  wrong: {train: {stepz: 5}}
  worse: {sweep: {grid: {train.steps: [0]}}}
";
    let expected = [
        "r.yaml:9:19: train.stepz: unknown key; did you mean `steps`? (under the profile wrong)",
        "r.yaml:10:40: train.steps: found 0, expected an integer from 1 to 1000000000 (in the trial train.steps=0, under the profile worse)",
    ];
    assert_eq!(problems(sections), expected);
    let found = problems("profiles: {1 2: {}}");
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(
        found[0].starts_with("r.yaml:7:") && found[0].contains(": profiles.1 2: found `1 2`, expected at most 100 letters"),
        "{found:?}"
    );
}

#[test]
fn a_wrong_stage_is_told_in_its_own_file() {
    let files = Files::new(&[
        ("r.yaml", &format!("{RUN}after: {{recipe: first.yaml, set: {{train.stepz: 3, train..x: 1}}}}\n")),
        ("first.yaml", &RUN.replace("batch_examples: 4", "batch_examples: 0")),
    ]);
    let found = files.lines(check_file(&files.recipe(), &[], None));
    let stage = "(in the earlier stage first.yaml)";
    let expected = [
        "r.yaml:7:51: after.set.train..x: expected keys joined by dots, such as `train.steps`",
        "first.yaml:5:36: train.batch_examples: found 0, expected an integer from 1 to 1048576",
        "r.yaml:7:35: train.stepz: unknown key; did you mean `steps`?",
    ];
    for line in expected {
        let line = format!("{line} {stage}");
        assert!(found.contains(&line), "{line}\nin\n{}", found.join("\n"));
    }
    assert_eq!(found.len(), 3, "{found:?}");

    let files = Files::with("after: {recipe: none.yaml}\n");
    let found = files.lines(check_file(&files.recipe(), &[], None));
    assert!(found[0].starts_with("r.yaml:7:17: after.recipe: the earlier stage cannot be read: cannot read the recipe"), "{found:?}");
    let found = files.lines(load_study(&files.recipe(), &owned(&["train.stepz=1"]), None));
    assert_eq!(found.len(), 2, "the run's problems and the stage's: {found:?}");
}

#[test]
fn stages_in_a_circle_and_too_many_of_them_are_refused() {
    let after = |recipe: &str| format!("{RUN}after: {{recipe: {recipe}}}\n");
    let files = Files::new(&[("r.yaml", &after("other.yaml")), ("other.yaml", &after("r.yaml"))]);
    let found = files.lines(load_study(&files.recipe(), &[], None));
    assert_eq!(found.len(), 1, "{found:?}");
    assert!(found[0].contains("a second time, expected stages that do not come after each other in a circle"), "{found:?}");

    let names: Vec<String> = (0..10).map(|number| if number == 0 { "r.yaml".to_owned() } else { format!("s{number}.yaml") }).collect();
    let texts: Vec<String> = (0..10).map(|number| if number == 9 { RUN.to_owned() } else { after(&names[number + 1]) }).collect();
    let all: Vec<(&str, &str)> = names.iter().map(String::as_str).zip(texts.iter().map(String::as_str)).collect();
    let files = Files::new(&all);
    let found = files.lines(load_study(&files.recipe(), &[], None));
    assert!(found[0].contains("found more than 8 stages before this run"), "{found:?}");
    let study = load_study(&files.path.join("s1.yaml"), &[], None).unwrap();
    assert_eq!(study.trials(folder()).unwrap().len(), 1, "eight are not too many");
}
