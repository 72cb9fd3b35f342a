# One command each; set-up (a virtual environment and the installation) is part of the command and happens once.
#
#   make quickstart          align the embedded policy on a CPU; a few minutes after installation
#   make test                the test suite (15 minutes of two cores at most); ARGS="-k paths" narrows it
#   make test-all            the same with the tests marked slow
#   make lint                ruff, mypy, import contracts
#   make bench               every benchmark, JSON lines on the terminal
#   make preflight           the memory table of TPU slices (docs/scaling.md), hours of two cores from scratch; needs no TPU
#
# PYTHON=python3.12 chooses the interpreter; each gets an environment of its own.

PYTHON ?= python3
JOBS ?= 2
ARGS ?=

VENV := $(if $(filter python3,$(PYTHON)),.venv,.venv-$(notdir $(PYTHON)))
BIN := $(VENV)/bin

# Stamps are named after what they vouch for: a changed interpreter or pyproject.toml has no stamp yet.
WHO := import sys; print(sys.base_prefix, sys.version)
KEY := $(shell $(PYTHON) -c "import hashlib, sys; w = sys.base_prefix + sys.version; \
	print(hashlib.sha256(w.encode() + open('pyproject.toml', 'rb').read()).hexdigest()[:16])")
ifeq ($(KEY),)
$(error $(PYTHON) does not run; name a Python of 3.11 or newer with PYTHON=...)
endif

# XLA compiles the same programs in every process: keep them on disk.
CACHE_ENV := JAX_COMPILATION_CACHE_DIR=$(CURDIR)/.cache/jax \
	JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.3 JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=0
# Tests never touch an accelerator or a hub.
TEST_ENV := $(CACHE_ENV) JAX_PLATFORMS=cpu OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: quickstart test test-all lint format bench preflight clean

quickstart: $(VENV)/installed-run-$(KEY)
	$(CACHE_ENV) $(BIN)/python scripts/quickstart.py $(ARGS)

test: $(VENV)/installed-dev-$(KEY)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow" --durations=15 $(ARGS)

test-all: $(VENV)/installed-all-$(KEY)
	$(TEST_ENV) $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder --durations=30 $(ARGS)

lint: $(VENV)/installed-dev-$(KEY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed-dev-$(KEY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed-run-$(KEY)
	@set -e; for script in benchmarks/[a-z]*.py; do \
		if [ -e "$$script" ]; then echo "# $$script" >&2; $(BIN)/python "$$script" $(ARGS); fi; done

preflight: $(VENV)/installed-tpu-$(KEY)
	$(BIN)/python tpu/preflight_table.py $(ARGS)

clean:
	rm -rf .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache build dist *.egg-info

$(VENV)/installed-run-$(KEY): | $(VENV)/python-$(KEY)
	$(BIN)/python -m pip install --quiet --editable .
	@touch $@

$(VENV)/installed-dev-$(KEY): | $(VENV)/python-$(KEY)
	$(BIN)/python -m pip install --quiet --editable '.[test,lint]'
	@touch $@ $(VENV)/installed-run-$(KEY)

$(VENV)/installed-tpu-$(KEY): | $(VENV)/python-$(KEY)
	$(BIN)/python -m pip install --quiet --editable '.[tpu]'
	@touch $@ $(VENV)/installed-run-$(KEY)

$(VENV)/installed-all-$(KEY): | $(VENV)/installed-dev-$(KEY)
	$(BIN)/python -m pip install --quiet --editable '.[test-all]'
	@touch $@

# Keeps an environment of the same interpreter, replaces one of another.
$(VENV)/python-$(KEY):
	@if [ "$$($(BIN)/python -c '$(WHO)' 2>&1)" != "$$($(PYTHON) -c '$(WHO)')" ]; then \
		echo "$(PYTHON) -m venv $(VENV)"; $(PYTHON) -m venv --clear $(VENV); fi
	@touch $@
