# `make quickstart` and `make test` do everything that a fresh machine needs.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := batchgen tests sample_data jobs
PYTEST := $(BIN)/pytest -n 2 --dist loadfile

# Tests start Python some thousand times: what it compiled once is kept, whatever the shell says.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: quickstart test proof proof-long lint fmt golden docs site check clean

quickstart: .venv/ready
	$(BIN)/batchgen run jobs/quickstart.toml --fresh
	$(BIN)/batchgen score jobs/quickstart.toml
	@echo "Next: $(BIN)/batchgen show jobs/quickstart.toml --errors; edit jobs/quickstart.toml, then"
	@echo "  $(BIN)/batchgen try jobs/quickstart.toml -n 20"

# The fast suite, a few minutes: units, contracts without vLLM, golden files, layers, docs.
test: .venv/ready
	$(PYTEST) -m "not proof and not vllm and not slow and not gpu"

# The rest: whole runs, real vLLM on the CPU, Ray, and the proofs by faults in tests/torture.
proof: .venv/ready
	$(PYTEST) -m "(proof or vllm) and not slow and not gpu"

# The long versions of the proofs in tests/torture: an hour or two.
proof-long: .venv/ready
	$(BIN)/python -m tests.torture.kills --kills 10000
	$(BIN)/python -m tests.torture.sweep --percent 100
	$(BIN)/python -m tests.torture.power --losses 10000
	$(BIN)/python -m tests.torture.races --rounds 1000
	$(BIN)/python -m tests.torture.buckets --kills 1000
	$(BIN)/python -m tests.torture.batches --kills 200
	$(BIN)/python -m tests.torture.nights --worlds 3000
	$(BIN)/python -m tests.torture.fleet --kills 500
	$(BIN)/python -m tests.torture.serve --kills 500
	$(BIN)/pytest -rP tests/torture/test_mutants.py

lint: .venv/ready
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

fmt: .venv/ready
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# Rewrites what users see, for a change that is meant: help, --json keys, exit codes, outputs.
golden: .venv/ready
	$(BIN)/python -m tests.golden.make

# Rewrites what is generated from the code: the editor schema and docs/reference.
docs: .venv/ready
	$(BIN)/python -m tests.docs

# The documentation as pages, in site/; needs no network.
site: .venv/ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: lint test

.venv/ready: .ci/setup .ci/requirements-cpu.txt pyproject.toml
	PYTHON="$(PYTHON)" bash .ci/setup
	touch $@

clean:
	rm -rf .venv jobs/out site
