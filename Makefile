# Needs python3 >= 3.11 with its venv module, and nothing else. `make help` lists what there is.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/.installed
RUN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help demo test check up bench simulate nemesis lint types clean

help: ## list every target
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-8s %s\n", $$1, $$2 }' Makefile

demo: $(STAMP) ## run the main job on embedded NATS and Valkey, and verify it
	@$(RUN)/ferry demo

# A process for each core, each file of tests in one of them.
test: $(STAMP) ## run the whole default test suite
	@$(RUN)/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

SEEDS ?= 2000
simulate: $(STAMP) ## the whole model, every mutant, 5,000 fuzzed examples a decoder, SEEDS=2000 simulated schedules
	@$(RUN)/python -m tests.model --jobs 2
	@FERRY_FUZZ_EXAMPLES=5000 $(RUN)/pytest -q tests/fuzz
	@$(RUN)/python -m tests.simulation --seeds $(SEEDS) --mutants

nemesis: $(STAMP) ## real processes killed, stopped and restarted at every point of a move, and a NATS cluster of three
	@$(RUN)/python -m tests.nemesis --all

check: lint types test ## everything CI could object to: lint, types, import directions, tests

up: $(STAMP) ## start a local cluster; Ctrl-C stops all of it
	@$(RUN)/ferry up

bench: $(STAMP) ## run every benchmark beside its floor and write bench/results.json
	@$(RUN)/python -m bench all

lint: $(STAMP) ## style, formatting and import directions
	@$(RUN)/ruff check
	@$(RUN)/ruff format --check
	@$(RUN)/lint-imports

types: $(STAMP) ## mypy --strict over routing, runtime and workflows
	@$(RUN)/mypy

clean: ## remove the environment, caches and the local cluster's files
	@rm -rf $(VENV) .ferry .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build dist
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Redone when the dependencies change. A half-made environment, or one whose Python is gone, is made anew.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	  || { echo "Ferry needs Python 3.11 or newer as $(PYTHON): install it, or run make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2> /dev/null \
	  || { echo "$(PYTHON) has no venv module: install it (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	@$(RUN)/python -m pip --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo "Installing into $(VENV) ..." >&2
	@$(RUN)/python -m pip install --quiet --disable-pip-version-check --root-user-action=ignore \
	  --constraint constraints.txt --editable '.[test]'
	@touch $@
