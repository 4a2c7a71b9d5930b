"""`cllm evaluate`: a model on text of any kind, or on tasks of lm-evaluation-harness; what comes out in words and for programs."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from cllm.cli.console import Console, open_console, table
from cllm.cli.options import (
    READING,
    Checkpoint,
    Device,
    Json,
    KvCache,
    Threads,
    Weights,
    argument,
    check_model,
    check_text,
    examples,
    load_model,
    option,
    reading_of,
    text_option,
    with_settings,
)
from cllm.cli.scored_text import scored_text
from cllm.cli.suite import SUITES, suite_run, training_tokens
from cllm.runtime.errors import UserError
from cllm.runtime.quantities import counted

if TYPE_CHECKING:
    from cllm.cli.trained_on import TrainedOn
    from cllm.data.documents.scan import Reading
    from cllm.data.tokens.conversations import ChatSplit
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.evaluate.documents import DocumentScores, Group, Interval
    from cllm.evaluate.loss import Evaluation
    from cllm.model.model import Model

SHOWN_SOURCES = 20
WORST = 5  # documents with the highest loss that are listed
GROUPINGS = ("auto", "file", "folder")

app = typer.Typer()


class Before(NamedTuple):
    """A model in more bits, which the evaluated one is compared with, and how to tell of both."""

    load: Callable[[], Model]
    """Called when the evaluated model has been scored, which may be the same object."""
    key: str
    """Of its figures in the result."""
    title: str
    beginning: str
    changes: str

    def change(self, before: Evaluation, after: Evaluation) -> str:
        share = 100 * (after.perplexity / before.perplexity - 1)
        return (
            f"{self.beginning} loss {before.loss:.4f}, perplexity {before.perplexity:,.2f}: "
            f"{self.changes} the loss by {after.loss - before.loss:+.4f} and the perplexity by {share:+.2f} %."
        )


@app.command(
    epilog=examples(
        "cllm evaluate runs/demo more-text/",
        "cllm evaluate runs/demo more-text/ --stride 128 --by file --worst 10",
        "cllm evaluate runs/demo held-out/ --suite code",
        "cllm evaluate runs/demo --tasks my_task --task-path tasks/",
    )
)
@with_settings(READING)
def evaluate(
    checkpoint: Checkpoint,
    data: Annotated[str | None, argument("DATA", "Folder or file of text, JSON, CSV or chats, or a packed token folder.")] = None,
    seq_len: Annotated[
        int | None, option("--seq-len", int, "Length of the context in tokens. [default: the model's]", unit="tokens", optional=True, at_least=1)
    ] = None,
    stride: Annotated[
        int | None,
        option(
            "--stride",
            int,
            "Tokens between the starts of windows. Each token is predicted from at least seq_len - stride tokens. [default: seq_len]",
            unit="tokens",
            optional=True,
            at_least=1,
        ),
    ] = None,
    batch_size: Annotated[int, option("--batch-size", int, "Sequences evaluated at a time.", unit="sequences", at_least=1, example=8)] = 8,
    confidence: Annotated[
        float,
        option(
            "--confidence",
            float,
            "Confidence level of the intervals, which come from resampling whole documents.",
            above=0.0,
            below=1.0,
            example=0.95,
        ),
    ] = 0.95,
    by: Annotated[
        str, option("--by", str, "Results for each file or each top-level folder. auto takes folders if there are several.", choices=GROUPINGS)
    ] = "auto",
    worst: Annotated[
        int | None,
        option("--worst", int, "Number of documents with the highest loss to list. [default: 5]", unit="documents", optional=True, at_least=0),
    ] = None,
    tasks: Annotated[
        str | None, text_option("--tasks", "Tasks of lm-evaluation-harness instead of DATA, separated by commas. Nothing is downloaded.")
    ] = None,
    task_path: Annotated[Path | None, option("--task-path", Path, "Folder with your own task files (YAML).")] = None,
    suite: Annotated[
        str | None,
        option(
            "--suite",
            str,
            "Measure what the model is worth on DATA that it has not seen: what it writes and foretells, beside n-grams of its training text.",
            optional=True,
            choices=SUITES,
        ),
    ] = None,
    samples: Annotated[
        int, option("--samples", int, "With --suite: functions, lines, paragraphs and texts to look at, at most.", unit="texts", at_least=1)
    ] = 100,
    weights: Weights = None,
    kv_cache: KvCache = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    **settings: str | None,
) -> None:
    """Measure how well a model predicts a text. Prints loss, perplexity, bits per byte and next-token accuracy on all of DATA, or on the validation
    split where DATA is a packed token folder that has one."""
    console = open_console(as_json)
    reading = reading_of(settings)
    from cllm import runtime

    if (data is None) == (tasks is None):
        raise UserError("give either DATA (text to predict) or --tasks (tasks of lm-evaluation-harness).")
    if suite is not None and data is None:
        raise UserError("--suite is measured on text. Give DATA that the model has not seen.")
    check_model(checkpoint)
    train = None if suite is None else training_tokens(checkpoint)
    names = [name.strip() for name in (tasks or "").split(",") if name.strip()]
    if data is not None:
        check_text(data)
    else:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when the harness imports huggingface_hub; HF_HUB_OFFLINE=0 from outside wins
        from cllm.evaluate.harness import check_request

        check_request(names, task_path)
    with runtime.use(threads=threads):
        model, tokenizer = load_model(checkpoint, weights=weights, device=device, kv_cache=kv_cache)
        if tasks is not None:
            values = tasks_run(console, model, tokenizer, names, task_path, batch_size)
        elif suite is not None and train is not None:
            assert data is not None
            values = suite_run(console, suite, model, tokenizer, data, checkpoint, train, samples, batch_size, reading)
        else:
            assert data is not None
            sizes: dict[str, Any] = {"seq_len": seq_len, "stride": stride, "batch_size": batch_size, "checkpoint": checkpoint}
            before = _before(model, checkpoint, weights, kv_cache, device)
            values = evaluate_run(console, model, tokenizer, data, **sizes, confidence=confidence, by=by, worst=worst, reading=reading, before=before)
    console.result({"checkpoint": checkpoint, "data": data, **values})


def evaluate_run(
    console: Console,
    model: Model,
    tokenizer: Tokenizer,
    data: str,
    *,
    checkpoint: str,
    seq_len: int | None,
    stride: int | None,
    batch_size: int,
    confidence: float,
    by: str,
    worst: int | None,
    reading: Reading,
    before: Before | None = None,
) -> dict[str, Any]:
    """Scores all documents of `data`, prints the tables, and returns everything as plain values. checkpoint: where the model comes from; before:
    the same model in more bits, to score the same text with it and tell the change."""
    from cllm import runtime
    from cllm.cli.trained_on import trained_on
    from cllm.data.tokens.conversations import ChatSplit
    from cllm.evaluate.documents import RESAMPLES, score_documents

    context = model.config.max_seq_len
    length = min(seq_len or context, context)
    if seq_len is not None and seq_len > context:
        runtime.progress.say(f"The model's context of {context:,} tokens is less than --seq-len {seq_len:,} and is used instead.")
    with tempfile.TemporaryDirectory(prefix="cllm-evaluate-") as scratch:
        split = scored_text(console, tokenizer, data, scratch, reading)
        learnt = trained_on(checkpoint, data, Path(scratch), tokenizer, reading)
        if isinstance(split, ChatSplit):
            unused = [name for name, value in (("--stride", stride), ("--by", None if by == "auto" else by), ("--worst", worst)) if value is not None]
            if unused:
                raise UserError(f"{data} holds chats, whose answers are scored as one text, each once. Leave out {', '.join(unused)}.")
            return _evaluate_chats(console, model, split, learnt, length, batch_size, before)

        def score(each: Model, title: str) -> DocumentScores:
            with runtime.progress.Progress(None, title) as line:

                def report(done: int, total: int) -> None:
                    line.total = total
                    line.update(done, f"{done:,} of {total:,} windows")

                return score_documents(each, split, tokenizer, length, batch_size, stride=stride, progress=report)

        scores = score(model, "evaluating")
        of_more_bits = None if before is None else score(before.load(), before.title).total()
    with runtime.progress.stage(f"resampling {scores.num_documents:,} documents"):
        total, interval = scores.total(), scores.interval(confidence)
        sources, poorest = scores.by_source(by, confidence), scores.worst(WORST if worst is None else worst)
    console.print(total)
    if before is not None and of_more_bits is not None:
        console.print(before.change(of_more_bits, total))
    console.print(_interval_words(scores, interval, confidence))
    if learnt is not None:
        console.print(learnt)
    if len(sources) > 1:
        more = f" (the {SHOWN_SOURCES} largest of {len(sources):,})" if len(sources) > SHOWN_SOURCES else ""
        console.print(f"\nby source{more}:\n{_group_table(sources[:SHOWN_SOURCES], confidence)}")
    if poorest and scores.num_documents > 1:
        console.print(f"\ndocuments with the highest loss:\n{_group_table(poorest, None)}")
    return {
        **total.to_dict(),
        **({} if before is None or of_more_bits is None else {before.key: of_more_bits.to_dict()}),
        "scored": "text",
        "seq_len": length,
        "stride": stride or length,
        "num_documents": scores.num_documents,
        "trained_on_files": 0 if learnt is None else learnt.files,
        "num_bytes": int(scores.num_bytes.sum()),
        "confidence": confidence,
        "resamples": RESAMPLES,
        "interval": None if interval is None else asdict(interval),
        "sources": [group.to_dict() for group in sources],
        "worst_documents": [group.to_dict() for group in poorest],
    }


def _before(model: Model, checkpoint: str, weights: str | None, kv_cache: str | None, device: str) -> Before | None:
    """What a model in fewer bits is compared with."""

    def stored() -> Model:
        found: Model = load_model(checkpoint, weights="fp32", device=device)[0]
        return found

    def without_cache() -> Model:
        model.kv_cache = None
        return model

    if weights in ("bf16", "int8", "int4"):
        changes = "these change" if kv_cache is None else f"these and a KV cache of {kv_cache} change"
        return Before(stored, "stored_weights", "evaluating with the weights as they are stored", "The stored weights have", changes)
    if kv_cache is not None:
        title = "evaluating with keys and values as they are computed"
        return Before(without_cache, "computed_kv", title, "Keys and values as they are computed give", f"{kv_cache} changes")
    return None


def _evaluate_chats(
    console: Console, model: Model, split: ChatSplit, learnt: TrainedOn | None, seq_len: int, batch_size: int, before: Before | None
) -> dict[str, Any]:
    """The answers alone are predicted, as in training; conversations are packed whole, so that there is nothing to slide over."""
    from cllm import runtime
    from cllm.data.tokens.chat import check_fit
    from cllm.evaluate.loss import evaluate

    check_fit([split], seq_len, model.config.max_seq_len, console.print)

    def score(each: Model, title: str) -> Evaluation:
        with runtime.progress.Progress(None, title) as line:

            def report(done: int, total: int) -> None:
                line.total = total
                line.update(done, f"{done:,} of {total:,} tokens")

            return evaluate(each, split, seq_len=seq_len, batch_size=batch_size, progress=report)

    result = score(model, "evaluating")
    of_more_bits = None if before is None else score(before.load(), before.title)
    console.print(result)
    if before is not None and of_more_bits is not None:
        console.print(before.change(of_more_bits, result))
    scored = split.fit(seq_len).usable
    console.print(f"Scored are the answers of {counted(scored, 'conversation')}, which training learns from; questions are read and not predicted.")
    if learnt is not None:
        console.print(learnt)
    return {
        **result.to_dict(),
        **({} if before is None or of_more_bits is None else {before.key: of_more_bits.to_dict()}),
        "scored": "answers",
        "seq_len": seq_len,
        "num_conversations": split.num_documents,
        "num_scored_conversations": scored,
        "trained_on_files": 0 if learnt is None else learnt.files,
    }


def tasks_run(console: Console, model: Model, tokenizer: Tokenizer, tasks: list[str], task_path: Path | None, batch_size: int) -> dict[str, Any]:
    """Runs tasks of lm-evaluation-harness, prints a row for each figure, and returns them: {"results": {task: {metric: value}}}."""
    from cllm.evaluate.harness import run_tasks

    results = run_tasks(model, tokenizer, tasks, task_path, batch_size)
    rows = [("task", "metric", "value", "standard error")]
    for name, figures in results.items():
        for key, value in figures.items():
            metric, _, rest = key.partition(",")
            if isinstance(value, int | float) and not metric.endswith("_stderr"):
                error = figures.get(f"{metric}_stderr,{rest}")
                rows.append((name, metric, f"{value:.4f}", f"{error:.4f}" if isinstance(error, int | float) else ""))
    console.print(table(rows))
    return {"results": results}


def _interval_words(scores: DocumentScores, interval: Interval | None, confidence: float) -> str:
    from cllm.evaluate.documents import FEW_DOCUMENTS

    if interval is None:
        return "No confidence interval: the text is a single document, and how documents differ cannot be seen in one."
    loss, perplexity, bits, accuracy = interval.loss, interval.perplexity, interval.bits_per_byte, interval.accuracy
    few = scores.num_documents < FEW_DOCUMENTS
    return (
        f"{100 * confidence:g} % confidence over {scores.num_documents:,} documents: loss {loss[0]:.4f} to {loss[1]:.4f}, perplexity "
        f"{perplexity[0]:,.2f} to {perplexity[1]:,.2f}, bits per byte {bits[0]:.4f} to {bits[1]:.4f}, "
        f"accuracy {100 * accuracy[0]:.2f} to {100 * accuracy[1]:.2f} %"
        + (f" (fewer than {FEW_DOCUMENTS} documents: the true interval is wider)" if few else "")
    )


def _group_table(groups: list[Group], confidence: float | None) -> str:
    """A row for each group; with `confidence`, its interval of the loss and its number of documents."""
    with_interval = confidence is not None
    rows = [("name", *(("documents",) if with_interval else ()), "tokens", "loss", "perplexity", "bits/byte", "accuracy")]
    rows[0] += (f"{100 * confidence:g} % of loss",) if confidence is not None else ()
    for group in groups:
        figures = group.evaluation
        row = (
            group.name,
            *((f"{group.num_documents:,}",) if with_interval else ()),
            f"{figures.num_targets:,}",
            f"{figures.loss:.4f}",
            f"{figures.perplexity:,.2f}",
            f"{figures.bits_per_byte:.4f}",
            f"{100 * figures.accuracy:.2f} %",
        )
        if with_interval:
            row += ("one document" if group.interval is None else f"{group.interval.loss[0]:.4f} to {group.interval.loss[1]:.4f}",)
        rows.append(row)
    return table(rows)
