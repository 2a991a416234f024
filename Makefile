# What people and CI run. `make check` is everything; the others are parts of it or prepare it.
# `make check VENV=/path` uses another environment than the one of scripts/setup.
VENV ?= .venv
BIN = $(VENV)/bin/
SOURCES = overlayfs cli tests scripts docs/conf.py
PYTEST = $(BIN)python -m pytest -q -n 2  # two processes: most tests wait for the disk or for a daemon

.PHONY: setup setup-tests demo man docs fmt lint types test test-mounted test-together test-pyfuse3 check campaign steps bench conformance clean

setup:          ## what the program needs: a few system packages, and .venv
	scripts/setup

setup-tests:    ## what the tests and measurements need, too
	scripts/setup --tests

demo: setup     ## the main job, to watch
	scripts/demo

man:            ## manual pages from docs/cli.md and the commands, into man/
	$(BIN)python scripts/man

fmt:            ## bring all sources into shape
	$(BIN)ruff check --fix $(SOURCES)
	$(BIN)ruff format $(SOURCES)

lint:
	$(BIN)ruff check $(SOURCES)
	$(BIN)ruff format --check $(SOURCES)

types:
	$(BIN)mypy

test:           ## what needs no mount
	$(PYTEST) tests/unit tests/behaviour --drivers plain,fs

test-mounted:   ## what needs /dev/fuse and root
	$(PYTEST) tests/mounted tests/cli tests/programs tests/behaviour --drivers fuse,kernel

test-together:  ## eight processes on one store for a minute; needs root
	OVERLAYFS_TEST_SECONDS=60 $(BIN)python -m pytest -q -s tests/store/test_together.py

test-pyfuse3:   ## the same on the portable engine
	$(PYTEST) --engine pyfuse3 --drivers pyfuse3,command tests/mounted tests/programs tests/differential tests/behaviour

check: lint types docs  ## all that CI runs; what differs between the engines runs on both
	$(PYTEST)
	$(PYTEST) --engine pyfuse3 tests/mounted tests/programs/test_work.py

campaign:       ## the fault campaigns at full size, up to an hour; writes docs/reliability.md; needs root
	PATH=$(abspath $(BIN)):$$PATH $(BIN)python scripts/campaign

steps:          ## a million random steps on each engine beside the model, three quarters of an hour; needs root
	$(BIN)python -m tests.model.walk --engine kernel --steps 1000000 --seed 1 --record docs/reliability-steps.json
	$(BIN)python -m tests.model.walk --engine pyfuse3 --steps 1000000 --seed 1 --record docs/reliability-steps.json

bench:          ## times beside a plain directory, the kernel's overlayfs and other FUSE overlays; needs root
	$(BIN)python scripts/bench run

conformance:    ## a public suite beside ext4 and the kernel: make conformance PJDFSTEST=/its/built/checkout
	PATH=$(abspath $(BIN)):$$PATH $(BIN)python scripts/conformance $(PJDFSTEST)

docs:           ## the documentation site, in build/docs; a warning is an error
	$(BIN)sphinx-build -q -W --keep-going -b html docs build/docs

clean:
	rm -rf build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
