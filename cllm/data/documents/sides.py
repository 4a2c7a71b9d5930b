"""Which documents are for training and which for validation.

A document goes to validation when the hash of its text, as a fraction, is below val_fraction: the same text always lands on the same
side, and no document moves when others arrive. Where that leaves one side (nearly) empty or validation far too large, because the documents
are few, they are taken in the order of their hashes until validation has its share; and where that cannot be done either (one book), each
document is cut by position: its first int((1 - val_fraction) * characters) characters are for training, the rest for validation.

Where no val_fraction is given, `default_val_fraction` takes it from the amount of text. As text is added it can only fall: documents then may
leave validation for training, and none goes the other way.
"""

from dataclasses import dataclass

import numpy as np

from cllm.runtime.errors import UserError

TRAIN, VAL = 0, 1
VAL_OF_SMALL, VAL_LEAST, VAL_SHARE, VAL_MOST = 0.1, 1_000_000, 0.01, 8_000_000  # share, bytes, share, bytes: see default_val_fraction


@dataclass(frozen=True)
class SplitPlan:
    """Which side each document is on; sides None: each document is cut by position."""

    val_fraction: float
    method: str  # "hash", "hash order" or "position", in words for people and in the key of the cache
    sides: np.ndarray | None  # (num_documents,) uint8: TRAIN or VAL

    def cut(self, num_chars: int) -> int:
        """Characters of a document for training when it is cut by position."""
        return int((1 - self.val_fraction) * num_chars)

    def train_bytes(self, rows: np.ndarray) -> int:
        if self.sides is None:
            return int((1 - self.val_fraction) * int(rows["bytes"].sum()))
        return int(rows["bytes"][self.sides == TRAIN].sum())


def default_val_fraction(num_bytes: int) -> float:
    """The share of `num_bytes` of text that is kept for validation when none was given.

    A tenth up to 10 MB, then 1 MB, from 100 MB on one hundredth, and at most 8 MB: about 2 million tokens, on which a mean loss is known to
    about 0.002 nats (tokens spread by about 3 nats, divided by the root of their number). More would be taken from training, and cost time in
    every evaluation, without telling more.
    """
    return min(VAL_OF_SMALL, max(VAL_SHARE, VAL_LEAST / max(1, num_bytes)), VAL_MOST / max(1, num_bytes))


def plan_split(rows: np.ndarray, val_fraction: float | None) -> SplitPlan:
    """The side of each document from the hash of its text; see the top of this file. val_fraction None: `default_val_fraction` chooses."""
    if val_fraction is None:
        val_fraction = default_val_fraction(int(rows["bytes"].sum()))
    if not 0.0 <= val_fraction < 1.0:
        raise UserError(f"val_fraction must be at least 0 and below 1, got {val_fraction}. Use a value like 0.1.")
    if val_fraction == 0.0:
        return SplitPlan(0.0, "hash", np.full(len(rows), TRAIN, dtype=np.uint8))
    total = int(rows["bytes"].sum())

    def fits(sides: np.ndarray) -> bool:
        share = float(rows["bytes"][sides == VAL].sum()) / total
        return val_fraction / 3 <= share <= min(3 * val_fraction, (1 + val_fraction) / 2) and bool((sides == TRAIN).any())

    sides = (rows["key"].astype(np.float64) / 2.0**64 < val_fraction).astype(np.uint8)
    if fits(sides):
        return SplitPlan(val_fraction, "hash", sides)

    keys, inverse = np.unique(rows["key"], return_inverse=True)
    sizes = np.bincount(inverse, weights=rows["bytes"])  # of each distinct text, in the order of the hashes
    chosen = np.zeros(len(keys), dtype=bool)
    filled = 0.0
    for i, size in enumerate(sizes):
        if filled < val_fraction * total and filled + size <= 1.5 * val_fraction * total:
            chosen[i] = True
            filled += size
    sides = chosen[inverse].astype(np.uint8)
    if fits(sides):
        return SplitPlan(val_fraction, "hash order", sides)
    return SplitPlan(val_fraction, "position", None)
