//! The numbers are those of Hugging Face transformers, and an exported folder opens there.

use std::ffi::OsStr;
use std::path::Path;

use serde_json::Value;

use crate::sandbox::{CLOZE, World, python_json, skipped, tool};

/// Largest difference of a logit; both sides compute in 32-bit floats.
const LOGIT_TOLERANCE: f64 = 2e-5;
/// Largest relative difference of a gradient's norm and of a loss along a training curve.
const RELATIVE_TOLERANCE: f64 = 1e-4;

fn number(found: &Value, key: &str) -> f64 {
    found[key].as_f64().unwrap_or_else(|| panic!("`{key}` is missing in {found}"))
}

#[test]
fn logits_gradients_and_training_agree_with_transformers() {
    let Some(python) = tool("comparison with transformers", "python") else { return };
    let folder = tempfile::tempdir().expect("make a temporary folder");
    let found = python_json(&python, "transformers_parity.py", &[OsStr::new(CLOZE), folder.path().as_os_str()]);
    assert!(number(&found, "logits_max_abs") <= LOGIT_TOLERANCE, "{found}");
    assert!(number(&found, "gradient_relative") <= RELATIVE_TOLERANCE, "{found}");
    assert!(number(&found, "curve_relative") <= RELATIVE_TOLERANCE, "{found}");
}

/// Found where an NVIDIA driver is loaded.
const GPU_DEVICE: &str = "/dev/nvidiactl";
/// Bounds on a GPU: 32-bit floats in another order of additions, and the rounding of bfloat16 through five layers.
const GPU_TOLERANCES: [(&[&str], f64, f64); 2] = [(&["--device", "cuda"], 2e-4, 1e-3), (&["--device", "cuda", "--bfloat16"], 0.5, 0.1)];

#[test]
fn a_gpu_agrees_with_transformers() {
    if !Path::new(GPU_DEVICE).exists() {
        return skipped("comparison with transformers on a GPU", "no NVIDIA GPU is there");
    }
    let Some(python) = tool("comparison with transformers on a GPU", "python") else { return };
    for (flags, logit_tolerance, relative_tolerance) in GPU_TOLERANCES {
        let folder = tempfile::tempdir().expect("make a temporary folder");
        let arguments: Vec<&OsStr> =
            [OsStr::new(CLOZE), folder.path().as_os_str()].into_iter().chain(flags.iter().map(OsStr::new)).collect();
        let found = python_json(&python, "transformers_parity.py", &arguments);
        assert!(number(&found, "logits_max_abs") <= logit_tolerance, "{flags:?}: {found}");
        assert!(number(&found, "gradient_relative") <= relative_tolerance, "{flags:?}: {found}");
    }
}

#[test]
fn an_exported_folder_opens_in_transformers() {
    let Some(python) = tool("opening an export in transformers", "python") else { return };
    let world = World::prepared();
    world.train("run", &["--quiet"]);
    world.done(&["export", "run", "--output", "model"]);
    let (model, work) = (world.path("model"), world.path("work"));
    std::fs::create_dir(&work).expect("make a folder");
    let found = python_json(&python, "open_export.py", &[OsStr::new(CLOZE), model.as_os_str(), work.as_os_str()]);
    assert_eq!(found["model"], "ModernBertForMaskedLM");
    assert_eq!(found["masks_found"], 3, "{found}");
    assert!(number(&found, "logits_spread") > 0.01, "logits that are all the same would agree with anything: {found}");
    assert!(number(&found, "logits_max_abs") <= LOGIT_TOLERANCE, "{found}");
}
