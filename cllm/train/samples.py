"""A sample of what a model writes from nothing, for the person who trains it. Training generates text nowhere else."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cllm.data import TokenSplit
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.model.model import Model

SAMPLE_TOKENS = 200


def sample_text(model: Model, tokenizer: Tokenizer, train: TokenSplit, seed: int = 0, seconds: float = math.inf) -> str:
    """Up to SAMPLE_TOKENS tokens from where a document begins; without an end-of-text token, from the first token of the training text.

    After `seconds` the text ends with the token that is being written.
    """
    from cllm.generate.decoding import stream

    start = int(train.read(0, 1)[0]) if tokenizer.eot_id is None else tokenizer.eot_id
    until, written = time.monotonic() + seconds, []
    for piece in stream(model, tokenizer, [start], max_tokens=SAMPLE_TOKENS, temperature=0.8, top_p=0.95, seed=seed):
        written.append(piece)
        if time.monotonic() >= until:
            break
    return "".join(written)
