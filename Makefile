# `make quickstart` and `make test` need nothing but Python 3.10+ and make: the first run sets up `.venv`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready
VLLM := .venv-vllm

.PHONY: quickstart test test-peft test-vllm quality style

quickstart: $(READY)
	$(BIN)/python examples/quickstart.py

test: $(READY)
	$(BIN)/python -m pytest

# PEFT's own tests on our methods, about half an hour on two CPU cores.
test-peft: $(READY)
	$(BIN)/python integration_tests/peft_suite/run.py --results benchmarks/results/peft-tests.json
	$(BIN)/python integration_tests/peft_suite/page.py

# Needs Python 3.11+ and 4 GB: vLLM's CPU build has an environment of its own.
test-vllm: $(VLLM)/ready
	$(VLLM)/bin/python -m pytest -m vllm

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

$(VLLM)/ready: pyproject.toml requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-deps --requirement requirements-vllm.txt
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@
