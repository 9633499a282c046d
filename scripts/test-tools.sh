#!/usr/bin/env bash
# Install what some tests compare with: Hugging Face transformers, TensorBoard, and an S3 server; once per machine, outside the checkout.
# Tests that need a tool that is not there say so loudly and are skipped. Prints the folder of the tools.
set -euo pipefail
cd "$(dirname "$0")/.."
readonly CACHE="${CLOZE_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/cloze}"
readonly REQUIREMENTS="scripts/test-tools-requirements.txt"
stamp=$(cksum < "$REQUIREMENTS" | cut -d' ' -f1)
tools="$CACHE/test-tools-$stamp"

if [ ! -e "$tools/complete" ]; then
    mkdir -p "$CACHE"
    exec 9> "$CACHE/test-tools-lock"; flock 9
    if [ ! -e "$tools/complete" ]; then
        rm -rf "$tools"
        printf 'installing test tools into %s (once per machine, 5 GB)\n' "$tools" >&2
        # uv resolves these requirements in seconds; pip can take many minutes.
        if python3 -m venv "$tools/uv" && "$tools/uv/bin/python" -m pip install --quiet --disable-pip-version-check uv==0.9.* \
            && "$tools/uv/bin/uv" venv --quiet --python "$(command -v python3)" "$tools/venv" \
            && "$tools/uv/bin/uv" pip install --quiet --python "$tools/venv/bin/python" --requirement "$REQUIREMENTS"; then
            touch "$tools/complete"
        else
            printf 'warning: the test tools could not be installed; the tests that need them will be SKIPPED\n' >&2
            exit 0
        fi
    fi
fi
printf '%s\n' "$tools/venv"
