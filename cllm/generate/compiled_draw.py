"""A draw from one row of logits, compiled: the token that `filtered` and `draw_at` of sampling.py give, many times faster.

top-k, top-p and min-p each keep a beginning of the same order (by logit, ties by id), so that together they are one cut through it, which is
found by bisection instead of sorting. Sums are rounded otherwise than there: where a decision lies within TOLERANCE of a bound, and rounding
might tip it, the answer is UNDECIDED and the caller asks sampling.py. So the token is always the same.
"""

import math

import numpy as np

from cllm.runtime.compiler import numba_setup

numba_setup()

import numba  # noqa: E402 - its settings are read when it is imported

UNDECIDED = -1
TOLERANCE = 1e-10  # of probabilities: far above the rounding of sums over 256 k tokens, far below what would be undecided often
_LEAST = -745.0  # exp of less is 0 in float64
_FEW = 64  # tokens that are sorted
_BLOCK = 512

# All functions stand in this one file, which numba itself watches: its cache needs no further key.
_jit = numba.njit(cache=True, nogil=True, error_model="numpy")
_jit_sum = numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "nsz", "contract"})  # sums in vectors; NaN keeps its meaning

_LOG2E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 6.93147180369123816490e-01, 1.90821492927058770002e-10
_ROUND = 6755399441055744.0  # 1.5 * 2**52: added to a number it leaves the nearest integer in the low bits


@_jit_sum
def _scaled(x: np.ndarray, top: float, temperature: float, z: np.ndarray, weights: np.ndarray) -> None:
    """z = (x - top) / temperature, and its exp with an error of a few units in the last place."""
    powers = np.empty(_BLOCK, dtype=np.float64)
    power_bits, weight_bits = powers.view(np.int64), weights.view(np.int64)
    for begin in range(0, x.size, _BLOCK):
        count = min(_BLOCK, x.size - begin)
        for i in range(count):
            z[begin + i] = (x[begin + i] - top) / temperature
        _exp_parts(z[begin : begin + count], powers, weights[begin : begin + count])
        for i in range(count):
            weight_bits[begin + i] += power_bits[i] << 52


@numba.njit(cache=True, nogil=True, error_model="numpy", fastmath={"contract"})
def _exp_parts(z: np.ndarray, powers: np.ndarray, weights: np.ndarray) -> None:
    """exp(z) as weights * 2**n, n in the low bits of `powers`. The order of these operations matters."""
    for i in range(z.size):
        x = max(z[i], -700.0)
        power = x * _LOG2E + _ROUND
        n = power - _ROUND
        r = (x - n * _LN2_HIGH) - n * _LN2_LOW
        p = r * (1.0 / 39916800.0) + 1.0 / 3628800.0
        p = p * r + 1.0 / 362880.0
        p = p * r + 1.0 / 40320.0
        p = p * r + 1.0 / 5040.0
        p = p * r + 1.0 / 720.0
        p = p * r + 1.0 / 120.0
        p = p * r + 1.0 / 24.0
        p = p * r + 1.0 / 6.0
        p = p * r + 0.5
        p = p * r + 1.0
        weights[i] = p * r + 1.0
        powers[i] = power


@_jit_sum
def _sum(values: np.ndarray) -> float:
    total = 0.0
    for i in range(values.size):
        total += values[i]
    return total


@_jit_sum
def _from(z: np.ndarray, weights: np.ndarray, bound: float) -> tuple[float, float]:
    """Number and weight of the tokens with z >= bound."""
    count, total = 0.0, 0.0
    for i in range(z.size):
        inside = z[i] >= bound
        count += 1.0 if inside else 0.0
        total += weights[i] if inside else 0.0
    return count, total


@_jit
def _cut(z: np.ndarray, weights: np.ndarray, goal: float, by_count: bool, tolerance: float) -> bool:
    """Keeps the smallest beginning of the order whose number (or weight) reaches the goal: z of the others becomes -inf, their weight 0.

    False where a weight comes nearer to the goal than the tolerance. All z are <= 0.
    """
    low, high = _LEAST, 1.0  # what is >= high is kept and does not reach the goal; what is >= low reaches it
    reached = 0.0
    between = float(z.size)
    low_count, low_total = _from(z, weights, low)
    if (low_count if by_count else low_total) <= goal:
        return by_count or low_total < goal - tolerance  # all that can be drawn are kept
    high_count = 0.0
    middle = -16.0
    while True:
        between = low_count - high_count
        if between <= _FEW or not low < middle < high:
            break
        count, total = _from(z, weights, middle)
        if (count if by_count else total) < goal:
            high, high_count, reached = middle, count, (count if by_count else total)
        else:
            low, low_count = middle, count
        middle = low + 0.5 * (high - low)
    tokens = np.empty(int(between), dtype=np.int64)
    found = 0
    for i in range(z.size):
        if low <= z[i] < high:
            value, place = z[i], found
            while place > 0 and z[tokens[place - 1]] < value:
                tokens[place] = tokens[place - 1]
                place -= 1
            tokens[place] = i
            found += 1
    last = -1
    for number in range(found):
        if not by_count and abs(reached - goal) <= tolerance and reached > 0.0:
            return False
        if reached >= goal:
            break
        last = number
        reached += 1.0 if by_count else weights[tokens[number]]
    if last < 0 or (not by_count and abs(reached - goal) <= tolerance):
        return False
    bound, behind = z[tokens[last]], tokens[last] + 1
    _drop_below(z[:behind], weights[:behind], bound)
    _drop_below(z[behind:], weights[behind:], np.nextafter(bound, 1.0))  # of equal ones those that come first are kept
    return True


@_jit
def _drop_below(z: np.ndarray, weights: np.ndarray, bound: float) -> None:
    for i in range(z.size):
        kept = z[i] >= bound
        z[i] = z[i] if kept else -np.inf
        weights[i] = weights[i] if kept else 0.0


@_jit
def draw_token(x: np.ndarray, top: float, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
    """The token drawn by a uniform number in [0, 1) from adjusted logits x (V,) float64, the largest of which is `top`; UNDECIDED where rounding
    decides.

    top_k 0, top_p 1 and min_p 0 keep all. x holds no NaN and no +inf, and not -inf alone; temperature > 0.
    """
    z, weights = np.empty_like(x), np.empty_like(x)
    _scaled(x, top, temperature, z, weights)
    if 0 < top_k < z.size and not _cut(z, weights, float(top_k), True, 0.0):
        return UNDECIDED
    if top_p < 1.0:
        total = _sum(weights)
        if not _cut(z, weights, top_p * total, False, TOLERANCE * total):
            return UNDECIDED
    if min_p > 0.0:
        bound = math.log(min_p)
        near = TOLERANCE * max(1.0, -bound)
        doubtful = 0
        for i in range(z.size):
            doubtful += abs(z[i] - bound) <= near and z[i] != 0.0
        if doubtful:
            return UNDECIDED
        _drop_below(z, weights, bound)
    return _at(weights, uniform)


@_jit
def _at(weights: np.ndarray, uniform: float) -> int:
    """The token in which the cumulative weight passes this share of the whole."""
    total = _sum(weights)
    target, tolerance = uniform * total, TOLERANCE * total
    before = 0.0
    for begin in range(0, weights.size, _BLOCK):
        block = weights[begin : begin + _BLOCK]
        behind = before + _sum(block)
        if behind < target - tolerance:
            before = behind
            continue
        for i in range(block.size):
            after = before + block[i]
            if after > target:
                return begin + i if before < target - tolerance and target + tolerance < after else UNDECIDED
            before = after
    return UNDECIDED


@_jit
def log_of_sum(x: np.ndarray) -> float:
    """log(sum(exp(x))) of x (V,) float64 without NaN and +inf."""
    z, weights = np.empty_like(x), np.empty_like(x)
    top = x.max()
    _scaled(x, top, 1.0, z, weights)
    return top + math.log(_sum(weights))


@_jit
def likeliest(x: np.ndarray, count: int) -> np.ndarray:
    """The tokens of the largest `count` logits x (V,), the largest first, ties by id: (count,) int64."""
    tokens = np.empty(count, dtype=np.int64)
    found = 0
    for i in range(x.size):
        if found == count and (count == 0 or x[i] <= x[tokens[count - 1]]):
            continue
        place = found if found < count else count - 1
        found = min(found + 1, count)
        while place > 0 and x[tokens[place - 1]] < x[i]:
            tokens[place] = tokens[place - 1]
            place -= 1
        tokens[place] = i
    return tokens
