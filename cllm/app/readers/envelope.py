"""Curves of any length as a few hundred buckets, each with the least, the largest and the mean of all its values: nothing is left out."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Envelope(NamedTuple):
    """(buckets,) float64 each; NaN where a bucket holds no finite value. nonfinite: values that are NaN or infinite, in all buckets."""

    least: np.ndarray
    largest: np.ndarray
    mean: np.ndarray
    nonfinite: int


def starts(num_rows: int, buckets: int) -> np.ndarray:
    """Where each of at most `buckets` buckets of (nearly) equally many rows begins: (min(buckets, num_rows),) int64, strictly rising."""
    count = min(num_rows, max(1, buckets))
    return np.arange(count, dtype=np.int64) * num_rows // max(1, count)


def envelope(values: np.ndarray, begins: np.ndarray) -> Envelope:
    """values: (rows,) float64. begins: of `starts`, for as many rows."""
    if not len(begins):
        return Envelope(np.empty(0), np.empty(0), np.empty(0), 0)
    is_finite = np.isfinite(values)
    known = np.where(is_finite, values, np.nan)
    counts = np.add.reduceat(is_finite, begins, dtype=np.int64)
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        least, largest = np.fmin.reduceat(known, begins), np.fmax.reduceat(known, begins)
        mean = np.add.reduceat(np.where(is_finite, values, 0.0), begins) / counts
        # Sums of numbers near the largest that there is overflow, and rounding may carry a mean of equal numbers past them.
        mean = np.where(np.isnan(mean), least / 2 + largest / 2, mean)
        mean = np.clip(mean, least, largest)
    return Envelope(least, largest, mean, int(len(values) - counts.sum()))


def numbers(values: np.ndarray) -> list[float | None]:
    """An array for JSON, which knows neither NaN nor infinity."""
    return [each if each - each == 0 else None for each in values.tolist()]
