#!/usr/bin/env bash
# Fills data/toy, which the toy profiles of the recipes read.
#
#   scripts/toy-data.sh           # from the generated corpus of `cloze data synth`; needs no download
#   scripts/toy-data.sh FOLDER    # from real data, laid out as scripts/toy_data.py says
#
# What is there before is replaced as a whole. The tool is target/release/cloze, or what CLOZE names.
set -euo pipefail
cd "$(dirname "$0")/.."
fail() { printf 'error: %s\n\n  hint: %s\n' "$1" "$2" >&2; exit 1; }
command -v python3 >/dev/null || fail "python3 not found" "install it (Debian: apt-get install python3)"
mkdir -p data
work=$(mktemp -d data/.toy.XXXXXX)
trap 'rm -rf "$work"' EXIT

if [ $# -gt 0 ]; then
    [ -d "$1" ] || fail "no folder $1" "name the folder with the real data, or none to generate it"
    python3 scripts/toy_data.py real "$1" "$work/toy"
else
    cloze=${CLOZE:-target/release/cloze}
    [ -x "$cloze" ] || fail "no program $cloze" "build it with make build, or set CLOZE"
    "$cloze" data synth "$work/corpus" --examples 20000
    python3 scripts/toy_data.py generated "$work/corpus" "$work/toy"
fi
rm -rf data/toy
mv "$work/toy" data/toy
