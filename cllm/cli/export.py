"""One model in another format: what `cllm export` does."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from cllm.runtime.errors import DataError, UserError

if TYPE_CHECKING:
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.model.model import Model

FORMATS = ("hf", "gguf", "cllm")
DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def check(to: str, type: str | None) -> None:
    """UserError for a format or type that there is not, before anything is read."""
    if to not in FORMATS:
        raise UserError(f"--to must be one of {', '.join(FORMATS)}, got {to!r}.")
    if to != "gguf" and type not in (None, *DTYPES):
        raise UserError(f"--type of a {to} export must be one of {', '.join(DTYPES)}, got {type!r}.")
    if to == "gguf" and type not in (None, *DTYPES, "q8_0"):
        raise UserError(f"--type of a gguf export must be one of {', '.join(DTYPES)} or q8_0, got {type!r}.")


def export(name: str, to: str, out: Path, type: str | None, model: Model, tokenizer: Tokenizer | None) -> int:
    """Writes `model`, loaded from `name`, and returns the bytes written. type: f32, f16, bf16, for GGUF also q8_0; None as they are (GGUF: f32)."""
    check(to, type)
    if to == "gguf":
        from cllm.interop.gguf import save_gguf

        if tokenizer is None:
            raise DataError(f"{name} holds no tokenizer, and a GGUF file needs one. Save the model with it: cllm.save(model, path, tokenizer=...).")
        save_gguf(model, out, tokenizer, type or "f32")
    elif to == "hf":
        from cllm.interop.hf import save_hf

        save_hf(model, out, tokenizer=tokenizer, dtype=None if type is None else DTYPES[type])
    else:
        from cllm.checkpoint.store import save

        save(model if type is None else model.to(DTYPES[type]), out, tokenizer=tokenizer)
    return sum(file.stat().st_size for file in ([out] if out.is_file() else out.iterdir()))
