# Development commands. `make help` lists them.
.DEFAULT_GOAL := help
SHELL := /bin/bash

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The torch of the environment. Any from 2.10 on does; benchmarks and peers are of this one's time.
TORCH ?= 2.11.0
# Outside the checkout, so that a fresh clone does not compile the dependencies again.
export CARGO_TARGET_DIR ?= $(HOME)/.cache/oddsmith/cargo-target
# pip builds without isolation here: with the environment's maturin.
ACTIVATE := source $(BIN)/activate
# What tests use and users do not get: switches between the paths of an op, an emulated CUDA driver.
TESTING := python,testing

# CORE=installed: nothing is compiled or downloaded. The environment of PYTHON is used as it is, with a wheel of
# `make test-wheel` in it: for machines without Rust or without a network.
RUN := $(BIN)/python
ifeq ($(CORE),installed)
RUN := $(shell $(PYTHON) -c "import sys; print(sys.executable)")
ACTIVATE := export PATH="$(dir $(RUN)):$$PATH"
endif

.PHONY: help
help: ## List the commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

ifneq ($(CORE),installed)
$(BIN)/.tools:
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install "maturin>=1.16,<2" "torch==$(TORCH)"
	@touch $@

.PHONY: build
build: $(BIN)/.tools ## Make the environment, compile and install the package into it
	$(ACTIVATE) && pip install --no-build-isolation -e .

.PHONY: test-build
test-build: $(BIN)/.tools
	$(ACTIVATE) && MATURIN_PEP517_ARGS="--features $(TESTING)" pip install --no-build-isolation -e ".[test]"

.PHONY: bench-build
bench-build: $(BIN)/.tools
	$(ACTIVATE) && pip install --no-build-isolation -e ".[bench]"

else
.PHONY: build test-build bench-build
build test-build bench-build:
	@$(RUN) -c "from oddsmith import _core; print('oddsmith', _core.__version__, 'of', _core.__file__)"
endif

.PHONY: demo
demo: build ## Install, then train a small model with ORPO, offline
	$(BIN)/oddsmith demo

# A file's tests stay in one process, for they share models and runs.
PYTEST = pytest -n auto --maxprocesses 8 --dist loadfile --durations 10

.PHONY: test
test: test-build ## Install, then run all tests, a process a core; names the slowest ten
	$(ACTIVATE) && cargo test --quiet && $(PYTEST)

.PHONY: test-rust
test-rust: test-build ## The Rust tests: the algorithms, then the borders to torch and Python
	cargo test
	$(ACTIVATE) && cargo test --release --features $(TESTING)

.PHONY: slow
slow: test-build ## The long parity runs (ODDSMITH_SHARED names the folder with the real data)
	$(ACTIVATE) && pytest -m slow

# Not in the extra `test`: it comes as source only, which the pip of older Pythons builds with the package wheel alone. Its
# kernels are not compiled.
DEEPSPEED = deepspeed==0.19.8
.PHONY: engines
engines: test-build ## Install DeepSpeed; the tests that need it, which `make test` leaves out where it is missing
	$(ACTIVATE) && pip install --quiet wheel && DS_ACCELERATOR=cpu pip install --quiet "$(DEEPSPEED)"
	$(ACTIVATE) && $(PYTEST) tests/e2e/test_engines_deepspeed.py tests/e2e/test_launch_engines.py \
		tests/e2e/test_stop_engines.py

.PHONY: develop
develop: ## Compile again after a change in src/, for tests
	$(ACTIVATE) && maturin develop --release --skip-install --features $(TESTING)

# The others need packages that a machine with a GPU may not have.
GPU_TESTS = tests/gpu tests/unit/packing
.PHONY: gpu
gpu: test-build ## The tests that need a GPU
	$(ACTIVATE) && $(RUN) -m pytest -m gpu $(GPU_TESTS)

# Without libtorch's cache every tensor is a separate allocation, whose end memcheck knows. Tests that use up
# memory, capture graphs or try thousands of shapes are left out, and so are the peers.
SANITIZE = $(RUN) -m pytest tests/gpu -m gpu -k "not random and not graph and not runs_out and not bitsandbytes and not trl"
.PHONY: sanitize
sanitize: test-build ## The tests that need a GPU, under compute-sanitizer: accesses out of bounds, races in shared memory
	@command -v compute-sanitizer > /dev/null || { echo "sanitize: compute-sanitizer, of NVIDIA's toolkit, is not on PATH" >&2; exit 1; }
	$(ACTIVATE) && export PYTORCH_NO_CUDA_MEMORY_CACHING=1 && for tool in memcheck racecheck; do \
		compute-sanitizer --tool $$tool --error-exitcode 1 $(SANITIZE) || exit 1; done

.PHONY: lint
lint: test-build ## Formatting and lints, Rust and Python; CI runs the same
	cargo fmt --check
	$(MAKE) --no-print-directory clippy
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/basedpyright
	$(BIN)/python tests/support/check_stub.py
	$(BIN)/lint-imports

.PHONY: clippy
clippy: ## Lints of the Rust code alone: the algorithms, then tensors and Python, as installed and as tested
	cargo clippy --locked --all-targets -- --deny warnings
	for features in python $(TESTING); do \
		cargo clippy --locked --all-targets --features $$features --target-dir $(CARGO_TARGET_DIR)-lint -- --deny warnings || exit 1; done

.PHONY: fmt
fmt: test-build ## Format everything
	cargo fmt
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

.PHONY: kernels
kernels: test-build ## Registers, shared memory and spills of every CUDA kernel; needs no GPU
	$(BIN)/python tests/support/kernel_usage.py

# Real pairs where there are some, generated ones of the same lengths otherwise.
PAIRS := $(wildcard $(or $(ODDSMITH_SHARED),../shared)/data/alpacaeval_mistral_orpo.jsonl.gz)
MEASURE = $(BIN)/python benches/bench_
.PHONY: bench
bench: bench-build ## Measure beside TRL, Liger, bitsandbytes, torchao and galore-torch; rows to benches/results.csv
	$(MEASURE)head.py --record
	$(MEASURE)quant.py --record
	$(MEASURE)quant.py --record --pool --only dequantize --dtype float32
	$(MEASURE)optim_adamw.py --record
	$(MEASURE)optim_low_rank.py --record
	$(MEASURE)data.py --record
	$(MEASURE)data.py --record --memory 1000000
	$(MEASURE)training.py --record $(PAIRS:%=--data %)
	$(MEASURE)training.py --record --long-prompts
	$(MEASURE)training.py --record --qlora $(PAIRS:%=--data %)
	$(MEASURE)checkpoint.py --record
	$(MEASURE)demo.py --record

.PHONY: bench-gpu
bench-gpu: bench-build ## Measure steps and kernels on a GPU, beside the same peers; 8 minutes
	$(ACTIVATE) && $(RUN) -m benches.gpu --record

# zig links with an old C library, so that the wheel runs wherever torch's own does; TARGET=aarch64-unknown-linux-gnu
# makes the wheel of another processor.
ZIG = $(if $(TARGET),rustup target add $(TARGET) &&) $(ACTIVATE) && maturin build --release --locked --zig \
	$(TARGET:%=--target %) --compatibility manylinux_2_28 --auditwheel check
.PHONY: zig
zig: $(BIN)/.tools
	$(BIN)/pip install --quiet "ziglang>=0.15"

.PHONY: wheel
wheel: zig ## The wheel for every Python and torch, on Linux with glibc 2.28 or newer
	rm -f dist/*.whl
	$(ZIG) --out dist
	$(BIN)/python tests/support/wheel.py dist/*.whl

# One wheel, with what tests use, goes unchanged into every environment of the matrix.
MATRIX := $(or $(ODDSMITH_CACHE),$(HOME)/.cache/oddsmith)/matrix
.PHONY: matrix-wheel
matrix-wheel: $(BIN)/.tools
	$(BIN)/pip install --quiet "uv>=0.9"
	rm -rf $(MATRIX)/dist
	$(ACTIVATE) && maturin build --release --locked --features $(TESTING) --out $(MATRIX)/dist

.PHONY: matrix
matrix: matrix-wheel ## Tests with every torch from 2.10, Pythons, and both ends of the libraries; the table of docs/compatibility.md
	$(ACTIVATE) && python tests/support/matrix.py $(MATRIX)/dist/*.whl $(CELLS:%=--only "%") $(DISCARD:%=--discard)

# Interrupted, it goes on where it was. SOAK=0.01 runs a share, PARTS="kills fuzz steps" some. Counts are JSON files in SOAK_DIR.
SOAK ?= 1
.PHONY: soak
soak: test-build ## Kill and resume runs, damage the input of every reader, train for long; docs/reliability.md; days
	$(ACTIVATE) && PYTHONPATH=tests python -W ignore -m soak $(SOAK) $(PARTS)

# Interrupted, it goes on where it was: what is known is in the cache folder. MODELS=Llama tries some, AGAIN=1 tries again.
.PHONY: models
models: test-build ## Try every architecture of the installed transformers; docs/models.md; an hour or more
	$(ACTIVATE) && PYTHONPATH=tests python -W ignore -m support.model_table $(MODELS:%=--only "%") $(AGAIN:%=--again)

.PHONY: newest
newest: matrix-wheel ## Tests with the newest torch, and another Python where there is one
	$(ACTIVATE) && python tests/support/matrix.py $(MATRIX)/dist/*.whl --newest $(DISCARD:%=--discard)

.PHONY: test-wheel
test-wheel: zig ## The same with what tests need, for machines without Rust
	rm -rf dist/testing
	$(ZIG) --features $(TESTING) --out dist/testing
	$(BIN)/python tests/support/wheel.py dist/testing/*.whl

.PHONY: check-wheel
check-wheel: wheel test-build ## Installs the wheel, and the source archive, into environments without a compiler
	$(ACTIVATE) && ODDSMITH_WHEEL=$$(echo dist/*.whl) pytest -m "slow or not slow" tests/e2e/test_wheel.py

# What needs no C compiler for the target: the algorithms and the kernels' launches.
PLATFORMS = aarch64-unknown-linux-gnu aarch64-apple-darwin x86_64-pc-windows-gnu
.PHONY: platforms
platforms: ## Compile the algorithms for platforms that this machine cannot run
	rustup target add $(PLATFORMS)
	for target in $(PLATFORMS); do cargo check --locked --features cuda --target $$target || exit 1; done

.PHONY: clean
clean: ## Remove the environment and what Python has cached
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis .mypy_cache .import_linter_cache .grimp_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
