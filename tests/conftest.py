"""Before anything of cllm is imported: without a GPU, Triton's interpreter runs the GPU kernels."""

import gc
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():  # read by Triton when a kernel is defined, and by cllm.kernels when it registers the backends
    os.environ["TRITON_INTERPRET"] = "1"

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a slow or busy machine is no fault
settings.load_profile("any machine")


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=3, help="how often the fault campaign kills a training (default 3)")
    parser.addoption("--slow", action="store_true", help="also the compile lint of every dtype and GPU, which takes minutes of all cores")


# Files that take longest come first: several processes take a file each, and what begins last should be short.
LONGEST_FIRST = (
    "tests/kernels/test_compile_lint", "tests/end_to_end/", "tests/cllm/app/browser/", "tests/gpu_emulation/", "tests/kernels/", "tests/cllm/cli/",
    "tests/cllm/train/", "",
)  # fmt: skip


def pytest_sessionstart(session):
    """Of several processes that collect all tests each begins with other files, and finds the bytecode of the rest: pytest's assertions take three
    times as long to compile as the files to import."""
    begin = getattr(session.config, "workerinput", None)
    if begin is not None and session.config.args == session.config.getini("testpaths"):
        files = sorted(str(path) for place in session.config.args for path in (session.config.rootpath / place).rglob("test_*.py"))
        first = len(files) * int(begin["workerid"].removeprefix("gw")) // begin["workercount"]
        session.config.args = files[first:] + files[:first]


def pytest_collection_modifyitems(config, items):
    def place(item):
        return next(rank for rank, start in enumerate(LONGEST_FIRST) if item.nodeid.startswith(start)), item.path

    items.sort(key=place)
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="takes minutes of all cores: --slow"))


def pytest_collection_finish(session):
    """Modules, tests and libraries are there to stay: no collection of garbage need look through them again."""
    gc.collect()
    gc.freeze()
