# `make demo` and `make test` each do everything on a machine with make and Python 3.10 or newer.
#
#   make demo                                    one clip, dense and accelerated, written to demo/
#   make test                                    every gate that CI runs
#   make test TORCH="torch --index-url URL"      with another build of torch
#   make demo PYTHON=python3.12                  with another interpreter

TORCH  ?= torch==2.13.0
TRITON ?= triton==3.6.0
VENV   ?= .venv
JOBS   ?= 2
PYTEST_ARGS ?=
DEMO_ARGS   ?=

SHELL := /bin/sh
.DEFAULT_GOAL := help
.PHONY: help demo test lint format typecheck docs aot unit bench clean

ifeq ($(OS),Windows_NT)
BIN := $(VENV)/Scripts
else
BIN := $(VENV)/bin
endif
PY  := $(BIN)/python
PIP := $(PY) -m pip --disable-pip-version-check install -qq

ONE_THREAD := env OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
PYTEST     := $(PY) -m pytest -q -n $(JOBS) --dist worksteal

# A stamp carries the versions asked for: another TORCH is another stamp, so that it is installed.
KEY  := $(shell printf '%s' '$(TORCH) $(TRITON)' | cksum | cut -d' ' -f1)
BASE_READY := $(VENV)/.ready-base-$(KEY)
DEMO_READY := $(VENV)/.ready-demo-$(KEY)
TEST_READY := $(VENV)/.ready-test-$(KEY)

help:
	@echo 'make demo    generate a clip, dense and accelerated, into demo/'
	@echo 'make test    lint, types, docs, ahead-of-time compilation, tests, wheel'
	@echo 'make lint | format | typecheck | docs | aot | unit | bench | clean'

# ---------------------------------------------------------------------------------------------------------- set-up

$(PY):
	@PYTHON='$(PYTHON)' VENV='$(VENV)' sh .ci/make_venv.sh

$(BASE_READY): | $(PY)
	@echo 'set-up: $(TORCH) (a large download the first time)'
	@$(PIP) $(TORCH)
	@touch $@

$(DEMO_READY): $(BASE_READY) pyproject.toml
	@echo 'set-up: dit-accel with what the demo needs'
	@$(PIP) -e '.[diffusers,eval]'
	@touch $@

# A CUDA build of torch brings the Triton it was made for; a CPU build brings none, and the compilation gate needs one.
$(TEST_READY): $(BASE_READY) pyproject.toml
	@echo 'set-up: dit-accel with what the tests need'
	@$(PY) -c 'import triton' 2>/dev/null || $(PIP) '$(TRITON)'
	@$(PIP) -e '.[diffusers,eval,docs,dev]'
	@touch $@

# ------------------------------------------------------------------------------------------------------------ jobs

demo: $(DEMO_READY)
	@$(BIN)/dit-accel demo --out demo $(DEMO_ARGS)

# pytest comes last, so that the last line printed is its count. It holds the documentation, wheel and compilation gates, too.
test: $(TEST_READY)
	@$(MAKE) --no-print-directory lint typecheck unit

lint: $(TEST_READY)
	@echo '== ruff'
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .

format: $(TEST_READY)
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .

typecheck: $(TEST_READY)
	@echo '== mypy'
	@$(PY) -m mypy

docs: $(TEST_READY)
	@$(PY) -m mkdocs build --strict --quiet --site-dir site

aot: $(TEST_READY)
	@echo '== ahead-of-time compilation of every GPU kernel'
	@env -u TRITON_INTERPRET $(PY) -m dit_accel_kernels.aot

# Triton's interpreter is a choice for a whole process, so its tests have a run of their own (5: there are none).
unit: $(TEST_READY)
	@echo '== pytest: Triton kernels in the interpreter'
	@$(ONE_THREAD) TRITON_INTERPRET=1 $(PYTEST) -m interpreter || test $$? -eq 5
	@echo '== pytest'
	@$(ONE_THREAD) $(PYTEST) -m 'not interpreter' --durations=10 $(PYTEST_ARGS)

bench: $(TEST_READY)
	@$(PY) benchmarks/kernels.py

clean:
	rm -rf $(VENV) build dist site demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
