#!/usr/bin/env bash
# The long schedule of faults: kills, freezes, hangs, cut networks, a store that fails in every way; against one real run, whose weights must
# be those of a run without faults. `make chaos` calls it after the set-up. Prints a table, and writes it to CLOZE_CHAOS_REPORT.
#   CLOZE_CHAOS_FAULTS   number of faults (200)
#   CLOZE_CHAOS_SEED     what decides their order (1)
#   CLOZE_CHAOS_NETWORK  1 for workers on several hosts, made of network namespaces; needs root (1 for root, else 0)
#   CLOZE_CHAOS_SHARD    what the workers share out (optimizer, gradients, parameters), with replicas; nothing unless set
set -euo pipefail
cd "$(dirname "$0")/.."
CLOZE_TEST_TOOLS="$(bash scripts/test-tools.sh)"
CLOZE_CHAOS_FAULTS="${CLOZE_CHAOS_FAULTS:-200}"
CLOZE_CHAOS_SEED="${CLOZE_CHAOS_SEED:-1}"
CLOZE_CHAOS_NETWORK="${CLOZE_CHAOS_NETWORK:-$([ "$(id -u)" = 0 ] && echo 1 || echo 0)}"
CLOZE_CHAOS_REPORT="${CLOZE_CHAOS_REPORT:-target/chaos-$CLOZE_CHAOS_SEED.md}"
CLOZE_CHAOS_SHARD="${CLOZE_CHAOS_SHARD:-}"
mkdir -p "$(dirname "$CLOZE_CHAOS_REPORT")"
export CLOZE_TEST_TOOLS CLOZE_CHAOS_FAULTS CLOZE_CHAOS_SEED CLOZE_CHAOS_NETWORK CLOZE_CHAOS_SHARD CLOZE_CHAOS_REPORT
cargo test --release --locked --test integration -- --exact suite::chaos::chaos_schedule --nocapture
