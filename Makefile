# What people and CI run. `make check` is everything; the others are parts of it or prepare it.
# `make check VENV=/path` uses another environment than the one of scripts/setup.
VENV ?= .venv
BIN = $(VENV)/bin/
SOURCES = overlayfs cli tests

.PHONY: setup demo fmt lint types test test-mounted check clean

setup:          ## system packages and .venv
	scripts/setup

demo: setup     ## the main job, to watch
	scripts/demo

fmt:            ## bring all sources into shape
	$(BIN)ruff check --fix $(SOURCES)
	$(BIN)ruff format $(SOURCES)

lint:
	$(BIN)ruff check $(SOURCES)
	$(BIN)ruff format --check $(SOURCES)

types:
	$(BIN)mypy

test:           ## without a mount: under a minute
	$(BIN)python -m pytest -q tests/unit tests/behaviour --drivers plain,fs

test-mounted:   ## what needs /dev/fuse and root
	$(BIN)python -m pytest -q tests/mounted tests/cli tests/behaviour --drivers fuse,kernel

check: lint types  ## all that CI runs
	$(BIN)python -m pytest -q

clean:
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
