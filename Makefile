# Two commands are all there is to know: make repro, then make test.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV ?= .venv
BIN := $(VENV)/bin
# The newest Megatron wants a newer Python; where there is one, the slow tests run the plugin in it, too.
PYTHON312 := $(shell python3.12 -c 'import sys; print(sys.executable)' 2>/dev/null)
NEWEST := $(VENV)-megatron
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: repro stage1-smoke test test-slow faults bench lint clean help

help:  ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

# A stamp, so that an installed environment costs nothing; a change of the pins installs again.
$(BIN)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[recipes,dev,megatron]'
	@touch $@

repro: $(BIN)/.installed  ## environment, dvc repro, then a table of what was built
	@git rev-parse --git-dir >/dev/null 2>&1 || dvc config --local core.no_scm true  # a source archive: DVC without git
	@started=$$(date +%s) && dvc repro && vpstore build --all --since $$started

stage1-smoke: $(BIN)/.installed  ## after make repro: Stage 1 for some steps from vpMoE's digest, killed and resumed
	python -m recipes.stage1_smoke rehearse --out runs/stage1-smoke

test: $(BIN)/.installed  ## the default tests: offline, CPU, about five minutes
	pytest

$(NEWEST)/.installed:
	$(PYTHON312) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet torch==2.13.0 megatron-core==0.19.2 psutil
	@touch $@

test-slow: $(BIN)/.installed $(if $(PYTHON312),$(NEWEST)/.installed)  ## the long ones: the chain twice from scratch, other thread settings
	$(if $(PYTHON312),VPSTORE_MEGATRON_PYTHON=$(abspath $(NEWEST))/bin/python) pytest -m slow

faults: $(BIN)/.installed  ## the fault matrix, about half an hour; writes its counts into docs/FAULTS.md
	python -m benchmarks.fault_matrix

bench: $(BIN)/.installed  ## measure beside DVC and b3sum; writes JSON and the table of docs/MEASURES.md
	python -m benchmarks.run

lint: $(BIN)/.installed  ## ruff and mypy --strict
	ruff check . && ruff format --check . && mypy

clean:  ## the environment and caches; never the store
	rm -rf $(VENV) $(NEWEST) .pytest_cache .mypy_cache .ruff_cache
