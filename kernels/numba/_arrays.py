"""torch tensors seen as numpy arrays by the numba kernels: no copy, bfloat16 as uint16."""

import numpy as np
import torch


def as_array(t: torch.Tensor) -> np.ndarray:
    """The tensor's memory as a numpy array of the same shape and strides; bfloat16 appears as uint16."""
    t = t.detach()
    return t.view(torch.uint16).numpy() if t.dtype == torch.bfloat16 else t.numpy()


def as_flat(t: torch.Tensor) -> np.ndarray:
    """The elements of a contiguous tensor as a flat array, sharing its memory."""
    assert t.is_contiguous(), "as_flat needs a contiguous tensor: its caller makes the copy where one is due"
    return as_array(t).reshape(-1)
