"""Where a model runs: which device a setting means, and what to say when its memory is not enough."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from cllm.config import ModelConfig
from cllm.memory import RECOMPUTE, MemoryPrediction, predict
from cllm.runtime.device import available_memory
from cllm.runtime.errors import UserError

CHOICES = ("auto", "cpu", "cuda")
RESERVE = 0.9  # of the free memory that a plan may take: the allocator keeps some, and so do kernels


def resolve(asked: str) -> tuple[torch.device, str]:
    """The device for "auto", "cpu" or "cuda", and why. Of several GPUs the one with the most free memory; CUDA_VISIBLE_DEVICES narrows the choice.

    Raises UserError for a GPU that is asked for and cannot be used.
    """
    if asked not in CHOICES:
        raise UserError(f"device must be one of {', '.join(CHOICES)}, got {asked!r}. Choose among GPUs with CUDA_VISIBLE_DEVICES.")
    if asked == "cpu":
        return torch.device("cpu"), "asked for"
    obstacle = _obstacle()
    if obstacle:
        if asked == "cuda":
            raise UserError(f"--device cuda: {obstacle}. Use --device cpu, or install what is missing.")
        return torch.device("cpu"), obstacle
    free = [torch.cuda.mem_get_info(index)[0] for index in range(torch.cuda.device_count())]
    index = max(range(len(free)), key=free.__getitem__)
    name = torch.cuda.get_device_name(index)
    return torch.device("cuda", index), f"{name}, {free[index] / 2**30:.0f} GiB free" + (f", the most of {len(free)} GPUs" if len(free) > 1 else "")


def _obstacle() -> str:
    """Why no GPU can be used; empty where one can."""
    if not torch.cuda.is_available():
        built = torch.version.cuda or torch.version.hip
        return "no GPU is visible to PyTorch" if built else "this PyTorch was built without GPU support"
    if importlib.util.find_spec("triton") is None:
        return "Triton, which the GPU kernels need, is not installed (pip install triton)"
    return ""


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on `device` now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()


def choose_recompute(asked: str, config: ModelConfig, batch_size: int, seq_len: int, precision: str, device: torch.device) -> tuple[str, str]:
    """What the backward computes again, for "auto" the least that lets the run fit, and why."""
    if asked != "auto":
        return asked, "asked for"
    room = RESERVE * free_memory(device)
    for choice in RECOMPUTE:
        needed = predict(config, batch_size, seq_len, precision, choice).total
        if needed <= room:
            return choice, f"{needed / 1e9:.1f} GB predicted, {room / 1e9:.1f} GB to be had"
    return RECOMPUTE[-1], f"{needed / 1e9:.1f} GB predicted is more than the {room / 1e9:.1f} GB to be had"


@contextmanager
def explained_out_of_memory(config: ModelConfig, batch_size: int, seq_len: int, precision: str, recompute: str) -> Iterator[None]:
    """Turns the allocator's error into one that names the largest consumers and the options that would help."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise UserError(out_of_memory(predict(config, batch_size, seq_len, precision, recompute), batch_size, seq_len, recompute)) from error
    except RuntimeError as error:  # torch's allocator on the CPU
        if "can't allocate memory" not in str(error) and "not enough memory" not in str(error):
            raise
        raise UserError(out_of_memory(predict(config, batch_size, seq_len, precision, recompute), batch_size, seq_len, recompute)) from error


def out_of_memory(memory: MemoryPrediction, batch_size: int, seq_len: int, recompute: str) -> str:
    largest = ", ".join(f"{name} {count / 1e9:.2f} GB" for name, count, _ in memory.rows()[:3])
    helps = []
    if batch_size > 1:
        helps.append(f"--batch-size {batch_size // 2} with twice the --grad-accum (the same result)")
    if recompute != RECOMPUTE[-1]:
        helps.append("--set train.recompute=blocks (the same bits, a third more work)")
    helps.append(f"--seq-len {seq_len // 2}" if seq_len > 64 else "a smaller --preset")
    return f"out of memory. A step needs about {memory.total / 1e9:.2f} GB, most of it for {largest}. What helps: {'; '.join(helps)}."
