# Two commands for a newcomer: `make quickstart` and `make test`. Each makes .venv when it is missing.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: quickstart test test-fast test-gpu lint types check clean

.venv: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch .venv

# What tests, lint and types need besides.
.venv/dev: .venv
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch .venv/dev

quickstart: .venv
	$(BIN)/klimb quickstart

# One thread a process: two processes with two threads each wait for one another on two cores.
test: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

test-fast: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow"

# One CUDA card, 12 GB, under 5 minutes; says why where it is skipped.
test-gpu: .venv/dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 0 -v -rs -m gpu tests/gpu

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/dev
	$(BIN)/mypy

check: lint types test

clean:
	rm -rf .venv .mypy_cache .ruff_cache .pytest_cache
