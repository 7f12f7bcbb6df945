# `make demo` and `make test` each set up what they need on a fresh machine with Python 3.11 to 3.13 and make.
PYTHON ?= python3
BIN = .venv/bin

.PHONY: setup demo test lint types docs bench clean

setup: .venv/.done

.venv/.done: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info < (3, 14) else "hashbridge needs Python 3.11 to 3.13: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/hashbridge demo $(ARGS)

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

test: lint types
	$(BIN)/python -m pytest

docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: setup
	$(BIN)/python -m tests.benchmarks.evaluation
	$(BIN)/python -m tests.benchmarks.throughput
	$(BIN)/python -m tests.benchmarks.encoding
	$(BIN)/python -m tests.benchmarks.feeding --parts reading,training,allocator

clean:
	rm -rf .venv build dist site *.egg-info runs
