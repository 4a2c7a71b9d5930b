# make demo: train a small model on this machine's own Python sources.   make app: CLLM in a browser.   make test: prove the installation.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
RUN    ?= runs/demo

.PHONY: setup demo app test peers sphinx docs test-triton-3.6 lint clean

setup: $(VENV)/.ready

# The marker is written last: an interrupted installation is simply done again.
$(VENV)/.ready: pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "make: $(PYTHON) not found. Install Python 3.11 or newer, or say make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "make: Python 3.11 or newer is needed, $(PYTHON) is $$($(PYTHON) --version). Say make PYTHON=python3.12 or the like"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "make: could not create $(VENV). On Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Installing CLLM and its dependencies into $(VENV) (pinned in constraints.txt; one to three minutes) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt torch
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,all]'
	@touch $@

demo: setup
	@$(BIN)/cllm train "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" --config examples/demo.toml --out $(RUN)
	@if [ -t 1 ]; then echo "Next, in a browser, with this model and for your own text (Ctrl-C ends it, make app begins it again):"; \
		$(BIN)/cllm app --port 0; else echo "In a browser, with this model and for your own text: make app"; fi

# The repository's folder is the workspace; in a folder of your own say path/to/.venv/bin/cllm app.
app: setup
	@$(BIN)/cllm app

# Three processes take a file of tests each, because many tests wait for commands; they share the machine, so threads that wait do not spin. Tests
# start hundreds of processes: with Python's bytecode kept, whatever the environment says, none compiles the sources of CLLM again.
test: setup
	@PYTHONDONTWRITEBYTECODE= OMP_WAIT_POLICY=passive $(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder --durations 25

# What CLLM is compared with: lm-evaluation-harness, and llama.cpp as a prebuilt library through npm; and NVRTC, which compiles CUDA C++ without a
# GPU. Without them their tests are skipped.
# llama.cpp's build for AMX is left out: it crashes where the system does not grant tiles to a process.
peers: $(VENV)/.peers

$(VENV)/.peers: $(VENV)/.ready
	@command -v npm >/dev/null || { echo "make: npm not found. On Debian and Ubuntu: apt install npm"; exit 1; }
	@echo "Installing what CLLM is compared with into $(VENV) ..."
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[dev,all,eval]' accelerate nvidia-cuda-nvrtc
	@mkdir -p $(VENV)/peers && cd $(VENV)/peers && { test -f package.json || echo '{"private": true}' >package.json; } && \
		npm install --silent --no-audit --no-fund --ignore-scripts --omit=optional -E node-llama-cpp@3.21.1 @node-llama-cpp/linux-x64@3.21.1
	@rm -f $(VENV)/peers/node_modules/@node-llama-cpp/linux-x64/bins/linux-x64/libggml-cpu-sapphirerapids.so
	@touch $@

sphinx: $(VENV)/.sphinx

$(VENV)/.sphinx: $(VENV)/.ready
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

# The documentation as a site in docs/_build/html; every warning is an error. With Sphinx installed, a test builds it too.
docs: sphinx
	@$(BIN)/python -m sphinx -W -n -q docs docs/_build/html
	@echo "The documentation is in docs/_build/html/index.html"

# What torch 2.11 brings: the GPU kernels interpreted and compiled by the older Triton.
test-triton-3.6: setup
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps --target $(VENV)/triton-3.6 triton==3.6.0
	@PYTHONPATH=$(VENV)/triton-3.6 $(BIN)/python -m pytest tests/kernels -k "triton or gpu or compile_lint"

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
