"""`cllm tokenizer` and `cllm pack`: text to tokens."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cllm.cli.console import open_console, readable, standard_input, table
from cllm.cli.options import READING, Json, examples, option, read_settings, reading_of, tokenizer_file, with_settings
from cllm.config.schema import SETTINGS
from cllm.runtime.errors import UserError

PACKING = {name: SETTINGS[f"data.{name}"] for name in ("val_fraction",)}

app = typer.Typer()
group = typer.Typer(help="Train, use and measure a tokenizer.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(group, name="tokenizer")


@app.command(epilog=examples("cllm pack books/ --tokenizer runs/books/tokenizer.json --out tokens/"))
@with_settings(PACKING | READING)
def pack(
    data: Annotated[str, typer.Argument(help="Folder or file of text, JSON or CSV.")],
    tokenizer: Annotated[str, typer.Option(help="tokenizer.json, or a run that has one.")],
    out: Annotated[Path, typer.Option(help="Folder for the token shards.")],
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Pack text into token shards that `cllm train` and `cllm evaluate` read as they are."""
    console = open_console(as_json)
    reading, values = reading_of(settings), read_settings(PACKING, settings)
    from cllm.data.pipeline import prepare
    from cllm.data.tokens.tokenizer import Tokenizer

    dataset = prepare(data, out, tokenizer=Tokenizer.load(tokenizer_file(tokenizer)), reading=reading, log=console.print, **values)
    summary = _dataset_summary(dataset)
    console.print(table([(key.replace("_", " "), readable(value)) for key, value in summary.items()]))
    console.result({"out": str(out), **summary})


def _dataset_summary(dataset: Any) -> dict[str, Any]:
    return {
        "train_tokens": dataset.train.num_tokens,
        "train_documents": dataset.train.num_documents,
        "val_tokens": dataset.val.num_tokens,
        "val_documents": dataset.val.num_documents,
        "vocab_size": dataset.tokenizer.vocab_size,
        "tokenizer_hash": dataset.tokenizer.hash,
    }


@group.command("train", epilog=examples("cllm tokenizer train books/ --vocab-size 8192 --out tokenizer.json"))
def train(
    data: Annotated[str, typer.Argument(help="Folder or file of text, JSON or CSV.")],
    out: Annotated[Path, typer.Option(help="The tokenizer.json to write.")] = Path("tokenizer.json"),
    vocab_size: Annotated[int, option("--vocab-size", int, "Number of tokens (bpe).", at_least=257, example=4096)] = 4096,
    kind: Annotated[str, option("--kind", str, "Byte-level BPE, or one token for each character.", choices=("bpe", "char"))] = "bpe",
    as_json: Json = False,
) -> None:
    """Train a tokenizer on DATA."""
    console = open_console(as_json)
    from cllm.data.tokens.tokenizer import Tokenizer

    tokenizer = Tokenizer.train(data, vocab_size=vocab_size, kind=kind)
    tokenizer.save(out)
    console.print(f"wrote {out}: {tokenizer.vocab_size:,} tokens, {tokenizer.hash[:12]}")
    console.result({"out": str(out), "vocab_size": tokenizer.vocab_size, "kind": kind, "hash": tokenizer.hash})


@group.command("encode", epilog=examples("cllm tokenizer encode runs/demo 'def main():'"))
def encode(
    tokenizer: Annotated[str, typer.Argument(help="tokenizer.json or a run.")],
    text: Annotated[str | None, typer.Argument(help="Text; without it, standard input.")] = None,
    as_json: Json = False,
) -> None:
    """Text to token ids."""
    console = open_console(as_json)
    from cllm.data.tokens.tokenizer import Tokenizer

    ids = Tokenizer.load(tokenizer_file(tokenizer)).encode("".join(standard_input()) if text is None else text)
    console.print(" ".join(map(str, ids)))
    console.result({"tokens": ids, "count": len(ids)})


@group.command("decode", epilog=examples("cllm tokenizer decode runs/demo 412 87 9"))
def decode(
    tokenizer: Annotated[str, typer.Argument(help="tokenizer.json or a run.")],
    ids: Annotated[list[int] | None, typer.Argument(help="Token ids; without them, standard input.")] = None,
    as_json: Json = False,
) -> None:
    """Token ids to text."""
    console = open_console(as_json)
    from cllm.data.tokens.tokenizer import Tokenizer

    if ids is None:
        try:
            ids = [int(word) for word in "".join(standard_input()).split()]
        except ValueError as error:
            raise UserError(f"token ids must be whole numbers ({error}).") from error
    text = Tokenizer.load(tokenizer_file(tokenizer)).decode(ids)
    console.write(text + "\n")
    console.result({"text": text})


@group.command("stats", epilog=examples("cllm tokenizer stats runs/demo books/"))
def stats(
    tokenizer: Annotated[str, typer.Argument(help="tokenizer.json or a run.")],
    data: Annotated[str, typer.Argument(help="Folder or file of text, JSON or CSV.")],
    as_json: Json = False,
) -> None:
    """How well a tokenizer fits DATA: bytes and characters per token, share of the vocabulary in use."""
    console = open_console(as_json)
    from cllm.data.tokens.tokenizer import Tokenizer

    stats = Tokenizer.load(tokenizer_file(tokenizer)).stats(data)
    console.print(table([(key.replace("_", " "), readable(value)) for key, value in stats.items()]))
    console.result(stats)
