"""What a model writes behind many prompts, computed together; each continuation is the one that its prompt gets alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from cllm.config.sampling import Sampling
from cllm.generate.engine import Engine
from cllm.generate.request import Request
from cllm.runtime.errors import CLLMError

if TYPE_CHECKING:
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.generate.sampler import Chosen
    from cllm.model.model import Model

_TOGETHER = 32  # prompts whose keys and values are held at a time


def continue_all(
    model: Model, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], max_tokens: int, *, temperature: float = 0.0, seed: int = 0,
    ends: Callable[[Sequence[int]], bool] = lambda tokens: False, progress: Callable[[int], None] | None = None,
) -> list[list[int]]:  # fmt: skip
    """The continuation of each prompt (token ids, at least one), up to and with the first token after which
    `ends(tokens)` of all tokens so far is true.

    An end-of-text token ends a continuation and is no part of it, and so does the end of the model's context. temperature: 0 takes the likeliest
    token. seed: prompt number i is continued with the seed `seed` + i, so that equal prompts differ. `progress(done)` is called with the number of
    continuations that are complete.
    """
    written: list[list[int]] = [[] for _ in prompts]
    end_tokens = frozenset(() if tokenizer.eot_id is None else (tokenizer.eot_id,))
    engine = Engine(model, vocab_size=tokenizer.vocab_size, most_rows=_TOGETHER, most_waiting=max(1, len(prompts)))
    done, failures = 0, list[str]()

    def request(index: int) -> Request:
        def on_token(_: int, chosen: Chosen) -> bool:
            written[index].append(chosen.token)
            return not ends(written[index])

        def on_finish(_: int, reason: str) -> None:
            nonlocal done
            done += 1
            if reason.startswith("error: "):
                failures.append(reason.removeprefix("error: "))

        return Request(
            list(prompts[index]), max_tokens, Sampling(temperature=temperature), seed + index, end_tokens=end_tokens, on_token=on_token,
            on_finish=on_finish,
        )  # fmt: skip

    for index in range(len(prompts)):
        engine.submit(request(index))
    while engine.step():
        if failures:
            raise CLLMError(failures[0])
        if progress is not None:
            progress(done)
    return written
