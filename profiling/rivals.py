"""Other people's GPU kernels, for the comparisons of gpu_suite.py: whichever of these packages is installed takes part, by its public functions.

FlexAttention (in torch), flash-attn-4 (flash_attn.cute), Liger Kernel, quack, cut-cross-entropy
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

PACKAGES = {"flash-attn-4": "flash_attn.cute", "liger": "liger_kernel", "quack": "quack", "cut-cross-entropy": "cut_cross_entropy"}


def absent() -> list[str]:
    """Those that are not installed."""
    return [name for name, module in PACKAGES.items() if not _installed(module)]


def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package around it is missing
        return False


def attention() -> dict[str, Callable[..., Any]]:
    """name -> f(q, k, v), causal, (B, T, H, D) in and out."""
    found: dict[str, Callable[..., Any]] = {"flex": _flex()}
    if _installed("flash_attn.cute"):
        found["flash-attn-4"] = _flash4
    return found


def _flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled, masks = torch.compile(flex_attention), dict[tuple[int, int], Any]()

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        size = (q.shape[1], k.shape[1])
        if size not in masks:
            masks[size] = create_block_mask(lambda b, h, i, j: i >= j, None, None, *size, device=q.device)
        views = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(*views, block_mask=masks[size], enable_gqa=q.shape[2] != k.shape[2]).transpose(1, 2)

    return call


def _flash4(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    from flash_attn.cute import flash_attn_func

    out = flash_attn_func(q, k, v, causal=True)
    return out[0] if isinstance(out, tuple) else out


def rms_norm() -> dict[str, Callable[..., Any]]:
    """name -> f(x, weight)."""
    found: dict[str, Callable[..., Any]] = {}
    if _installed("liger_kernel"):
        from liger_kernel.transformers.functional import liger_rms_norm

        found["liger"] = lambda x, weight: liger_rms_norm(x, weight, 1e-6, in_place=False)
    if _installed("quack"):
        from quack import rmsnorm

        found["quack"] = lambda x, weight: rmsnorm(x, weight, eps=1e-6)
    return found


def add_rms_norm() -> dict[str, Callable[..., Any]]:
    """name -> f(x, weight, residual), the normalised sum."""
    if not _installed("liger_kernel"):
        return {}
    from liger_kernel.transformers.functional import liger_fused_add_rms_norm

    return {"liger": lambda x, weight, residual: liger_fused_add_rms_norm(x, residual, weight, 1e-6, in_place=False)[0]}


def layer_norm() -> dict[str, Callable[..., Any]]:
    """name -> f(x, weight), without a bias; Liger's wants one, which is zero."""
    if not _installed("liger_kernel"):
        return {}
    from liger_kernel.transformers.functional import liger_layer_norm

    return {"liger": lambda x, weight: liger_layer_norm(x, weight, torch.zeros_like(weight), 1e-5)}


def softmax() -> dict[str, Callable[..., Any]]:
    """name -> f(x)."""
    found: dict[str, Callable[..., Any]] = {}
    if _installed("liger_kernel"):
        from liger_kernel.transformers.functional import liger_softmax

        found["liger"] = liger_softmax
    if _installed("quack"):
        from quack import softmax as quacks

        found["quack"] = quacks
    return found


def cross_entropy(targets: torch.Tensor) -> dict[str, Callable[..., Any]]:
    """name -> f(logits), the mean. Liger's writes the gradient over its logits, and so gets a copy."""
    found: dict[str, Callable[..., Any]] = {}
    if _installed("liger_kernel"):
        from liger_kernel.transformers.functional import liger_cross_entropy

        found["liger"] = lambda logits: liger_cross_entropy(logits.clone(), targets)
    if _installed("quack"):
        from quack import cross_entropy as quacks

        found["quack"] = lambda logits: quacks(logits, targets, reduction="mean")
    return found


def linear_cross_entropy(targets: torch.Tensor) -> dict[str, Callable[..., Any]]:
    """name -> f(x, weight), the mean."""
    found: dict[str, Callable[..., Any]] = {}
    if _installed("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

        found["liger"] = lambda x, weight: liger_fused_linear_cross_entropy(x, weight, targets)
    if _installed("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cce

        found["cut-cross-entropy"] = lambda x, weight: cce(x, weight, targets)
        found["cut-cross-entropy exact"] = partial(lambda x, weight, filter_eps: cce(x, weight, targets, filter_eps=filter_eps), filter_eps=None)
    return found


def swiglu() -> dict[str, Callable[..., Any]]:
    """name -> f(x, gate, up, down): the whole feed-forward with the package's activation."""
    if not _installed("liger_kernel"):
        return {}
    from liger_kernel.transformers.functional import liger_swiglu

    linear = torch.nn.functional.linear
    return {"liger": lambda x, gate, up, down: linear(liger_swiglu(linear(x, gate), linear(x, up)), down)}
