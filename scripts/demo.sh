#!/usr/bin/env bash
# The whole main job at small scale, on generated data: prepare, train with two workers of which one is killed, evaluate on templates that the
# training never saw, export, predict. `make demo` builds first.
set -euo pipefail
cd "$(dirname "$0")/.."
cloze=target/release/cloze
recipe=recipes/demo/demo.yaml
started=$SECONDS
say() { printf '\n\033[1m%s\033[0m\n' "$1"; }
[ -t 1 ] && [ -z "${NO_COLOR:-}" ] || say() { printf '\n%s\n' "$1"; }

rm -rf demo runs/demo
say '1. A corpus of generated tasks, with a tokenizer'
$cloze data synth demo/corpus

say '2. Prepare: keep answers of one token, drop the held-out templates, tokenise once'
$cloze data prepare $recipe
$cloze data inspect $recipe -n 2

say '3. The untuned model on held-out templates (chance, about)'
$cloze eval $recipe --output demo/untuned

say '4. Train with 2 workers; worker 1 is killed after step 120; its replacement gets the state from the other'
$cloze train $recipe --workers 2 --kill-worker 1@120

say '5. The tuned model on the same held-out templates'
$cloze eval runs/demo

say '6. Export a folder that Hugging Face transformers opens, and use it'
$cloze export runs/demo --output demo/model
$cloze predict --model demo/model --labels positive,negative "$(python3 -c 'import json; print(json.loads(open("demo/corpus/eval/sentiment.jsonl").readline())["inputs"])')"

python3 - <<'PY'
import json
before, after = (json.load(open(path))["mean_accuracy"] for path in ("demo/untuned/eval.json", "runs/demo/eval/eval.json"))
print(f"\nmean accuracy on held-out templates: {before:.1%} untuned, {after:.1%} tuned")
if after < before + 0.2:
    raise SystemExit("error: the tuned model is not clearly above the untuned one")
PY
say "Done in $((SECONDS - started)) s"
cat <<END
  corpus and tokenizer   demo/corpus
  prepared shards        demo/prepared
  run folder             runs/demo         (recipe.yaml, events.jsonl, logs/, checkpoints/, tensorboard/, eval/)
  exported model         demo/model        AutoModelForMaskedLM.from_pretrained("demo/model")

Try next:
  $cloze predict --model demo/model --labels yes,no,maybe "TEXT"
  $cloze check $recipe --resolved
  $cloze train $recipe --run runs/wider --set model.shape.hidden_size=256
  $cloze train --help; docs/RECIPES.md
END
