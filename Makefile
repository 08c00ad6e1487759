# `make demo` and `make test` do all set-up themselves; both work on a fresh clone with Python >= 3.10 and g++.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
BUILD_INPUTS := pyproject.toml setup.py constraints.txt $(wildcard csrc/*/*)
ARGS ?=
# Text of the benchmarks: files, and a folder with GPT-2's vocab.json and merges.txt; without them, Python's own reference.
TEXTS ?= $(wildcard ../shared/data/wikitext-2/valid.txt)
TOKENIZER ?= $(wildcard ../shared/data/gpt2-bpe)
# For gpu-check: a Python whose torch has CUDA, what to run (nothing: every part), and the folder of the results.
GPU_PYTHON ?= python3
PARTS ?=
OUT ?= gpu-results

.PHONY: demo test lint types check bench bench-docs bench-compare gpu-check check-triton info clean

demo: $(VENV)/.trainer
	$(BIN)/python examples/demo.py $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest -n 2 $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

check: lint types test

bench: $(VENV)/.dev
	$(BIN)/python -m benchmarks.report $(if $(TEXTS),--texts $(TEXTS)) $(if $(TOKENIZER),--tokenizer $(TOKENIZER)) $(ARGS)

# Takes the figures of README and docs from benchmarks/results.
bench-docs: $(VENV)/.dev
	$(BIN)/python -m benchmarks.publish

# make bench-compare BEFORE.json AFTER.json
bench-compare: $(VENV)/.dev
	$(BIN)/python -m benchmarks.compare $(filter-out $@,$(MAKECMDGOALS))

# Makes no virtual environment and needs no network; each part takes less than 8 minutes, and what tells most in a
# minute comes first. PARTS names some (`python -m benchmarks.gpu_check --help`), which may be run one by one into the
# same folder; gpu-check.md there has every bar. Results that the package can adopt, tuning.json and selection.json,
# stay there.
gpu-check:
	$(GPU_PYTHON) -m benchmarks.gpu_check $(if $(PARTS),--parts $(PARTS)) --out $(OUT) $(ARGS)

# Compiles Triton's kernels for every architecture with every supported version of Triton; needs no GPU.
check-triton: $(VENV)/.dev
	$(BIN)/python -m benchmarks.aot_versions $(ARGS)

info: $(VENV)/.trainer
	$(BIN)/python -m cpo_kernels info

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.trainer: $(BUILD_INPUTS) | $(VENV)/bin/python
	$(PIP) --editable '.[trainer]'
	@touch $@

$(VENV)/.dev: $(BUILD_INPUTS) | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	@touch $@ $(VENV)/.trainer

clean:
	rm -rf $(VENV) build dist *.egg-info cpo_kernels/*.so
