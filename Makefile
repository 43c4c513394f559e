# The front door. Every target sets up what it needs in .venv; nothing else is touched.
#   make demo                   the whole path on synthetic scenes
#   make test                   the test suite
#   make check                  exactly what CI runs
#   make bench                  every benchmark, results in benchmarks/results
#   make torture                the long interruption tests
# PYTHON=python3.12 picks another interpreter, VENV=DIR another environment.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt
ARGS ?=

.PHONY: demo test lint check bench torture setup setup-dev setup-bench
.DELETE_ON_ERROR:

setup: $(VENV)/installed
setup-dev: $(VENV)/installed-dev
setup-bench: $(VENV)/installed-bench

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "fcache needs Python 3.11 or newer, $(PYTHON) is " + sys.version.split()[0] + "; set PYTHON=")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e .
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[test,dev]'
	@touch $(VENV)/installed $@

demo: setup
	$(BIN)/fcache demo $(ARGS)

# One thread for each test process: equal numbers on any machine, and no fight over a small one. Files stay in the order
# of tests/conftest.py. ARGS=-n0: one process.
test: setup-dev
	OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

lint: setup-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/basedpyright
	$(BIN)/lint-imports --no-cache

check:
	.ci/run

$(VENV)/installed-bench: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[test,dev,bench]'
	$(PIP) --no-deps 'mosaicml-streaming>=0.13'
	@touch $(VENV)/installed $(VENV)/installed-dev $@

bench: setup-bench
	@set -e; mkdir -p benchmarks/results; for script in benchmarks/*.py; do \
	  echo "== $$script"; $(BIN)/python "$$script" $(ARGS); done

torture: setup-dev
	FCACHE_TORTURE=full OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest tests/torture --timeout 3600 $(ARGS)
