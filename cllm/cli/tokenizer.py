"""`cllm tokenizer` and `cllm pack`: text to tokens."""

import os
from itertools import chain
from pathlib import Path
from typing import Annotated, Any

import typer

from cllm.cli.console import open_console, readable, standard_input, table
from cllm.cli.options import (
    READING,
    TOKENIZER,
    Json,
    Text,
    TokenizerPlace,
    argument,
    check_text,
    examples,
    load_tokenizer,
    option,
    read_settings,
    reading_of,
    text_argument,
    with_settings,
)
from cllm.config.schema import MAX_VOCAB, SETTINGS
from cllm.config.setting import shortened
from cllm.files import DATA, check_writable
from cllm.runtime.errors import DataError, UserError
from cllm.runtime.printable import printable
from cllm.runtime.quantities import size

SAMPLE = {"tokenizer_sample": SETTINGS["data.tokenizer_sample"]}
PACKING = {name: SETTINGS[f"data.{name}"] for name in ("val_fraction",)}

app = typer.Typer()
group = typer.Typer(help="Train, use and measure a tokenizer.", no_args_is_help=True, rich_markup_mode=None)
app.add_typer(group, name="tokenizer")


@app.command(epilog=examples("cllm pack books/ --tokenizer runs/books/tokenizer.json --out tokens/"))
@with_settings(PACKING | READING)
def pack(
    data: Text,
    tokenizer: Annotated[Path, option("--tokenizer", Path, TOKENIZER)],
    out: Annotated[Path, option("--out", Path, "Folder to write the tokens to.")],
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Pack text into tokens ahead of training. `cllm train` and `cllm evaluate` read the folder as it is."""
    console = open_console(as_json)
    reading, values = reading_of(settings), read_settings(PACKING, settings)
    if out.is_dir() and any(out.iterdir()) and not any((out / name).exists() for name in ("sources.json", "dataset.json", "tokens")):
        raise UserError(f"{out} holds other files and no packed tokens. Choose a new folder with --out.")
    check_text(data)
    check_writable(out, DATA)
    from cllm.data.pipeline import prepare

    dataset = prepare(data, out, tokenizer=load_tokenizer(tokenizer), reading=reading, log=console.print, **values)
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
@with_settings(READING | SAMPLE)
def train(
    data: Text,
    out: Annotated[Path, option("--out", Path, "The tokenizer.json to write.")] = Path("tokenizer.json"),
    vocab_size: Annotated[
        int | None,
        option(
            "--vocab-size",
            int,
            "Size of the vocabulary in tokens, rounded up to a multiple of 64; not of --kind char. [default: by the amount of text]",
            unit="tokens",
            optional=True,
            at_least=257,
            at_most=MAX_VOCAB,
            example=4096,
        ),
    ] = None,
    kind: Annotated[
        str,
        option(
            "--kind", str, "BPE, WordPiece or Unigram over bytes, or one token for each character.", choices=("bpe", "wordpiece", "unigram", "char")
        ),
    ] = "bpe",
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Train a tokenizer on a text."""
    console = open_console(as_json)
    if out.is_file() and os.path.exists(data) and os.path.samefile(out, data):
        raise UserError(f"--out {out} is the text itself, which would be lost. Choose another file, such as tokenizer.json.")
    reading = reading_of(settings)
    out = out / "tokenizer.json" if out.is_dir() else out
    check_writable(out, DATA)
    from cllm.data.tokens.tokenizer import train_tokenizer

    sample_bytes = 1_000_000 * read_settings(SAMPLE, settings)["tokenizer_sample"]
    tokenizer = train_tokenizer(data, vocab_size, kind, sample_bytes=sample_bytes, reading=reading, log=console.print)
    tokenizer.save(out)
    console.print(f"wrote {out}: {tokenizer.vocab_size:,} tokens, {tokenizer.hash[:12]}")
    console.result({"out": str(out), "vocab_size": tokenizer.vocab_size, "kind": kind, "hash": tokenizer.hash})


@group.command("import", epilog=examples("cllm tokenizer import ranks.tiktoken --encoding cl100k --out tokenizer.json"))
def import_(
    file: Annotated[Path, argument("FILE", "A file of tiktoken's ranks, or a tokenizer.json or the Hugging Face folder that holds one.", Path)],
    out: Annotated[Path, option("--out", Path, "The tokenizer.json to write.")] = Path("tokenizer.json"),
    encoding: Annotated[
        str | None,
        option(
            "--encoding",
            str,
            "How tiktoken splits text into words with these ranks. [default: told by the name of the file]",
            optional=True,
            choices=("r50k", "p50k", "cl100k", "o200k"),
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Take over a tokenizer from elsewhere. Writes a tokenizer.json with the same ids for the same text, and says where text does not come back
    exactly."""
    console = open_console(as_json)
    out = out / "tokenizer.json" if out.is_dir() else out
    if out.is_file() and file.exists() and os.path.samefile(out, file):
        raise UserError(f"--out {out} is the file itself. Choose another one.")
    check_writable(out, DATA)
    if encoding is None:
        tokenizer = load_tokenizer(file)
    else:
        from cllm.data.tokens.tiktoken import from_tiktoken
        from cllm.data.tokens.tokenizer import Tokenizer

        tokenizer = Tokenizer(from_tiktoken(file, encoding))
    tokenizer.save(out)
    console.print(f"wrote {out}: {tokenizer.kind}, {tokenizer.vocab_size:,} tokens, {tokenizer.hash[:12]}")
    if tokenizer.losses:
        console.print(f"text does not come back from it exactly: {'; '.join(tokenizer.losses)}")
    console.result({"out": str(out), "kind": tokenizer.kind, "vocab_size": tokenizer.vocab_size, "hash": tokenizer.hash, "losses": tokenizer.losses})


@group.command("encode", epilog=examples("cllm tokenizer encode runs/demo 'def main():'"))
def encode(
    tokenizer: TokenizerPlace,
    text: Annotated[str | None, text_argument("TEXT", "Text to encode. [default: standard input]")] = None,
    as_json: Json = False,
) -> None:
    """Turn text into token ids."""
    console = open_console(as_json)
    ids = load_tokenizer(tokenizer).encode("".join(standard_input()) if text is None else text)
    console.print(" ".join(map(str, ids)))
    console.result({"tokens": ids, "count": len(ids)})


@group.command("decode", epilog=examples("cllm tokenizer decode runs/demo 412 87 9"))
def decode(
    tokenizer: TokenizerPlace,
    ids: Annotated[list[str] | None, typer.Argument(metavar="IDS...", help="Token ids. [default: standard input]")] = None,
    as_json: Json = False,
) -> None:
    """Turn token ids into text."""
    console = open_console(as_json)
    words = "".join(standard_input()).split() if ids is None else ids
    wrong = next((word for word in words if not (word.isascii() and word.isdigit() and len(word) < 19)), None)
    if wrong is not None:
        raise UserError(f"token ids must be whole numbers, got {shortened(wrong)}.")
    text = load_tokenizer(tokenizer).decode([int(word) for word in words])
    console.write(text + "\n")
    console.result({"text": text})


@group.command("stats", epilog=examples("cllm tokenizer stats runs/demo books/"))
@with_settings(READING)
def stats(
    tokenizer: TokenizerPlace,
    data: Text,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Measure how well a tokenizer fits a text. Prints bytes in a token and tokens in a word (fertility), of each language and of all, which tokens
    are never used, and whether the text comes back as it was."""
    console = open_console(as_json)
    reading = reading_of(settings)
    check_text(data)
    from cllm.data.documents.corpus import measure, pieces
    from cllm.data.documents.sides import plan_split
    from cllm.data.tokens.statistics import Fit
    from cllm.runtime.progress import ByteProgress

    fit = Fit(load_tokenizer(tokenizer))
    with ByteProgress(None) as bar:
        corpus = measure(data, bar, console.print, reading)
        for segment in corpus.segments(plan_split(corpus.rows, 0.0), bar.step("Measuring", corpus.num_bytes)):
            parts = pieces(segment.chunks)
            first = next(parts, "")
            fit.add(chain([first], parts), _language(first))
    result = fit.result()
    plain = {key: value for key, value in result.items() if not isinstance(value, list | dict)}
    console.print(table([(key.replace("_", " "), readable(value)) for key, value in plain.items()]))
    if len(result["languages"]) > 1:
        console.print("of each language: bytes, bytes in a token, tokens in a word")
        rows = result["languages"].items()
        console.print(table([(code, size(each["bytes"]), f"{each['bytes_per_token']:.2f}", f"{each['tokens_per_word']:.2f}") for code, each in rows]))
    if result["unused"]:
        console.print(f"never used, for example: {' '.join(printable(repr(each)) for each in result['unused'])}")
    if result["losses"]:
        console.print(f"text does not come back exactly: {'; '.join(result['losses'])}")
    console.result(result)


def _language(text: str) -> str:
    """Its code, where the library that tells languages is installed."""
    from cllm.data.clean.languages import language_of

    try:
        return language_of(text)[0]
    except DataError:
        return "all"
