"""Before anything of cllm is imported: without a GPU, Triton's interpreter runs the GPU kernels."""

import os

import torch

if not torch.cuda.is_available():  # read by Triton when a kernel is defined, and by cllm.kernels when it registers the backends
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=4, help="how often the fault campaign kills a training (default 4)")
