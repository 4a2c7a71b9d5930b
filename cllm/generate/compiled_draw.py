"""A draw from one row of logits, compiled: the token that `filtered` and `draw_at` of sampling.py give, many times faster.

top-k, top-p and min-p each keep a beginning of the same order (by logit, ties by id), so that together they are one cut through it, which is
found by bisection instead of sorting. Sums are rounded otherwise than there: where a decision lies within TOLERANCE of a bound, and rounding
might tip it, the answer is UNDECIDED and the caller asks sampling.py. So the token is always the same.
"""

import math
from pathlib import Path

import numpy as np

from cllm.runtime import compiler

compiler.register_kernels(Path(__file__).parent)
compiler.numba_setup()

import numba  # noqa: E402 - its settings are read when it is imported

from cllm.runtime.workers.linked import linked  # noqa: E402

UNDECIDED = -1
TOLERANCE = 1e-10  # of probabilities: far above the rounding of sums over 256 k tokens, far below what would be undecided often
_LEAST = 1e-300  # weights below are never drawn; the smallest ones are all the same
_SURE = 1e-12  # the weights of tokens in the wrong order differ by less
_MANY, _FEW = 1024, 64  # tokens that are looked at by themselves, and that are sorted
_BLOCK, _LINE = 512, 32  # tokens that are computed together, and that are looked at together

_jit = linked(cache=True)
_jit_sum = linked(cache=True, fastmath={"reassoc", "nsz", "contract"})  # sums in vectors; NaN keeps its meaning
_jit_contract = linked(cache=True, fastmath={"contract"})
_called_by_python = numba.njit(cache=True, nogil=True, error_model="numpy")

_LOG2E, _LN2_HIGH, _LN2_LOW = 1.4426950408889634, 6.93147180369123816490e-01, 1.90821492927058770002e-10
_ROUND = 6755399441055744.0  # 1.5 * 2**52: added to a number it leaves the nearest integer in the low bits


@_jit
def _weigh(x: np.ndarray, top: float, temperature: float, weights: np.ndarray) -> None:
    """exp((x - top) / temperature) with an error of a few units in the last place."""
    powers = np.empty(_BLOCK, dtype=np.float64)
    power_bits = powers.view(np.int64)
    for begin in range(0, x.size, _BLOCK):
        block = weights[begin : begin + _BLOCK]
        _exp_parts(x[begin : begin + _BLOCK], top, temperature, powers, block)
        bits = block.view(np.int64)
        for i in range(bits.size):
            bits[i] += power_bits[i] << 52


@_jit_contract
def _exp_parts(x: np.ndarray, top: float, temperature: float, powers: np.ndarray, weights: np.ndarray) -> None:
    """The weights as weights * 2**n, n in the low bits of `powers`. The order of these operations matters."""
    for i in range(x.size):
        y = (x[i] - top) / temperature
        y = y if y > -700.0 else -700.0
        power = y * _LOG2E + _ROUND
        n = power - _ROUND
        r = (y - n * _LN2_HIGH) - n * _LN2_LOW
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
def _from(weights: np.ndarray, bound: float, by_count: bool) -> float:
    """The number, or the weight, of the tokens of at least this weight."""
    total = 0.0
    if by_count:
        for i in range(weights.size):
            total += 1.0 if weights[i] >= bound else 0.0
    else:
        for i in range(weights.size):
            total += weights[i] if weights[i] >= bound else 0.0
    return total


@_jit
def _cut(weights: np.ndarray, x: np.ndarray, top: float, temperature: float, goal: float, tolerance: float, by_count: bool) -> bool:
    """Keeps the smallest beginning of the order whose number, or weight, reaches the goal: the weights of the others become 0.

    False where that comes nearer to the goal than the tolerance. Bisection finds bounds with few tokens between them, or with equal ones; these are
    put into their order by the scaled logits, because nearly equal weights tell nothing about it.
    """
    amount = _from(weights, _LEAST, by_count)
    if amount <= goal:
        return by_count or amount < goal - tolerance  # all that can be drawn are kept
    low, high = _bounds(weights, _LEAST, 2.0, goal, by_count, _MANY)
    tokens, reached = _between(weights, low, high), _from(weights, high, by_count)
    some = weights[tokens]
    low, high = _bounds(some, low, high, goal - reached, by_count, _FEW)
    reached += _from(some, high, by_count)
    tokens = tokens[_between(some, low, high)]
    kept, z = weights[tokens], np.empty(tokens.size, dtype=np.float64)
    for number in range(tokens.size):
        z[number] = (x[tokens[number]] - top) / temperature
    order, last = _order(z), -1
    for number in range(order.size):
        if not by_count and abs(reached - goal) <= tolerance and reached > 0.0:
            return False
        if reached >= goal:
            break
        last = number
        reached += 1.0 if by_count else kept[order[number]]
    if last < 0 or (not by_count and abs(reached - goal) <= tolerance):
        return False
    edge = kept[order[last]]
    if edge < low * (1.0 + 0.1 * _SURE) or edge > high * (1.0 - 0.1 * _SURE):
        return False
    _drop_below(weights, high)
    for number in range(last + 1):
        weights[tokens[order[number]]] = kept[order[number]]
    return True


@_jit
def _bounds(weights: np.ndarray, low: float, high: float, goal: float, by_count: bool, most: int) -> tuple[float, float]:
    """Bounds that are nearer to each other: what is >= high does not reach the goal, and what is >= low does.

    Between them, a little room on both sides included, lie about `most` tokens, or such as can hardly be told from each other.
    """
    low_amount, high_amount = _from(weights, low, by_count), 0.0
    middle = max(math.sqrt(low) * math.sqrt(high), 3.4e-4 if high > 1.0 else 0.0)
    while low < middle < high:
        amount = _from(weights, middle, by_count)
        if amount < goal:
            high, high_amount = middle, amount
        else:
            low, low_amount = middle, amount
        between = low_amount - high_amount
        if (between if by_count else between / low) <= most:
            break
        middle = math.sqrt(low) * math.sqrt(high)
    return low * (1.0 - _SURE), high * (1.0 + _SURE)


@_jit
def _between(weights: np.ndarray, low: float, high: float) -> np.ndarray:
    """The tokens with low <= weight < high."""
    found = np.empty(weights.size + 1, dtype=np.int64)
    count = 0
    for begin in range(0, weights.size, _LINE):
        block = weights[begin : begin + _LINE]
        inside = 0
        for i in range(block.size):  # without a branch, because which tokens lie on which side of a bound cannot be foreseen
            inside += (block[i] >= low) & (block[i] < high)
        if inside:
            for i in range(block.size):
                found[count] = begin + i
                count += (block[i] >= low) & (block[i] < high)
    return found[:count]


@_jit
def _order(z: np.ndarray) -> np.ndarray:
    """The places of z, the largest first, equal ones as they stand. They are few, or nearly all equal."""
    order = np.arange(z.size)
    for number in range(1, z.size):
        each, place = order[number], number
        while place > 0 and z[order[place - 1]] < z[each]:
            order[place] = order[place - 1]
            place -= 1
        order[place] = each
    return order


@_jit
def _drop_below(weights: np.ndarray, bound: float) -> None:
    for i in range(weights.size):
        weights[i] = weights[i] if weights[i] >= bound else 0.0


@_jit_sum
def _doubtful(weights: np.ndarray, bound: float) -> float:
    """How many weights are too near to a bound to be told from it; the largest is 1 exactly, and no bound drops it."""
    total = 0.0
    for i in range(weights.size):
        total += 1.0 if abs(weights[i] - bound) <= TOLERANCE * bound and weights[i] != 1.0 else 0.0
    return total


@_called_by_python
def draw_token(x: np.ndarray, top: float, temperature: float, top_k: int, top_p: float, min_p: float, uniform: float) -> int:
    """The token drawn by a uniform number in [0, 1) from adjusted logits x (V,) float64, the largest of which is `top`; UNDECIDED where rounding
    decides.

    top_k 0, top_p 1 and min_p 0 keep all. x holds no NaN and no +inf, and not -inf alone; temperature > 0.
    """
    weights = np.empty_like(x)
    _weigh(x, top, temperature, weights)
    if 0 < top_k < x.size and not _cut(weights, x, top, temperature, float(top_k), 0.0, True):
        return UNDECIDED
    if top_p < 1.0:
        total = _sum(weights)
        if not _cut(weights, x, top, temperature, top_p * total, TOLERANCE * total, False):
            return UNDECIDED
    if min_p > 0.0:
        if _doubtful(weights, min_p) > 0.0:
            return UNDECIDED
        _drop_below(weights, min_p)
    return _at(weights, uniform)


def compile_draw() -> None:
    """Compiles `draw_token` for the types that it is always called with."""
    number = numba.types.float64
    draw_token.compile((number[::1], number, number, numba.types.int64, number, number, number))


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


@_called_by_python
def log_of_sum(x: np.ndarray) -> float:
    """log(sum(exp(x))) of x (V,) float64 without NaN and +inf."""
    weights = np.empty_like(x)
    top = x.max()
    _weigh(x, top, 1.0, weights)
    return top + math.log(_sum(weights))


@_called_by_python
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
