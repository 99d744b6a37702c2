# `make` lists the targets. Everything is installed into .venv; a second run installs nothing.

# the Python that makes .venv: any of 3.11 or newer
PYTHON ?= $(firstword $(foreach name,python3 python3.14 python3.13 python3.12 python3.11,$(call new-enough,$(name))) python3)
new-enough = $(shell $(1) -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo $(1))

# what pip installs as torch where it is missing, for example a CUDA build: make setup RETROLM_TORCH='torch==2.13.0+cu130'
RETROLM_TORCH ?= torch==2.13.0

BIN := .venv/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
USER_EXTRAS := gguf,documents
TEST_EXTRAS := $(USER_EXTRAS),evaluation,training,lora,quantised,rag,ann,ray,dev

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help setup demo demo-book test test-slow soak test-kvpress lint format clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

setup: .venv/.user ## install RetroLM into .venv

demo: .venv/.user ## read the opening chapters of a book with a small model and ask it three questions
	@$(BIN)/retrolm demo

demo-book: .venv/.user ## the same with the whole book
	@$(BIN)/retrolm demo --book

PRESET ?= quick

reproduce: .venv/.test ## the paper's tables with a small model (PRESET=quick or full, DATA=folder, MODEL, SAMPLES, ADAPTER)
	$(BIN)/retrolm reproduce configs/reproduce/$(PRESET).toml --out results/reproduce/$(PRESET) \
	  $(if $(DATA),--data-dir "$(DATA)") $(if $(MODEL),--model "$(MODEL)") \
	  $(if $(SAMPLES),--samples $(SAMPLES)) $(if $(ADAPTER),--adapter "$(ADAPTER)")

lint: .venv/.test ## style and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

test: lint ## style, types and the test suite (no GPU, no network, no model needed)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu and not slow"

test-slow: .venv/.test ## what `make test` leaves out because it takes long
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "slow and not gpu"

MINUTES ?= 3

soak: .venv/.test ## kill writers of a knowledge base 240 times, then 8 readers beside a writer (MINUTES=3)
	rm -rf build/soak && mkdir -p build/soak
	cd tests && ../$(BIN)/python kb_crash_worker.py ../build/soak/times --trials 200
	cd tests && ../$(BIN)/python kb_crash_worker.py ../build/soak/steps --trials 40 --steps
	cd tests && ../$(BIN)/python kb_soak.py ../build/soak/readers --minutes $(MINUTES)
	rm -rf build/soak

test-kvpress: .venv/.test .venv-kvpress/.made ## compare methods that prune with kvpress, in an environment of its own
	rm -rf .venv-kvpress/dump
	.venv-kvpress/bin/python tests/against_kvpress/dump.py .venv-kvpress/dump
	KVPRESS_DUMP=.venv-kvpress/dump $(BIN)/python -m pytest tests/against_kvpress/compare.py

test-browser: .venv/.test .venv-browser/.made ## open a report in a real browser, in an environment of its own (700 MB)
	BROWSER_PYTHON=.venv-browser/bin/python $(BIN)/python -m pytest tests/in_browser/check_report.py

format: .venv/.test ## apply the style
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## remove .venv and caches (pulled models stay)
	rm -rf .venv .venv-kvpress .venv-browser .pytest_cache .mypy_cache .ruff_cache .hypothesis

# kvpress needs an older transformers than we do.
.venv-kvpress/.made: tests/against_kvpress/requirements.txt
	$(PYTHON) -m venv .venv-kvpress
	.venv-kvpress/bin/python -m pip --disable-pip-version-check install --quiet $(RETROLM_TORCH) -r tests/against_kvpress/requirements.txt
	@touch $@

.venv-browser/.made: tests/in_browser/requirements.txt
	$(PYTHON) -m venv .venv-browser
	.venv-browser/bin/python -m pip --disable-pip-version-check install --quiet -r tests/in_browser/requirements.txt
	@touch $@

# The dotted files are stamps: a step runs again only when what it depends on has changed.
.venv/.made:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "RetroLM needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) -V 2>&1). Name one: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	$(PYTHON) -m venv .venv
	@touch $@

.venv/.torch: .venv/.made
	$(BIN)/python -c 'import torch' 2>/dev/null || $(PIP) $(RETROLM_TORCH)
	@touch $@

.venv/.user: .venv/.torch pyproject.toml
	$(PIP) -e '.[$(USER_EXTRAS)]'
	@touch $@

.venv/.test: .venv/.torch pyproject.toml
	$(PIP) -e '.[$(TEST_EXTRAS)]'
	@touch $@ .venv/.user
