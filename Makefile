# make demo: pictures in demo-output/.   make demo-server: the playground in a browser.   make test: the test suite.   make lint: ruff and mypy.
# make gpu-test: the tests that need GPUs (each skips with a reason where there are too few). With
#   DITRELAY_TEST_DEVICE=cpu most of them run over gloo: that checks the tests, not the GPUs' part. With -j2 -Otarget
#   its two halves run side by side.
#
# PYTHON: the interpreter that makes .venv.   PIP_ARGS: more arguments for pip (an index with another build of torch).
# PYTEST_ARGS: more arguments for pytest.

PYTHON ?= python3
PIP_ARGS ?=
PYTEST_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt $(PIP_ARGS)
# In this mode type checkers and editors find the package, too: pip's usual one hides it behind an import hook.
EDITABLE := --config-settings editable_mode=compat --editable

# A stamp says what .venv holds, so that nothing is installed or downloaded again while these files stay as they are.
STAMP := $(VENV)/.installed
DEV_STAMP := $(VENV)/.installed-dev
SOURCES := pyproject.toml constraints.txt

.PHONY: demo demo-server browser test test-waiting test-others gpu-test gpu-test-models gpu-test-engine lint clean

demo: $(STAMP)
	$(BIN)/python scripts/demo.py

demo-server: $(STAMP)
	$(BIN)/python scripts/demo_server.py

# These wait for browsers and for servers of their own most of the time: without PYTEST_ARGS they run beside the others,
# in about the same time.
SERVERS := async_basic chaos cli cli_interrupt head_ends jobs_killed machine_limits openai_client orphans same_bytes server_videos
WAITING := $(wildcard tests/test_playground*.py) $(SERVERS:%=tests/test_%.py)

test: $(DEV_STAMP) browser
ifeq ($(PYTEST_ARGS),)
	@$(MAKE) --no-print-directory -j2 test-waiting test-others
else
	$(BIN)/python -m pytest -q $(PYTEST_ARGS)
endif

test-waiting:
	$(BIN)/python -m pytest -q $(WAITING)

test-others:
	$(BIN)/python -m pytest -q $(WAITING:%=--ignore=%)

# What starts many engines of its own side by side, and everything else.
MANY_ENGINES := tests/test_cuda_parallel.py tests/test_cuda_memory.py
GPU_PYTEST := $(BIN)/python -m pytest -q -rs --timeout=180 --durations=12

gpu-test: gpu-test-models gpu-test-engine

gpu-test-models: $(DEV_STAMP)
	$(GPU_PYTEST) $(MANY_ENGINES) $(PYTEST_ARGS)

gpu-test-engine: $(DEV_STAMP)
	$(GPU_PYTEST) $(filter-out $(MANY_ENGINES),$(wildcard tests/test_cuda_*.py)) $(PYTEST_ARGS)

# The tests of the playground drive Chromium; without one they skip and say so.
browser:
	@sh scripts/browser.sh

lint: $(DEV_STAMP)
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf demo-output build *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(STAMP): $(SOURCES) | $(BIN)/python
	$(PIP_INSTALL) $(EDITABLE) .
	touch $@

$(DEV_STAMP): $(SOURCES) | $(BIN)/python
	$(PIP_INSTALL) $(EDITABLE) ".[dev]"
	touch $(STAMP) $@
