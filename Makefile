# make demo: train a small model on this machine's own Python sources.   make test: prove the installation.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUN    ?= runs/demo

.PHONY: setup demo test test-triton-3.6 lint clean

setup: $(VENV)/.ready

# The marker is written last: an interrupted installation is simply done again.
$(VENV)/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found. Install Python 3.11 or newer, or say make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version). Say make PYTHON=python3.12 or the like"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "make: could not create $(VENV). On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Installing CLLM and its dependencies into $(VENV) (pinned in constraints.txt; one to three minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,all]'
	@touch $@

demo: setup
	@$(BIN)/cllm train "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" --config examples/demo.toml --out $(RUN)

# Two processes take a file of tests each; they share the machine, so threads that wait do not spin.
test: setup
	@OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# What torch 2.11 brings: the GPU kernels interpreted and compiled by the older Triton.
test-triton-3.6: setup
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(VENV)/triton-3.6 triton==3.6.0
	@PYTHONPATH=$(VENV)/triton-3.6 $(BIN)/python -m pytest tests/kernels -k "triton or gpu or compile_lint"

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
