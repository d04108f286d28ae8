# The commands of the project. `make` alone lists them; CONTRIBUTING.md says more.
#
#   PYTHON=python3.12   the Python that .venv is made with (3.11 to 3.13; default: python3)
#   VENV=.venv          where the environment lives
#   JOBS=2              test processes
#   ARGS="..."          more arguments for pytest or for the quickstart run

VENV ?= .venv
JOBS ?= 2
ARGS ?=
export VENV PYTHON

BIN := $(VENV)/bin
# Tests that need the TPU compiler share one process (xdist_group), since libtpu allows one at a time.
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadgroup

.DEFAULT_GOAL := help
.PHONY: help quickstart install test test-long test-fast test-oracles lint format lock clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

quickstart: ## install into .venv and train a small model on this machine
	@tools/venv.sh
	$(BIN)/maxlm train configs/quickstart.yaml $(ARGS)

install: ## install into .venv for development, run nothing
	@tools/venv.sh test,lint

test: ## run the tests
	@tools/venv.sh test
	$(PYTEST) -m "not oracle and not long" $(ARGS)

test-long: ## run the rest: the parity matrix, TPU programs of every mesh, many hosts, whole programs
	@tools/venv.sh test
	$(PYTEST) -m "long and not oracle" $(ARGS)

test-fast: ## run only what takes seconds, without the TPU compiler
	@tools/venv.sh test
	$(PYTEST) -m "not slow and not long and not oracle and not tpu" $(ARGS)

test-oracles: ## compare with torch, transformers and aqtp (installs them: gigabytes)
	@tools/venv.sh test,oracles
	$(PYTEST) -m oracle $(ARGS)

lint: ## check style, format and types
	@tools/venv.sh test,lint
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

format: ## format the code and mend what can be mended
	@tools/venv.sh test,lint
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

lock: ## write constraints/py3XX.txt anew for the Python of .venv
	@tools/venv.sh
	$(BIN)/python tools/lock.py

clean: ## delete .venv and what tests and tools leave behind (not runs/)
	rm -rf "$(VENV)" build dist .pytest_cache .ruff_cache .pyrefly_cache
	find maxlm tests tools -name __pycache__ -type d -prune -exec rm -rf {} +
