# `make quickstart` and `make test` need nothing but Python 3.11+ and make: the first run sets up `.venv`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
EXAMPLES := $(VENV)/examples
READY := $(VENV)/ready
VLLM := .venv-vllm
OLDEST := .venv-oldest
DEEPSPEED := .venv-deepspeed
ABOUT_THE_PROJECT := $(addprefix integration_tests/,project peft_suite)
CHECKED := $(addprefix integration_tests/,fanlora para project/test_layers.py project/test_tests.py)

.PHONY: quickstart test test-project check coverage coverage-vllm mutants fuzz soak test-oldest test-deepspeed test-peft test-vllm test-vllm-short support results docs build quality style

quickstart: $(EXAMPLES)
	$(BIN)/python examples/quickstart.py

# In parallel, one thread per process; tests with an expensive fixture share a process (`xdist_group`).
test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --dist loadgroup $(addprefix --ignore=,$(ABOUT_THE_PROJECT))

# The tests of what surrounds the package: examples, documentation, benchmarks, releases, and a part of PEFT's own tests.
test-project: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --dist loadgroup $(ABOUT_THE_PROJECT)

# For use while editing: style, types, and the quick tests of both methods, in a minute and a half.
check: quality
	$(BIN)/python -m pytest --quiet --numprocesses auto --dist loadgroup -m "not slow" $(CHECKED)

# Branch coverage of both, in about half as much time again.
coverage: $(READY)
	$(BIN)/python -m coverage run -m pytest --numprocesses auto --dist loadgroup
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report --omit 'peft_fanlora/vllm_plugin/*'

# Branch coverage of vLLM's plugin, whose tests have an environment of their own.
coverage-vllm: $(VLLM)/ready $(VLLM)/triton
	$(VLLM)/bin/python -m coverage run -m pytest -m vllm integration_tests/vllm_engine
	$(VLLM)/bin/python -m coverage combine --quiet
	$(VLLM)/bin/python -m coverage report --include 'peft_fanlora/vllm_plugin/*'

# Changes the code of the modules that results depend on, one expression at a time: which changes does no test notice?
mutants: $(BIN)/mutmut
	$(BIN)/mutmut run --max-children 2
	$(BIN)/mutmut export-cicd-stats

# 10,000 damaged settings, configurations and cards: each is read or refused with a ValueError.
fuzz: $(READY)
	$(BIN)/python integration_tests/sharing/fuzz.py

# 3,000 calls of four threads to six models, some minutes: each row is compared, and memory must stay flat.
soak: $(READY)
	$(BIN)/python integration_tests/serving/soak.py --results benchmarks/results/soak-cpu.json

# PEFT's own tests on our methods, about half an hour on two CPU cores.
test-peft: $(READY)
	$(BIN)/python integration_tests/peft_suite/run.py --results benchmarks/results/peft-tests.json
	$(BIN)/python integration_tests/peft_suite/page.py

# Needs 4 GB: vLLM's CPU build has an environment of its own.
test-vllm: $(VLLM)/ready $(VLLM)/triton
	$(VLLM)/bin/python -m pytest -m vllm integration_tests/vllm_engine

# One start of vLLM: eight PARA tenants beside the base model, token for token.
test-vllm-short: $(VLLM)/ready
	$(VLLM)/bin/python -m pytest -m vllm integration_tests/vllm_engine/test_para_in_vllm.py -k eight_tenants

# All tests with the oldest versions of everything, in an environment of their own.
test-oldest: $(OLDEST)/ready
	$(OLDEST)/bin/python -m pytest --numprocesses auto --dist loadgroup

# ZeRO in two processes on CPUs, over gloo: DeepSpeed has an environment of its own, and none of its operators is compiled.
test-deepspeed: $(DEEPSPEED)/ready
	$(DEEPSPEED)/bin/python -m pytest integration_tests/distributed/test_deepspeed.py

# Runs the tests that show what is supported, and makes docs/support.md of it.
support: $(READY)
	$(BIN)/python -m pytest -m support --support-results=benchmarks/results/support.json
	$(BIN)/python benchmarks/support.py

# The documentation, in site/; a warning is an error. `.venv/bin/mkdocs serve` shows it while writing.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# The wheel and the source distribution, in dist/, checked as an index would and installed in an environment of their own.
build: $(READY)
	rm -rf dist
	$(BIN)/python -m build
	$(BIN)/twine check --strict dist/*

# The page of the quality experiments from the finished runs; `python benchmarks/quality/run.py` goes on with the others.
results: $(READY)
	$(BIN)/python benchmarks/quality/results.py

quality: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

style: $(READY)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

$(EXAMPLES): pyproject.toml constraints-dev.txt
$(READY): $(EXAMPLES)
$(OLDEST)/ready: pyproject.toml constraints-oldest.txt

# What the examples need is less, and installed first: `make quickstart` does not wait for the rest.
$(EXAMPLES) $(READY): CONSTRAINTS := constraints-dev.txt
$(EXAMPLES): EXTRAS := examples
$(READY): EXTRAS := dev,docs,lm-eval,peft-tests
$(OLDEST)/ready: CONSTRAINTS := constraints-oldest.txt
$(OLDEST)/ready: EXTRAS := dev

$(EXAMPLES) $(OLDEST)/ready:
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --upgrade pip
	$(@D)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) torch
	$(@D)/bin/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[$(EXTRAS)]"
	touch $@

$(READY):
	$(BIN)/python -m pip install --quiet --constraint $(CONSTRAINTS) --editable ".[$(EXTRAS)]"
	touch $@

$(BIN)/mutmut: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints-dev.txt --editable ".[mutants]"

$(DEEPSPEED)/ready: pyproject.toml constraints-dev.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --quiet --constraint constraints-dev.txt --upgrade pip setuptools wheel
	$(@D)/bin/python -m pip install --quiet --constraint constraints-dev.txt torch
	$(@D)/bin/python -m pip install --quiet --constraint constraints-dev.txt --editable ".[trl]" pytest
	DS_BUILD_OPS=0 DS_ACCELERATOR=cpu $(@D)/bin/python -m pip install --quiet --no-build-isolation deepspeed==0.19.8
	touch $@

$(VLLM)/ready: pyproject.toml requirements-vllm.txt
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --no-deps --requirement requirements-vllm.txt
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable .
	touch $@

# Triton, whose interpreter runs vLLM's second model runner in one test; nothing else may find it there.
$(VLLM)/triton: $(VLLM)/ready
	$(VLLM)/bin/python -m pip install --quiet --no-deps --upgrade --target $@ triton==3.9.0
