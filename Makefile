# The commands people type. `make train` works on a fresh machine; the environment is built once, from pins.
PYTHON ?= python3
# A package index that serves CPU builds of torch; without it torch comes from where pip is configured to look.
TORCH_INDEX ?=
# cpu | gpu: which requirements are installed.
DEVICE ?= $(if $(wildcard /dev/nvidia0),gpu,cpu)
UV_VERSION := 0.13.9
TORCH := $(shell sed -n 's/^torch==//p' requirements/cpu.txt)
BIN := .venv/bin
UV_INSTALL := $(BIN)/uv pip install --quiet --python $(BIN)/python
STAMP := .venv/.$(DEVICE)-ready
DEV_STAMP := .venv/.dev-ready
ARGS ?=

.PHONY: train env test test-full mutants bench lint format doctor clean help

help:  ## list the commands
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 26

train: $(STAMP)  ## train the tiny model with CTPO (ARGS="..." are passed on)
	$(BIN)/python -m rltk.train algorithm=ctpo $(ARGS)

env: $(DEV_STAMP)  ## build the environment, test tools included, and train nothing

test: $(DEV_STAMP)  ## unit tests, the road in small, attacks on the jail
	$(BIN)/python -m pytest tests/unit tests/integration tests/security $(ARGS)

test-full: $(DEV_STAMP)  ## every test, the slow ones included
	$(BIN)/python -m pytest -m "" tests $(ARGS)

mutants: $(DEV_STAMP)  ## break every formula in one place: does some test see it?
	$(BIN)/python -m tests.mutants $(ARGS)

bench: $(STAMP)  ## what each objective costs; the time ledger of the default run (ARGS="..." are passed to it)
	$(BIN)/python -m bench.objectives
	$(BIN)/python -m bench.road $(ARGS)

lint: $(DEV_STAMP)  ## ruff and pyright
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(BIN)/pyright

format: $(DEV_STAMP)  ## let ruff rewrite
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

doctor: $(STAMP)  ## what is installed, and what is wrong with it
	$(BIN)/python -m rltk.doctor

clean:  ## remove the environment and caches; runs/ stays
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis build dist *.egg-info

.venv/.uv:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit( \
	  f"rltk needs Python 3.11, 3.12 or 3.13; {sys.executable} is {v[0]}.{v[1]}. Name another: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet uv==$(UV_VERSION)
	@touch $@

# torch goes first and through pip, which knows its configured wheel folders; --no-deps keeps CUDA packages out.
.venv/.cpu-ready: .venv/.uv requirements/cpu.txt pyproject.toml
	$(BIN)/python -m pip install --quiet --no-deps torch==$(TORCH) $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
	$(UV_INSTALL) --no-deps -r requirements/cpu.txt
	$(UV_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

.venv/.gpu-ready: .venv/.uv requirements/gpu.txt pyproject.toml
	$(UV_INSTALL) -r requirements/gpu.txt
	$(UV_INSTALL) --no-deps --no-build-isolation -e .
	@touch $@

$(DEV_STAMP): $(STAMP) requirements/dev.txt
	$(UV_INSTALL) --no-deps -r requirements/dev.txt
	@touch $@
