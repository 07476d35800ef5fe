# Needs only python3 (3.11+) with venv; everything else comes from the package index.
# PYTHON=python3.12 make setup   picks another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE ?= 1
export WANDB_MODE ?= offline
# Each stage is a process of its own: where a container's environment forbids compiled files,
# each compiles torch anew. Empty means allowed.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup demo test test-all check clean-venv

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, found %s" % sys.version)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(BIN)/python -m ensurepip --upgrade >/dev/null
	test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	VIRTUAL_ENV=$(CURDIR)/$(VENV) $(BIN)/uv pip install --quiet --compile-bytecode --constraint constraints.txt --editable '.[espeak,dev]'
	touch $@

demo: setup
	$(BIN)/duplex run configs/pocket.yaml

# 7 minutes on two idle cores, no network. Three workers, since many wait for processes and clocks;
# tests/conftest.py keeps what shares a fixture together.
test: setup
	$(BIN)/python -m pytest -q -n 3 -m 'not slow and not gpu'

test-all: setup
	$(BIN)/python -m pytest -q -m 'not gpu'

check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

clean-venv:
	rm -rf $(VENV)
