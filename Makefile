# One environment in .venv, made once and shared by every target.
#   make quickstart [IMAGES=path] [OBJECTIVE=mae] [OUT=folder] [SEED=0]
#   make test

PYTHON ?= python3
VENV ?= .venv
OBJECTIVE ?= dino
OUT ?= quickstart
SEED ?= 0
BIN := $(VENV)/bin
# faiss comes in two wheels that exclude each other: the machine decides.
FAISS := $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)

# Through the environment, so that quotes and spaces in a path mean themselves.
export IMAGES OBJECTIVE OUT SEED

.PHONY: quickstart test lint types setup

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "selfsight needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 …"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[$(FAISS),dev]'
	@touch $@

quickstart: setup
	@$(BIN)/selfsight quickstart --objective "$$OBJECTIVE" --out "$$OUT" --seed "$$SEED" $(if $(IMAGES),--images "$$IMAGES")

test: setup
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup
	$(BIN)/pyright --pythonpath $(BIN)/python
