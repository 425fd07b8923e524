# Builds its own environment; needs only Python >= 3.11.
#
#   make verify   prove every shipped kernel (no GPU)
#   make test     run every test that this machine can run
#
# PYTHON      interpreter that makes the environment
# VENV        where the environment lies
# VENV_FLAGS  e.g. --system-site-packages, to use a CUDA build of torch that the system has
# ARGS        passed on to the command of verify, test, bench, status

PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
ARGS ?=

BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEV_READY := $(VENV)/.dev-ready
MIN_PYTHON := 3, 11
CPU_TORCH := torch==2.13.0
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo 1)
# Test processes share no GPU; beyond eight, imports cost more than they bring.
TEST_JOBS := $(if $(HAS_GPU),,-n auto --maxprocesses 8 --dist worksteal)

.PHONY: venv verify test lint typecheck bench status readme clean help

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -9
	@echo "targets: venv verify test lint typecheck bench status readme clean"

venv: $(READY)

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < ($(MIN_PYTHON)))' || \
	  { echo "requires Python >= 3.11, got $$($(PYTHON) --version 2>&1); set PYTHON=..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	$(if $(HAS_GPU),,$(BIN)/python -m pip install -q $(CPU_TORCH))
	$(BIN)/python -m pip install -q -e '.[test,bench$(if $(HAS_GPU),$(comma)gpu)]'
	@touch $@

$(DEV_READY): $(READY)
	$(BIN)/python -m pip install -q -e '.[dev]'
	@touch $@

comma := ,

verify: $(READY)
	@$(BIN)/dsv4-verify $(ARGS)

test: $(READY)
	@$(BIN)/python -m pytest $(TEST_JOBS) $(ARGS)

lint: $(DEV_READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

typecheck: $(DEV_READY)
	$(BIN)/pyright --pythonpath $(BIN)/python

bench: $(READY)
	@$(BIN)/dsv4-bench $(ARGS)

status: $(READY)
	@$(BIN)/python -m bench.status $(ARGS)

readme: $(READY)
	@$(BIN)/python -m bench.readme $(ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +
