"""`cllm generate` and `cllm chat`: a model continues a text, or answers line by line."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cllm.cli.console import Console, open_console, standard_input
from cllm.cli.options import Checkpoint, Device, Json, Threads, Weights, examples, load_model, option, read_settings, read_text, with_settings
from cllm.config.sampling import SAMPLING
from cllm.runtime.errors import UserError

if TYPE_CHECKING:
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.model.model import Model

MaxTokens = Annotated[int, option("--max-tokens", int, "Most tokens to write.", at_least=1, example=200)]
Seed = Annotated[int, option("--seed", int, "Same seed, same text.", at_least=0)]
CHAT_SAMPLING = SAMPLING | {"temperature": replace(SAMPLING["temperature"], default=0.7)}

app = typer.Typer()


@app.command(
    epilog=examples(
        "cllm generate runs/demo --prompt 'def '",
        "cllm generate runs/demo --prompt-file start.txt --temperature 0 --max-tokens 500",
    )
)
@with_settings(SAMPLING)
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str | None, typer.Option(help="Text to continue.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="File with the text to continue.")] = None,
    max_tokens: MaxTokens = 200,
    stop: Annotated[list[str] | None, typer.Option(help="Text at which to stop; repeatable.")] = None,
    seed: Seed = 0,
    samples: Annotated[int, option("--samples", int, "How many continuations.", at_least=1)] = 1,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Compute every token from scratch (a check, slow).")] = False,
    stream: Annotated[bool, typer.Option(help="Print the text as it is written.")] = True,
    weights: Weights = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Continue a text."""
    console = open_console(as_json)
    if (prompt is None) == (prompt_file is None):
        raise UserError("give the text to continue either as --prompt or as --prompt-file.")
    if prompt_file is not None:
        prompt = read_text(prompt_file)
    assert prompt is not None
    options = {"max_tokens": max_tokens, "stop": tuple(stop or ()), "seed": seed, "use_cache": not no_cache, **read_settings(SAMPLING, settings)}
    from cllm import runtime
    from cllm.generate.decoding import generate as run
    from cllm.generate.decoding import stream as run_stream

    with runtime.use(threads=threads):
        model, tokenizer = load_model(checkpoint, weights=weights, device=device)
        if stream and samples == 1 and not as_json:
            pieces = run_stream(model, tokenizer, prompt, **options)  # checks all of it, before the prompt is shown
            for piece in chain((prompt,), pieces, ("\n",)):
                console.write(piece)
            return
        results = run(model, tokenizer, prompt, samples=samples, **options)
    for number, each in enumerate(results, 1):
        if samples > 1:
            console.print(f"--- {number} of {samples} ---")
        console.write(f"{prompt}{each.text}\n")
    first = results[0]
    console.result(
        {
            "prompt": prompt,
            "texts": [each.text for each in results],
            "tokens": [list(each.tokens) for each in results],
            "finish_reasons": [each.finish_reason for each in results],
            "prompt_tokens": first.prompt_tokens,
            "tokens_per_second": round(first.tokens_per_second, 2),
        }
    )


@app.command(epilog=examples("cllm chat runs/helper", "cllm chat runs/helper --system 'Answer in one sentence.'"))
@with_settings(CHAT_SAMPLING)
def chat(
    checkpoint: Checkpoint,
    system: Annotated[str | None, typer.Option(help="What the model is told before the conversation.")] = None,
    max_tokens: MaxTokens = 200,
    seed: Seed = 0,
    weights: Weights = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Talk with a model that was taught on chats: each line of standard input gets an answer, until it ends (Ctrl-D)."""
    console = open_console(as_json)
    options = {"max_tokens": max_tokens, "seed": seed, **read_settings(CHAT_SAMPLING, settings)}
    from cllm import runtime

    with runtime.use(threads=threads):
        model, tokenizer = load_model(checkpoint, weights=weights, device=device)
        messages = converse(console, model, tokenizer, standard_input(), system, **options)
    console.result({"messages": messages})


def converse(console: Console, model: Model, tokenizer: Tokenizer, lines: Iterable[str], system: str | None, **options: Any) -> list[dict[str, str]]:
    """Answers each line and returns the whole conversation; options as in `cllm.generate.decoding`. UserError for a model without a chat template."""
    from cllm.data.tokens.chat_template import encode_prompt, end_of_turn
    from cllm.generate.decoding import stream

    if tokenizer.chat_template is None:
        raise UserError("this model has no chat template: it was not taught to chat. Teach it with: cllm train CHATS.jsonl --from MODEL")
    end = end_of_turn(tokenizer)
    speaker = tokenizer if end is None else tokenizer.with_end(end)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for line in lines:
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line.strip()})
        answer = ""
        for piece in stream(model, speaker, encode_prompt(tokenizer, messages), truncate_prompt=True, **options):
            console.write(piece)
            answer += piece
        console.print()
        messages.append({"role": "assistant", "content": answer})
    return messages
