"""`cllm evaluate --suite code|prose`: what a model is worth, each figure beside what simpler things make of the same held-out text."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.cli.console import Console, table
from cllm.cli.scored_text import scored_text
from cllm.runtime.errors import DataError, UserError
from cllm.runtime.quantities import counted

if TYPE_CHECKING:
    from cllm.data import TokenSplit
    from cllm.data.documents.scan import Reading
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.evaluate.held_out import Document
    from cllm.evaluate.ngram import NGrams
    from cllm.model.model import Model

SUITES = ("code", "prose")
MEMORISED_TOKENS = 50


def training_tokens(checkpoint: str) -> TokenSplit:
    """The tokens that the model of a run was trained on; DataError in one line where it has none."""
    from cllm.cli.trained_on import run_of
    from cllm.train.run_folder import own_tokens

    stored = run_of(checkpoint)
    if stored is None:
        raise DataError(
            f"--suite compares a model with n-grams of the tokens that it was trained on, and {checkpoint} is no run that holds them. "
            "Give the folder of the run, or one of its checkpoints."
        )
    return own_tokens(stored).train


def suite_run(
    console: Console, suite: str, model: Model, tokenizer: Tokenizer, data: str, checkpoint: str, train: TokenSplit, samples: int, batch_size: int,
    reading: Reading,
) -> dict[str, Any]:  # fmt: skip
    """What `suite` measures on `data`, printed and as plain values, and whether the model has seen some of it. samples: see `measure`."""
    from cllm.cli.trained_on import trained_on
    from cllm.data.tokens.conversations import ChatSplit

    with tempfile.TemporaryDirectory(prefix="cllm-evaluate-") as scratch:
        split = scored_text(console, tokenizer, data, scratch, reading)
        if isinstance(split, ChatSplit):
            raise UserError("--suite is about code and prose, and this data holds chats. Leave it out to score the answers.")
        learnt = trained_on(checkpoint, data, Path(scratch), tokenizer, reading)
        values = measure(console, suite, model, tokenizer, train, split, samples, batch_size)
    if learnt is not None:
        console.print(learnt)
    return {**values, "trained_on_files": 0 if learnt is None else learnt.files}


def measure(
    console: Console, suite: str, model: Model, tokenizer: Tokenizer, train: TokenSplit, split: TokenSplit, samples: int, batch_size: int
) -> dict[str, Any]:  # fmt: skip
    """Measures, prints a table, and returns everything as plain values. samples: of functions, lines, paragraphs and texts, at most."""
    from cllm.evaluate.baselines import count_ngrams
    from cllm.evaluate.held_out import documents
    from cllm.evaluate.ngram import MOST_TOKENS
    from cllm.runtime.progress import stage

    held = list(documents(split, tokenizer))
    if suite == "code" and not any(document.name.partition(":")[0].endswith(".py") for document in held):
        raise DataError("--suite code is about Python, and the data holds no file whose name ends in .py. Give held-out Python files.")
    with stage("counting n-grams"):
        ngrams = count_ngrams(train)
    values: dict[str, Any] = {
        "suite": suite,
        "num_documents": len(held),
        "ngram_order": len(ngrams.orders),
        "ngram_tokens": min(train.num_tokens, MOST_TOKENS),
        "bits_per_byte": _bits_per_byte(model, tokenizer, ngrams, split, held, batch_size),
    }
    bits = values["bits_per_byte"]
    console.print(f"bits per byte of {counted(len(held), 'held-out document')}, the fewer the better:")
    console.print(table([tuple(bits), tuple(f"{each:.3f}" for each in bits.values())]))
    measured = _code(console, model, tokenizer, ngrams, held, samples) if suite == "code" else _prose(
        console, model, tokenizer, ngrams, train, held, samples
    )  # fmt: skip
    return values | measured


def _bits_per_byte(
    model: Model, tokenizer: Tokenizer, ngrams: NGrams, split: TokenSplit, held: list[Document], batch_size: int
) -> dict[str, float]:  # fmt: skip
    from cllm.evaluate.baselines import compressed_bits_per_byte
    from cllm.evaluate.documents import score_documents
    from cllm.evaluate.held_out import ngram_bits_per_byte
    from cllm.runtime.progress import Progress, stage

    with Progress(None, "predicting the text") as line:

        def report(done: int, total: int) -> None:
            line.total = total
            line.update(done, f"{done:,} of {total:,} windows")

        own = score_documents(model, split, tokenizer, model.config.max_seq_len, batch_size, progress=report).total().bits_per_byte
    with stage("looking up n-grams and compressing"):
        content = "".join(document.text for document in held).encode("utf-8", "replace")
        return {"model": own, "ngram": ngram_bits_per_byte(ngrams, split, tokenizer), **compressed_bits_per_byte(content)}


def _code(
    console: Console, model: Model, tokenizer: Tokenizer, ngrams: NGrams, held: list[Document], samples: int
) -> dict[str, Any]:  # fmt: skip
    from cllm.evaluate import code_suite as code
    from cllm.evaluate.held_out import model_writer, ngram_writer
    from cllm.runtime.progress import Progress, stage

    tasks = code.functions(held, tokenizer, model.config.max_seq_len, samples)
    if not tasks:
        raise DataError(
            f"no function of the held-out Python files leaves room for {code.BODY_TOKENS} tokens of a body in the model's context of "
            f"{model.config.max_seq_len}. Give a model with a longer context, or other files."
        )
    with Progress(len(tasks), "writing functions") as line:
        written = {"model": code.bodies(tasks, tokenizer, model_writer(model, tokenizer, line.update))}
    with Progress(len(tasks), "foretelling lines") as line:
        lines = {"model": code.next_lines(tasks, tokenizer, model_writer(model, tokenizer, line.update))}
    if tokenizer.fim is not None:
        with Progress(len(tasks), "filling in lines") as line:
            writer = model_writer(model, tokenizer, line.update)
            lines["model_fim"] = code.missing_lines(tasks, tokenizer, writer, model.config.max_seq_len)
    with stage("the same by n-grams"):
        writer = ngram_writer(ngrams, tokenizer)
        written |= {"ngram": code.bodies(tasks, tokenizer, writer), "held_out": code.true_bodies(tasks, tokenizer)}
        lines |= {"ngram": code.next_lines(tasks, tokenizer, writer), "line_before": [task.before for task in tasks]}
    judged = {name: code.judge(tasks, bodies) for name, bodies in written.items()}
    compared = {name: code.compare_lines(tasks, found) for name, found in lines.items()}
    rows: list[tuple[str, ...]] = [("", "parse", "compile", "imports that exist")]
    rows += [(name, str(each.parse), str(each.compiles), str(each.imports)) for name, each in judged.items()]
    console.print(f"\n{counted(len(tasks), 'function')} written behind their headers (share, 95 % interval):\n{table(rows)}")
    rows = [("", "exact match", "edit similarity"), *((name, str(each.exact), f"{each.similarity:.3f}") for name, each in compared.items())]
    seeing = ", and the same line by the model seeing what follows (model_fim)" if tokenizer.fim is not None else ""
    console.print(f"\nthe next line in the middle of each{seeing}:\n{table(rows)}")
    return {
        "functions": {name: each.to_dict() for name, each in judged.items()},
        "next_line": {name: each.to_dict() for name, each in compared.items()},
    }


def _prose(
    console: Console, model: Model, tokenizer: Tokenizer, ngrams: NGrams, train: TokenSplit, held: list[Document], samples: int
) -> dict[str, Any]:  # fmt: skip
    from cllm.evaluate import prose_suite as prose
    from cllm.evaluate.held_out import TEMPERATURE, model_writer, ngram_writer
    from cllm.evaluate.memorised import stand_in
    from cllm.evaluate.shares import Share
    from cllm.runtime.progress import Progress, stage

    pairs = {"coherence": prose.next_pairs(held, tokenizer, samples), "relevance": prose.source_pairs(held, tokenizer, samples)}
    starts = prose.starts(held, samples)
    if not starts:
        raise DataError(
            f"no held-out document has {prose.PROMPT_TOKENS + prose.SAMPLE_TOKENS} tokens, as many as a beginning and what follows it take. "
            "Give longer text."
        )
    values: dict[str, Any] = {}
    rows: list[tuple[str, ...]] = [("", "model", "n-grams", "shared words")]
    for name, each in pairs.items():
        with Progress(len(each), f"comparing paragraphs ({name})") as line:
            shares = {"model": prose.prefers(each, prose.model_bits(model), line.update), "ngram": prose.prefers(each, prose.ngram_bits(ngrams))}
        shares["words"] = prose.prefers_by_words(each)
        values[name] = {who: share.to_dict() for who, share in shares.items()}
        rows.append((name, *map(str, shares.values())))
    console.print(f"\nthe right paragraph preferred to one from elsewhere (share, 95 % interval; by chance 50 %):\n{table(rows)}")

    prompts = [prompt for prompt, _ in starts]
    with Progress(len(prompts), "writing samples") as line:
        written = {"model": model_writer(model, tokenizer, line.update)(prompts, prose.SAMPLE_TOKENS, TEMPERATURE, lambda tokens: False)}
    with stage("the same by n-grams"):
        written["ngram"] = ngram_writer(ngrams, tokenizer)(prompts, prose.SAMPLE_TOKENS, TEMPERATURE, lambda tokens: False)
    written["held_out"] = [true for _, true in starts]
    rows = [("", "distinct-1", "distinct-2", "distinct-3", "repetition", f"{MEMORISED_TOKENS} tokens from the training text")]
    values["samples"] = {}
    with Progress(3 * train.num_tokens, "looking for samples in the training text") as line:
        for turn, (who, texts) in enumerate(written.items()):
            pieces = [tokens[:MEMORISED_TOKENS] for tokens in texts if len(tokens) >= MEMORISED_TOKENS]

            def looked_at(tokens: int, before: int = turn * train.num_tokens) -> None:
                line.update(before + tokens)

            there = stand_in(train, pieces, looked_at)
            varied = prose.variety([tokenizer.decode(tokens) for tokens in texts])
            memorised = Share(int(there.sum()), len(there))
            values["samples"][who] = {**varied.to_dict(), "memorised": memorised.to_dict()}
            rows.append((who, *(f"{share:.3f}" for share in varied.distinct), f"{varied.repetition:.3f}", str(memorised)))
    console.print(f"\n{counted(len(prompts), 'text')} of up to {prose.SAMPLE_TOKENS} tokens behind held-out beginnings:\n{table(rows)}")
    return values
