# Every target does its own set-up: a virtual environment in .venv with the hash-locked requirements.lock and this
# package, made once and again only when the lock or pyproject.toml changes.

PYTHON ?= python3
CONFIG ?= configs/quickstart.yaml
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: help train test lint types contract pytest nightly docs docs-serve hooks setup lock dist clean
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

test: lint types contract pytest ## what CI runs: the four below

lint: $(READY) ## style and format of the code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY) ## mypy, strict
	$(BIN)/mypy

contract: $(READY) ## who may import whom
	$(BIN)/lint-imports

pytest: $(READY) ## the tests (ARGS='tests/model -k fused' for some)
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder $(ARGS)

nightly: $(READY) ## what takes too long for that: every fault of `densenet-dist chaos`, 19,000 fuzzed inputs
	$(BIN)/python -m pytest -m nightly --timeout 1800 $(ARGS)

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
	echo hatchling | uv pip compile pyproject.toml requirements.in - --constraints requirements.lock $(LOCK) \
	  --output-file requirements-runtime.lock

clean: ## remove .venv, dist and caches; runs and data stay
	rm -rf $(VENV) build dist .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
