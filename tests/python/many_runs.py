"""Writes many small run folders, and a study over them, to measure how long a report takes: many_runs.py FOLDER [RUNS [STEPS]]."""

import json
import math
import pathlib
import sys

folder = pathlib.Path(sys.argv[1])
num_runs = int(sys.argv[2]) if len(sys.argv) > 2 else 1000
num_steps = int(sys.argv[3]) if len(sys.argv) > 3 else 1000
RATIOS = [0.0, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.75]


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value))


def events(seed, ratio):
    yield {"event": "run_started", "name": "x", "recipe_hash": "4f1c", "workers": 2, "min_workers": None, "steps": num_steps}
    yield {"event": "generation_started", "generation": 1, "world_size": 2, "workers": [0, 1], "reason": "all workers are there"}
    yield {"event": "restored", "generation": 1, "step": 0, "source": "scratch", "skipped": [], "seconds": 0.1}
    for step in range(1, num_steps + 1):
        noise = math.sin(step * 12.9898 + seed * 78.233) * 0.15
        loss = 1.2 + 6 / math.sqrt(step + 4) + ratio + noise
        yield {
            "event": "step", "generation": 1, "step": step, "loss": loss, "learning_rate": 1e-4, "gradient_norm": 0.7, "examples": 128,
            "tokens": 16000, "labels": 128, "seconds": 0.5, "examples_per_s": 256.0, "tokens_per_s": 32000.0,
        }
    yield {"event": "run_finished", "step": num_steps, "seconds": num_steps * 0.5}


def scores(accuracy):
    right = round(accuracy * 100)
    confusion = [[right // 2, 50 - right // 2], [50 - (right - right // 2), right - right // 2]]
    return {"num_rows": 100, "accuracy": accuracy, "macro_f1": accuracy * 0.95, "confusion": confusion}


for number in range(num_runs):
    arm, seed = divmod(number, 5)
    ratio, rate = RATIOS[arm % 10], 1e-5 * (1 + arm // 10)
    name = f"many-{number:04}"
    run = folder / "runs" / name
    lines = (json.dumps({"time": 1.7e9 + index * 0.5, **event}) for index, event in enumerate(events(seed, ratio)))
    write(run / "events.jsonl", "".join(line + "\n" for line in lines))
    write(run / "recipe.yaml", f"version: 1\nname: {name}\nseed: {seed}\nobjective:\n  auxiliary_ratio: {ratio}\ntrain:\n  steps: {num_steps}\n"
          f"  device: cuda\n  learning_rate: {rate}\n")
    write(run / "run.json", {
        "name": name, "recipe_hash": "4f1c", "data_fingerprint": "d", "cloze_version": "0.1.0", "worker_build": "b", "git_revision": None,
        "command_line": ["cloze"], "host": "h", "process_id": 1, "started": 1.7e9,
    })
    accuracy = 0.35 + 0.3 * ratio - 0.6 * ratio * ratio + 0.01 * math.sin(number * 7.1)
    files = [{"file": f"subject-{index}.csv", "scores": scores(min(1.0, accuracy + 0.08 * math.sin(index)))} for index in range(20)]
    task = {"name": "mmlu", "labels": ["yes", "no"], "scores": scores(accuracy), "files": files, "num_cut": 0}
    write(run / "eval" / "eval.json", {
        "model": "m", "recipe": name, "recipe_hash": "4f1c", "tasks": [task], "mean_accuracy": accuracy, "mean_macro_f1": accuracy,
    })
    write(folder / "trials" / f"{number:08x}.json", {
        "hash": f"{number:08x}", "name": name, "parameters": {"objective.auxiliary_ratio": ratio, "train.learning_rate": rate}, "seed": seed,
        "data_hash": "d", "parent": None, "run": f"runs/{name}", "state": "done", "step": num_steps, "attempts": 1, "failure": None,
        "metric": accuracy,
    })
write(folder / "study.json", {
    "version": 1, "name": "many", "file": None, "profile": None, "overrides": [], "hash": "5d0f", "expected": None,
    "metric": {"task": "mmlu", "score": "accuracy"}, "keys": ["objective.auxiliary_ratio", "train.learning_rate"], "created": 1.7e9,
})
