# Every target does its own set-up: a virtual environment in .venv with the hash-locked requirements.lock and this
# package, made once and again only when the lock or pyproject.toml changes.

PYTHON ?= python3
CONFIG ?= configs/quickstart.yaml
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help train check test lint types contract deps pytest chaos nightly nightly-newest audit size docs docs-serve \
  hooks setup lock dist clean
.DEFAULT_GOAL := help

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(READY) ## the environment alone, in .venv: about 6 GB

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "error: $(PYTHON) is older than Python 3.11; name a newer one: make PYTHON=python3.12 ..." >&2; exit 3; }
	@echo "setting up $(VENV): about 6 GB, some minutes the first time"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

train: $(READY) ## the quickstart, no download (CONFIG=configs/other.yaml ARGS='key=value ...' for another)
	@$(BIN)/densenet-dist train $(CONFIG) name=$(notdir $(basename $(CONFIG)))-$$(date +%Y%m%d-%H%M%S) $(ARGS)

check: lint types contract deps $(READY) ## for everyday use, about 2 minutes on 2 cores: checks, and the quick tests
	@$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not nightly" $(ARGS)

test: $(READY) ## what CI runs: lint, types, contract, deps and pytest
	@echo "make test: about 10 minutes on 2 cores (make check: 2)"
	@$(MAKE) --no-print-directory lint types contract deps pytest

lint: $(READY) ## code style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## mypy, strict
	$(BIN)/mypy

contract: $(READY) ## which package may import which
	$(BIN)/lint-imports

deps: $(READY) ## every import is declared in pyproject.toml, and every dependency is used
	$(BIN)/deptry .

# Tests of one file run in one process; those that start Ray share a process, so that they never run side by side
# (tests/conftest.py).
PARALLEL := --numprocesses 2 --dist loadfile --no-loadscope-reorder

pytest: $(READY) ## the tests (ARGS='tests/model -k fused' for some)
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

chaos: $(READY) ## inject every fault into real commands, and write docs/reliability.md (ARGS='-k killed' for some)
	$(BIN)/python -m pytest tests/chaos -m "nightly or not nightly" --timeout 1800 --page docs/reliability.md $(ARGS)

nightly: $(READY) ## what is too slow for make test: all faults, 19,000 fuzzed inputs, long runs
	$(BIN)/python -m pytest -m nightly --timeout 1800 $(ARGS)

audit: $(READY) ## known vulnerabilities of the locked dependencies; asks the PyPI advisory database
	$(BIN)/python -m pip_audit --strict --requirement requirements.lock --disable-pip

NEWEST := .venv-newest

nightly-newest: ## the tests with the newest versions that pyproject.toml allows, in an environment of its own
	$(PYTHON) -m venv --clear $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	$(NEWEST)/bin/python -m pip list --disable-pip-version-check
	PATH="$(CURDIR)/$(NEWEST)/bin:$$PATH" $(NEWEST)/bin/python -m pytest $(PARALLEL) $(ARGS)

size: ## lines, modules, classes, length of functions, comments and words; tests/test_size.py sets the limits
	@$(PYTHON) benchmarks/size.py

hooks: $(READY) ## have git run lint, format and types before each commit
	$(BIN)/pre-commit install

dist: $(READY) ## the source distribution, and the wheel from it, in dist/; no network
	rm -rf dist
	$(BIN)/python -m build --no-isolation

MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs

docs: $(READY) ## the documentation as a site that opens from the disk: build/docs/index.html
	$(MKDOCS) build --strict

docs-serve: $(READY) ## the same on http://127.0.0.1:8000, built anew as you write
	$(MKDOCS) serve --dev-addr 127.0.0.1:8000 --watch densenet_dist --watch README.md --watch launch/README.md

LOCK := --universal --python-version 3.11 --generate-hashes --no-annotate --custom-compile-command "make lock" --quiet

# The second lock is for the image: the same versions without what only developers need, but for hatchling, which builds
# the package.
lock: ## write requirements.lock and requirements-runtime.lock anew (needs uv)
	uv pip compile pyproject.toml requirements.in --extra dev $(LOCK) --output-file requirements.lock
	echo hatchling | uv pip compile pyproject.toml requirements.in - --extra s3 --constraints requirements.lock $(LOCK) \
	  --output-file requirements-runtime.lock

clean: ## remove .venv, dist and caches; runs and data stay
	rm -rf $(VENV) $(NEWEST) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
