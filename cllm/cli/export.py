"""`cllm export` and `cllm import`: one model in another format, and back."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cllm.cli.console import open_console
from cllm.cli.options import Checkpoint, Json, argument, check_model, examples, load_model, option, require_suffix
from cllm.files import MODEL, check_writable
from cllm.runtime.errors import CheckpointError, DataError, UserError
from cllm.runtime.quantities import size
from cllm.shell import command

if TYPE_CHECKING:
    import torch

    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.model.model import Model

FORMATS = ("hf", "gguf", "cllm")
DTYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}
FOR_ONE = {"q8_0": "gguf", "int8": "cllm"}  # number formats that one format of files has

app = typer.Typer()


@app.command(
    epilog=examples(
        "cllm export runs/demo --to hf --out demo-hf/",
        "cllm export runs/demo --to gguf --type q8_0 --out demo.gguf",
        "cllm export runs/demo --to cllm --type int8 --out demo.cllm",
    )
)
def export(
    checkpoint: Checkpoint,
    to: Annotated[
        str, option("--to", str, "Format to write: a Hugging Face folder (hf), a file for llama.cpp (gguf), or a .cllm file (cllm).", choices=FORMATS)
    ],
    out: Annotated[Path, option("--out", Path, "Folder or file to write.")],
    type_: Annotated[
        str | None,
        option(
            "--type",
            str,
            "Number format of the weights; q8_0 is for gguf only, int8 for cllm only. [default: as they are stored; for gguf f32]",
            optional=True,
            choices=(*DTYPES, *FOR_ONE),
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a model in another format. Of a LoRA run, the merged model is written."""
    console = open_console(as_json)
    _check(to, type_, out)
    check_model(checkpoint)
    if to == "gguf":
        from cllm.interop.gguf import library

        library()  # raises where it is not installed
    written = write(checkpoint, to, out, type_, *load_model(checkpoint, need_tokenizer=False))
    console.print(f"wrote {out} ({size(written)})")
    console.result({"checkpoint": checkpoint, "format": to, "type": type_, "out": str(out), "bytes": written})


@app.command("import", epilog=examples("cllm import llama-folder/ --out llama.cllm"))
def import_(
    folder: Annotated[str, argument("HF_DIR", "A Hugging Face folder with safetensors weights.")],
    out: Annotated[Path, option("--out", Path, "The .cllm file to write.")],
    as_json: Json = False,
) -> None:
    """Convert a Hugging Face model to a .cllm file. Supported are Llama, Mistral, Qwen2, Qwen3 and GPT-2."""
    console = open_console(as_json)
    require_suffix(out, ".cllm")
    check_writable(out, MODEL)
    if Path(folder).suffix == ".cllm" and Path(folder).is_file():
        raise CheckpointError(f"{folder} is a .cllm file already. Every command takes it as it is.")
    if (Path(folder) / "checkpoints").is_dir():
        raise CheckpointError(f"{folder} is a run of CLLM. Write it as one file with: {command('export', folder, '--to', 'cllm', '--out', out)}")
    from cllm.checkpoint.model_file import save
    from cllm.interop.hf import load_hf

    model, tokenizer = load_hf(folder)
    save(model, out, tokenizer=tokenizer)
    console.print(f"wrote {out}: {model.config.family} family, {model.config.num_parameters():,} parameters")
    console.result({"out": str(out), "family": model.config.family, "parameters": model.config.num_parameters(), "tokenizer": tokenizer is not None})


def _check(to: str, type: str | None, out: Path) -> None:
    """UserError for a type that the format does not have and for a place that it cannot be written to, before anything is read."""
    if to != "hf":
        require_suffix(out, f".{to}")
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already and is not an empty folder. Choose another place, or remove it.")
    only = FOR_ONE.get(type or "", to)
    if to != only:
        own = [each for each, format in FOR_ONE.items() if format == to]
        raise UserError(f"--type {type} is for --to {only} alone; --to {to} takes one of {', '.join([*DTYPES, *own])}.")
    check_writable(out, MODEL)


def write(name: str, to: str, out: Path, type: str | None, model: Model, tokenizer: Tokenizer | None) -> int:
    """Writes `model`, loaded from `name`, and returns the bytes written. type: f32, f16, bf16, for GGUF also q8_0, for .cllm also int8; None
    as they are (GGUF: f32)."""
    if to == "gguf":
        from cllm.interop.gguf import save_gguf

        if tokenizer is None:
            raise DataError(f"{name} holds no tokenizer, and a GGUF file needs one. Save the model with it: cllm.save(model, path, tokenizer=...).")
        save_gguf(model, out, tokenizer, type or "f32")
    elif to == "hf":
        from cllm.interop.hf import save_hf

        save_hf(model, out, tokenizer=tokenizer, dtype=_dtype(type))
    else:
        from cllm.checkpoint.model_file import save

        dtype = None if type == "int8" else _dtype(type)
        save(model if dtype is None else model.to(dtype), out, tokenizer=tokenizer, int8=type == "int8")
    return sum(file.stat().st_size for file in ([out] if out.is_file() else out.iterdir()))


def _dtype(type: str | None) -> torch.dtype | None:
    import torch

    return None if type is None else getattr(torch, DTYPES[type])
