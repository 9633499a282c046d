# `make demo` shows the whole main job on this machine; `make test` runs every check. Both set up what they need.
CARGO ?= cargo
BINARY := target/release/cloze

.PHONY: demo test chaos setup build lint clean-demo

demo: build            ## generate data, train with a worker killed on the way, evaluate, export
	@bash scripts/demo.sh

test: setup            ## format, lints, all tests, docs
	@bash scripts/test.sh

chaos: setup           ## 200 faults of every kind against one run
	@bash scripts/chaos.sh

setup:                 ## fetch libtorch once per machine and point this checkout at it
	@bash scripts/libtorch.sh

build: setup           ## build `cloze` and `cloze-worker`
	@$(CARGO) build --release --locked --target-dir target

lint: setup            ## formatting and clippy
	$(CARGO) fmt --all --check
	$(CARGO) clippy --release --locked --workspace --all-targets -- -D warnings

clean-demo:            ## remove what the demo wrote
	rm -rf demo runs/demo
