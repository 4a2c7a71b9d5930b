"""`cllm review`: the lines of files that surprise a model most, and what it would have written instead."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cllm.cli.console import Console, open_console
from cllm.cli.options import Checkpoint, Device, Json, Threads, Weights, argument, check_model, examples, load_model, option, read_text
from cllm.runtime.errors import DataError
from cllm.runtime.quantities import counted

if TYPE_CHECKING:
    from cllm.evaluate.review import Line

app = typer.Typer()


@app.command(
    epilog=examples(
        "cllm review runs/demo src/main.py",
        "cllm review runs/demo src/ --top 50 --json",
    )
)
def review(
    checkpoint: Checkpoint,
    places: Annotated[list[str], argument("FILES...", "Files and folders of text or source code. UTF-8, or any charset that can be told.")],
    top: Annotated[int, option("--top", int, "Number of lines to show.", at_least=1, example=20)] = 20,
    weights: Weights = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Show the lines that surprise a model most. Beside each stands what it would have written instead. What that is worth depends on the model: one
    whose bits per byte are not below the n-grams' in `cllm evaluate --suite code` finds no more than they do."""
    console = open_console(as_json)
    check_model(checkpoint)
    texts = _texts(places)
    from cllm import runtime
    from cllm.evaluate.review import ranked, review_text, suggest

    with runtime.use(threads=threads):
        model, tokenizer = load_model(checkpoint, weights=weights, device=device)
        lines: list[Line] = []
        with runtime.progress.Progress(sum(map(len, texts.values())), "reviewing") as bar:
            done = 0
            for number, (name, text) in enumerate(texts.items(), 1):
                # The share of a file that is done is that of its tokens, of which there are about a third as many as characters.
                scored = 0

                def report(tokens: int) -> None:
                    nonlocal scored
                    scored += tokens
                    bar.update(done + min(len(text), scored), f"{number:,} of {counted(len(texts), 'file')}")  # noqa: B023 - called in this turn

                lines += review_text(model, tokenizer, text, name, report)
                done += len(text)
                bar.update(done, f"{number:,} of {counted(len(texts), 'file')}")
        if not lines:
            raise DataError(f"{', '.join(places)} holds no line that could be predicted from text before it. Give files with more than one word.")
        first = ranked(lines)[:top]
        with runtime.progress.Progress(len(first), "writing suggestions") as bar:
            suggestions = suggest(model, tokenizer, first, lambda count: bar.update(count, f"{count:,} of {counted(len(first), 'line')}"))
    bits, num_tokens = sum(line.bits for line in lines), sum(line.num_tokens for line in lines)
    _show(console, first, suggestions)
    console.print(
        f"The {counted(len(first), 'most surprising line')} of {len(lines):,} in {counted(len(texts), 'file')}; a token has "
        f"{bits / num_tokens:.2f} bits on average. A surprise is no fault: it is where to look first."
    )
    console.result(
        {
            "checkpoint": checkpoint,
            "files": len(texts),
            "lines": len(lines),
            "tokens": num_tokens,
            "bits_per_token": bits / num_tokens,
            "surprising": [_values(line, suggestion) for line, suggestion in zip(first, suggestions)],
        }
    )


def _show(console: Console, lines: Sequence[Line], suggestions: Sequence[str]) -> None:
    for line, suggestion in zip(lines, suggestions):
        console.print(f"{line.name}:{line.number}:{line.column}: {line.peak_bits:.1f} bits, {line.score:.1f} more than expected")
        console.print(f"    {line.text.strip()}\n  model would have written:\n    {suggestion.strip() or '(nothing)'}\n")


def _values(line: Line, suggestion: str) -> dict[str, Any]:
    return {
        "file": line.name, "line": line.number, "column": line.column, "text": line.text, "suggestion": suggestion, "bits": line.bits,
        "peak_bits": line.peak_bits, "score": line.score, "tokens": line.num_tokens,
    }  # fmt: skip


def _texts(places: Sequence[str]) -> dict[str, str]:
    """The texts of all files by their names, in order. A folder gives what may hold text in it; what is no text there is passed over."""
    from cllm.data.documents.files import find
    from cllm.runtime.progress import say

    texts: dict[str, str] = {}
    passed = 0
    for place in places:
        files, skipped = find(place)
        for file in files:
            try:
                texts.setdefault(str(file.path), read_text(Path(file.path), "auto"))
            except DataError:
                if not Path(place).is_dir():
                    raise
                passed += 1
        passed += skipped.total
    if passed:
        say(f"{counted(passed, 'file')} without text passed over.")
    if not texts:
        raise DataError(f"{', '.join(places)} holds no text. Give files or folders of text or source code.")
    return texts
