# `make quickstart` and `make test` need nothing but Python 3.10+ and make: the first run sets up `.venv`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: quickstart test support quality style

quickstart: $(READY)
	$(BIN)/python examples/quickstart.py

test: $(READY)
	$(BIN)/python -m pytest

# Runs the tests that show what is supported, and makes docs/support.md of it.
support: $(READY)
	$(BIN)/python -m pytest -m support --support-results=benchmarks/results/support.json
	$(BIN)/python benchmarks/support.py

quality: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

style: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(READY): pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints-dev.txt --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints-dev.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints-dev.txt --editable ".[dev]"
	touch $@
