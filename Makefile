# `make quickstart` and `make test` do everything that a fresh machine needs.
PYTHON ?= python3
BIN := .venv/bin
SOURCES := batchgen tests sample_data jobs

.PHONY: quickstart test torture lint fmt docs check clean

quickstart: .venv/ready
	$(BIN)/batchgen run jobs/quickstart.toml --fresh
	$(BIN)/python jobs/quickstart_score.py

test: .venv/ready
	$(BIN)/pytest -n 2 --dist loadfile -m "not slow and not gpu"

# The long versions of the proofs in tests/torture: an hour or two.
torture: .venv/ready
	$(BIN)/python -m tests.torture.kills --kills 10000
	$(BIN)/python -m tests.torture.sweep --percent 100
	$(BIN)/python -m tests.torture.power --losses 10000
	$(BIN)/python -m tests.torture.races --rounds 1000
	$(BIN)/python -m tests.torture.nights --worlds 3000
	$(BIN)/python -m tests.torture.fleet --kills 500
	$(BIN)/pytest -rP tests/torture/test_mutants.py

lint: .venv/ready
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

fmt: .venv/ready
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

# Rewrites what is generated from the code: the editor schema and the README's option table.
docs: .venv/ready
	$(BIN)/python tests/docs.py

check: lint test

.venv/ready: .ci/setup .ci/requirements-cpu.txt pyproject.toml
	PYTHON="$(PYTHON)" bash .ci/setup
	touch $@

clean:
	rm -rf .venv jobs/out
