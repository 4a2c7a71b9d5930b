"""What a training takes that was given its time alone (`train.hours`): a family of models, and for each of them batch, learning rate and schedule.

The scaling law (`cllm.config.scaling_law`) was fitted to runs of this very recipe, so that it speaks of runs that follow it. Its figures come from
the runs in profiling/results/scaling-law.json.
"""

from __future__ import annotations

import math
from typing import Any

OPTIMIZER, SCHEDULE = "muon", "wsd"
# Wide enough for minutes on two cores and for days on a GPU.
WIDTHS = (32, 64, 96, 128, 192, 256, 320, 384, 512, 640, 768, 1024, 1280, 1536, 2048)
BATCH_TOKENS, BATCH_AT, BATCH_GROWTH = 2048, 1e6, 0.5
RATE, RATE_WIDTH, RATE_AT, RATE_FALLS = 0.01, 64, 200e3, 0.2
WARMUP_SHARE, WARMUP_MOST = 0.04, 1000
TAIL = 1.0  # seconds between the end of a training and that of its command, for what is printed


def sizes(width: int) -> dict[str, Any]:
    """The model of a width, as settings of [model]: deeper as it gets wider, shaped as the presets are (grouped queries, QK-norm)."""
    head = 64 if width >= 256 and width % 128 == 0 else 32
    heads = width // head
    return {
        "embed_dim": width,
        "num_layers": 2 + width // 64,
        "num_heads": heads,
        "num_kv_heads": heads // 2 if heads % 2 == 0 else heads,
        "ffn_dim": -int(-(8 * width / 3) // 32) * 32,
        "norm": "rms",
        "qk_norm": True,
    }


def batch_size(tokens: float, seq_len: int) -> int:
    """Sequences in an update of a run over `tokens` tokens in all: a power of two, so that an update has about 2,048 sqrt(tokens / 1 M) tokens.

    The batch from which on more data is wasted grows as the square root of the tokens, whatever the size of the model (Zhang et al. 2024, arXiv
    2410.21676; Bergsma et al. 2025, arXiv 2505.13738).
    """
    wanted = BATCH_TOKENS * (tokens / BATCH_AT) ** BATCH_GROWTH / seq_len
    return int(2 ** max(0, round(math.log2(wanted)))) if wanted > 1 else 1


def learning_rate(width: int, tokens: float) -> float:
    """The peak learning rate of a model of a width in a run over so many tokens in all.

    Over 200,000 tokens 0.01 was the best of four for a width of 64, and 0.005 the better of two for 128, so that it falls as 1 / width (as that of
    Adam's matrices: Yang et al. 2022, arXiv 2203.03466). Longer runs want lower rates: with a batch that stays, tokens^-0.32 (Bjorck et al. 2024,
    arXiv 2409.19913). Here the batch grows, which asks for more, so that the rate falls more slowly.
    """
    return float(f"{RATE * min(1.0, RATE_WIDTH / width) * max(1.0, tokens / RATE_AT) ** -RATE_FALLS:.2g}")


def warmup(steps: int) -> int:
    """Updates over which the learning rate rises, of `steps` in all."""
    return min(int(WARMUP_SHARE * steps), WARMUP_MOST)
