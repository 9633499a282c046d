#!/usr/bin/env bash
# Everything that must hold before a change lands: format, lints, tests, documentation. `make test` calls it after the set-up.
set -euo pipefail
cd "$(dirname "$0")/.."
step() { printf '\n== %s ==\n' "$1"; }

step 'format'
cargo fmt --all --check
step 'lints'
cargo clippy --release --locked --workspace --all-targets -- -D warnings
step 'tests'
CLOZE_TEST_TOOLS="$(bash scripts/test-tools.sh)"
export CLOZE_TEST_TOOLS
# More threads than cores: most tests wait, for processes, timeouts and daemons.
cargo test --release --locked --workspace -- --test-threads="$(($(nproc) + 1))"
step 'documentation'
RUSTDOCFLAGS='-D warnings' cargo doc --release --locked --workspace --no-deps --document-private-items --quiet
step 'all checks passed'
