# Every target sets up what it needs; nothing has to be installed or activated by hand.
MAKEFLAGS += --no-print-directory
.DEFAULT_GOAL := help
.SILENT:
.PHONY: help env env-parity env-cuda env-all quickstart test test-all test-parity test-oldest test-cuda gpu gpu-wheels reproduce
.PHONY: docs lint format typecheck clean notebooks first-hour pictures

# Two test processes fill two cores; more need about 2 GB of memory each.
JOBS ?= 2
# More arguments for pytest, for example ARGS="tests/optim -k lamb" or ARGS=-x.
ARGS ?=
# XLA's older emitters compile for a CPU in half the time.
QUICK_XLA := XLA_FLAGS="--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters $(XLA_FLAGS)"
# A test's programs run for microseconds and need no costly passes; `make test-all` compiles as users do.
QUICK_TESTS := JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(QUICK_XLA)
# Tests that need no environment or device of their own.
HERE := not parity and not cuda and not gpu
SETUP := scripts/setup_env.sh
PY := .venv/bin/python
PARITY_PY := .venv-parity/bin/python
CUDA_PY := .venv-cuda/bin/python
# The GPU machine's own interpreter: it brings JAX for its GPU and, for comparison, torch.
GPU_PY ?= python3
PYTEST := -m pytest -q -n $(JOBS) --dist worksteal

help: ## show this
	echo "make TARGET [JOBS=2] [ARGS='pytest arguments'] [PYTHON=/path/to/python]"; echo
	awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env: ## make or refresh .venv (every target below does that by itself)
	$(SETUP) --venv .venv --extras test

env-parity:
	$(SETUP) --venv .venv-parity --extras test,parity --constraints py311 --prefer 3.11

env-cuda:
	$(SETUP) --venv .venv-cuda --extras test,cuda13-compile

env-all: env env-parity env-cuda ## all environments, one after another

quickstart: env ## train a small language model on this machine, then sample from it (minutes)
	$(PY) scripts/quickstart.py

first-hour: env ## all that the README tells, step by step, with the quickstart's model if there is one (minutes)
	$(PY) scripts/first_hour.py $(ARGS)

notebooks: env ## execute the notebooks at a small size [ARGS=--save: whole, and keep what they show]
	$(QUICK_XLA) $(PY) scripts/notebooks.py $(ARGS)

pictures: env ## make docs/pictures anew, from a quickstart that is run for it (minutes)
	rm -rf runs/pictures && mkdir -p runs/pictures
	$(PY) scripts/quickstart.py --workdir=runs/pictures/quickstart >runs/pictures/log 2>&1 || { cat runs/pictures/log; exit 1; }
	$(PY) scripts/make_pictures.py --log=runs/pictures/log --run=runs/pictures/quickstart

test: lint typecheck ## lint, types and every test but the slow ones
	$(QUICK_TESTS) $(PY) $(PYTEST) -m "not slow and $(HERE)" $(ARGS)

test-all: lint typecheck env-parity env-cuda ## the same with the slow sweeps, whole on the oldest versions too (a night)
	$(PY) $(PYTEST) -m "$(HERE)" $(ARGS)
	$(PARITY_PY) $(PYTEST) -m "not slow and $(HERE)" $(ARGS)
	$(CUDA_PY) $(PYTEST) -m "cuda" $(ARGS)

test-parity: env-parity ## compare with torch and transformers, in an environment of its own (.venv-parity)
	$(QUICK_TESTS) $(PARITY_PY) $(PYTEST) -m "parity" $(ARGS)

test-oldest: env-parity ## a test of every file with the oldest supported Python and JAX (all of them: make test-all)
	$(QUICK_TESTS) $(PARITY_PY) $(PYTEST) --functions-per-file=1 -m "not slow and $(HERE)" $(ARGS)

test-cuda: env-cuda ## compile the GPU kernels for an absent H200, in an environment of its own (.venv-cuda)
	$(CUDA_PY) $(PYTEST) -m "cuda and not slow" $(ARGS)

gpu: ## on a machine with an H200 or H100: its tests and all kernel benchmarks in 10 minutes; needs no network [GPU_PY=python3]
	$(GPU_PY) scripts/run_on_gpu.py $(ARGS)

gpu-wheels: ## download what `make gpu` may lack on such a machine, to wheels/
	$(GPU_PY) scripts/run_on_gpu.py --download

reproduce: env ## measure the papers' claims at a size for this machine, rebuild docs/papers.md (half an hour or more)
	$(PY) scripts/reproduce.py --all $(ARGS)

docs: env ## build the site, guides and API reference, in build/site; a broken link is an error
	$(PY) -m sphinx -q -W --keep-going -b html docs build/site

lint: env ## check style and formatting (ruff)
	$(PY) -m ruff check --quiet .
	$(PY) -m ruff format --quiet --check . || { echo "ruff format: files above would change; run make format" >&2; exit 1; }

format: env ## mend style and formatting (ruff)
	$(PY) -m ruff check --quiet --fix .
	$(PY) -m ruff format --quiet .

typecheck: env ## check types (mypy)
	$(PY) -m mypy --no-error-summary

clean: ## remove caches and build leftovers; environments and runs/ stay
	rm -rf build dist docs/reference *.egg-info .pytest_cache .ruff_cache .mypy_cache .jax_cache
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +
