VENV ?= .venv
LAYOUT ?= non_colocated
LAYOUTS := non_colocated colocated
NAME ?=

# PYTHON is the caller's: the interpreter that setup makes the environment with.
VENV_PYTHON = "$(VENV)/bin/python"

# Every rank is a process of its own, so more threads would only compete for the same cores.
OMP_NUM_THREADS ?= 1
export VENV OMP_NUM_THREADS

# What only the documentation needs is installed when it is first built.
DOCS_INSTALLED = $(VENV_PYTHON) -c 'import furo, myst_parser' 2>/dev/null

.PHONY: help setup train test test-all proof docs lint format clean known-layout

help: ## show this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 10

setup: ## make the virtual environment VENV (.venv) and install everything; PYTHON= names the interpreter
	@scripts/setup.sh

# On GPUs it would take four, and kernels that setup does not install.
train: known-layout setup ## train the example on CPUs; LAYOUT=non_colocated (default) or colocated, NAME= names the run
	CUDA_VISIBLE_DEVICES= $(VENV_PYTHON) examples/train_digits.py --layout $(LAYOUT) $(if $(NAME),--name "$(NAME)")

test: setup ## run the tests
	$(VENV_PYTHON) -m pytest -q

test-all: setup ## run the tests, and many more of the same kind
	$(VENV_PYTHON) -m pytest -q -m ""

proof: setup ## compare layouts with one process and write docs/numerical_proof.md
	$(VENV_PYTHON) -m pytest -q tests/proof --write-proof=docs/numerical_proof.md

docs: setup ## build the documentation in docs/_build/html
	@$(DOCS_INSTALLED) || $(VENV_PYTHON) -m pip install --disable-pip-version-check -e '.[docs]' -c constraints.txt
	$(VENV_PYTHON) -m sphinx -W --keep-going -E -a -q docs docs/_build/html
	@echo "The documentation is in docs/_build/html/index.html."

lint: setup ## check style and format
	$(VENV_PYTHON) -m ruff check
	$(VENV_PYTHON) -m ruff format --check

format: setup ## fix style and format
	$(VENV_PYTHON) -m ruff check --fix
	$(VENV_PYTHON) -m ruff format

clean: ## remove runs, checkpoints and caches
	rm -rf runs checkpoints lightning_logs build dist docs/_build .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +

known-layout:
	@$(if $(filter $(LAYOUTS),$(LAYOUT)),,$(error LAYOUT is '$(LAYOUT)', but must be one of: $(LAYOUTS)))
