"""`cllm generate`: a model continues a text."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cllm.cli.console import open_console
from cllm.cli.options import (
    Checkpoint,
    Context,
    Device,
    Draft,
    Json,
    KvCache,
    Stretch,
    Threads,
    Weights,
    check_model,
    examples,
    load_draft,
    load_model,
    option,
    read_settings,
    read_text,
    text_option,
    with_settings,
)
from cllm.config.sampling import SAMPLING
from cllm.runtime.errors import UserError
from cllm.runtime.progress import say

if TYPE_CHECKING:
    from cllm.generate.decoding import Generation

MaxTokens = Annotated[int, option("--max-tokens", int, "Largest number of tokens to write.", at_least=1, example=200)]
Seed = Annotated[int, option("--seed", int, "Seed of the random choices. The same seed gives the same text.", at_least=0)]

app = typer.Typer()


@app.command(
    epilog=examples(
        "cllm generate sample --prompt 'It is a truth universally acknowledged, that'",
        "cllm generate runs/demo --prompt 'def '",
        "cllm generate runs/demo --prompt-file start.txt --temperature 0 --max-tokens 500",
        "cllm generate runs/demo --prompt 'Name and age: ' --json-schema person.json",
        "cllm generate runs/demo --prompt 'def add(a, b):' --suffix 'print(add(1, 2))'",
    )
)
@with_settings(SAMPLING)
def generate(
    checkpoint: Checkpoint,
    prompt: Annotated[str | None, text_option("--prompt", "Text to continue.")] = None,
    prompt_file: Annotated[Path | None, option("--prompt-file", Path, "File with the text to continue.")] = None,
    encoding: Annotated[str, option("--encoding", str, "Charset of --prompt-file if it is not Unicode. auto guesses it from the letters.")] = "auto",
    suffix: Annotated[
        str | None,
        option(
            "--suffix", str, "Text that follows: what stands between the prompt and it is written. Needs a model that was trained with --fim-rate."
        ),
    ] = None,
    max_tokens: MaxTokens = 200,
    stop: Annotated[list[str] | None, option("--stop", str, "Text at which to stop. Can be given several times.")] = None,
    seed: Seed = 0,
    samples: Annotated[int, option("--samples", int, "Number of continuations.", at_least=1, at_most=10_000)] = 1,
    beams: Annotated[
        int | None,
        option("--beams", int, "Search for the likeliest text with this many beams instead of choosing at random.", at_least=1, at_most=256),
    ] = None,
    length_penalty: Annotated[
        float | None, option("--length-penalty", float, "With --beams: above 0 prefers long texts, below 0 short ones. [default: 1.0]", example=1.0)
    ] = None,
    json_schema: Annotated[Path | None, option("--json-schema", Path, "File with a JSON schema: the text is JSON that fits it.")] = None,
    regex: Annotated[str | None, text_option("--regex", "Regular expression that the whole text matches.")] = None,
    grammar: Annotated[Path | None, option("--grammar", Path, "File with a grammar (llguidance's Lark) that the text follows.")] = None,
    no_cache: Annotated[bool, typer.Option("--no-cache", help="Compute every token from scratch, as a check. Slow.")] = False,
    stream: Annotated[bool, typer.Option(help="Print the text while it is generated.")] = True,
    context: Context = None,
    stretch: Stretch = None,
    weights: Weights = None,
    kv_cache: KvCache = None,
    draft: Draft = None,
    device: Device = "auto",
    threads: Threads = None,
    as_json: Json = False,
    **settings: Any,
) -> None:
    """Continue a text with a model."""
    console = open_console(as_json)
    if (prompt is None) == (prompt_file is None):
        raise UserError("give the text to continue either as --prompt or as --prompt-file.")
    if prompt_file is not None:
        prompt = read_text(prompt_file, encoding)
    assert prompt is not None
    options = {"max_tokens": max_tokens, "stop": tuple(stop or ()), "seed": seed, "use_cache": not no_cache, **read_settings(SAMPLING, settings)}
    form = _form(json_schema, regex, grammar)
    if length_penalty is not None and beams is None:
        raise UserError("--length-penalty is for a beam search. Give --beams as well.")
    if beams is not None:
        given = {SAMPLING[name].option: value is not None for name, value in settings.items()}
        given |= {
            "--samples": samples != 1,
            "--seed": seed != 0,
            "--no-cache": no_cache,
            "--draft": draft is not None,
            "--json-schema, --regex and --grammar": form is not None,
        }
        _check_beams([name for name, is_given in given.items() if is_given])
    if draft is not None and no_cache:
        raise UserError("--no-cache computes every token by itself, and --draft guesses several ahead. Leave one of them out.")
    check_model(checkpoint)
    from cllm import runtime
    from cllm.data.tokens.fim import fim_prompt
    from cllm.generate.chat_context import prompt_room
    from cllm.generate.constraint import compile_constraint
    from cllm.generate.decoding import generate as run
    from cllm.generate.decoding import stream as run_stream

    with runtime.use(threads=threads):
        model, tokenizer = load_model(
            checkpoint, weights=weights, device=device, generating=True, context=context, stretch=stretch, kv_cache=kv_cache
        )
        options["draft"] = load_draft(draft, tokenizer, weights, device, kv_cache)
        options["on_slide"] = lambda: say(_slides(model.config.max_seq_len))
        if form is not None:
            options["constraint"] = compile_constraint(tokenizer, *form)
        asked: str | list[int] = prompt
        shown = {"prompt": prompt}
        if suffix is not None:
            before, after, longest = tokenizer.encode(prompt), tokenizer.encode(suffix), model.config.max_seq_len
            asked = fim_prompt(tokenizer, before, after, prompt_room(longest, max_tokens))
            if len(asked) < len(before) + len(after) + 3:
                say(
                    f"The context of {longest:,} tokens does not hold the prompt of {len(before):,}, the suffix of {len(after):,} and the middle: "
                    "the model sees what is next to the middle."
                )
            # A middle ends with the context: without the text around it nothing fits any more.
            options["max_tokens"] = max_tokens = min(max_tokens, longest - len(asked) + 1)
            shown["suffix"], prompt = suffix, ""
        if beams is not None:
            from cllm.generate.beams import generate_beams

            penalty = 1.0 if length_penalty is None else length_penalty
            found = generate_beams(model, tokenizer, asked, beams=beams, max_tokens=max_tokens, length_penalty=penalty, stop=tuple(stop or ()))
            console.write(f"{prompt}{found[0].text}\n")
            console.result(shown | _summary(found) | {"scores": [each.score for each in found]})
            return
        if stream and samples == 1 and not as_json:
            # What is wrong with the options is said before the prompt is shown, and so is that kernels are compiled.
            pieces = run_stream(model, tokenizer, asked, **options)
            first = next(pieces, "")
            for piece in chain((prompt, first), pieces, ("\n",)):
                console.write(piece)
            return
        results = run(model, tokenizer, asked, samples=samples, **options)
    for number, each in enumerate(results, 1):
        if samples > 1:
            console.print(f"--- {number} of {samples} ---")
        console.write(f"{prompt}{each.text}\n")
    console.result(shown | _summary(results))


def _slides(context: int) -> str:
    return (
        f"The text is longer than the model's context of {context:,} tokens: from here on the model sees the newest half of that. "
        "--context with --stretch lets it see further."
    )


def _summary(results: Sequence[Generation]) -> dict[str, Any]:
    first = results[0]
    return {
        "texts": [each.text for each in results],
        "tokens": [list(each.tokens) for each in results],
        "finish_reasons": [each.finish_reason for each in results],
        "prompt_tokens": first.prompt_tokens,
        "tokens_per_second": round(first.tokens_per_second, 2),
    }


def _check_beams(given: list[str]) -> None:
    """UserError for options that a beam search does not look at."""
    if given:
        raise UserError(f"--beams searches for the likeliest text, and {given[0]} cannot be used with it. Leave one of them out.")


def _form(json_schema: Path | None, regex: str | None, grammar: Path | None) -> tuple[str, str] | None:
    """What the text must keep to, as `compile_constraint` takes it. UserError where more than one is given, or llguidance is missing."""
    given = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
    found = [(kind, value) for kind, value in given.items() if value is not None]
    if not found:
        return None
    if len(found) > 1:
        raise UserError("give only one of --json-schema, --regex and --grammar.")
    from cllm.generate.constraint import check_installed

    check_installed()
    ((kind, value),) = found
    return kind, read_text(value, "auto") if isinstance(value, Path) else value
