"""Before anything of cllm is imported: without a GPU, Triton's interpreter runs the GPU kernels."""

import os

import pytest
import torch

if not torch.cuda.is_available():  # read by Triton when a kernel is defined, and by cllm.kernels when it registers the backends
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3, help="how often the fault campaign kills a training (default 3)")
    parser.addoption("--slow", action="store_true", help="also the compile lint of every dtype and GPU, which takes minutes of all cores")


# Files that take longest come first: several processes take a file each, and what begins last should be short.
LONGEST_FIRST = ("tests/end_to_end/", "tests/gpu_emulation/", "tests/kernels/", "tests/cllm/cli/", "tests/cllm/train/", "")


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: next(rank for rank, start in enumerate(LONGEST_FIRST) if item.nodeid.startswith(start)))
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes of all cores: --slow"))
