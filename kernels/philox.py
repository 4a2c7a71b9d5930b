"""What dropout draws: Philox4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), in whole numbers of 32 bits.

The generator has no state. A draw is a function of the seed, the step, a place in the network, a token and an element, whoever computes it and in
whatever order. Element e of a token is drawn by the call with

    counter (e // 128 * 16 + e % 16, token, place, step), each modulo 2**32        key (seed % 2**32, seed // 2**32)

whose four words are eight numbers of 16 bits, the lower half of each word first; number e // 16 % 8 is the draw. So one call serves eight elements
that lie 16 apart, and calls side by side, as lanes of a vector, give vectors of neighbouring elements without any shuffling.

An element is dropped where its draw is below `threshold_of(rate)`, and multiplied by `scale_of(rate)` where it is kept.
"""

import torch
from torch import Tensor

LANES = 16  # calls side by side
SLOTS = 8  # draws of a call
GROUP = LANES * SLOTS  # elements that LANES calls draw
DRAW_BITS = 16
ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)  # added to the two words of the key after each round
_WORD, _HALF = 0xFFFFFFFF, 0xFFFF


def threshold_of(rate: float) -> int:
    """How many of the 2**16 draws drop an element, for a rate within (0, 1): the rate to five digits, and neither none nor all."""
    return min(max(round(rate * 2**DRAW_BITS), 1), 2**DRAW_BITS - 1)


def scale_of(rate: float) -> float:
    """What an element that is kept is multiplied by, so that its expected value stays what it was: 1 / (1 - the rate as it is drawn)."""
    return 2**DRAW_BITS / (2**DRAW_BITS - threshold_of(rate))


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of each counter under a key; int64 tensors of words from 0 to 2**32 - 1, which broadcast."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(ROUNDS):
        (high0, low0), (high1, low1) = _product(MULTIPLIERS[0], c0), _product(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + KEY_STEPS[0]) & _WORD, (k1 + KEY_STEPS[1]) & _WORD
    return c0, c1, c2, c3


def _product(multiplier: int, word: Tensor) -> tuple[Tensor, Tensor]:
    """The upper and the lower word of a product of two words, in two parts that int64 can hold."""
    lower, upper = multiplier * (word & _HALF), multiplier * (word >> 16)
    middle = upper + (lower >> 16)
    return middle >> 16, ((middle & _HALF) << 16) | (lower & _HALF)


def kept(key: Tensor, rate: float, place: Tensor | int, token: Tensor, element: Tensor) -> Tensor:
    """Whether each element is kept; place, token and element, of int64, broadcast. key: int64 (3,), as in `kernels.dropout`. A token is counted from
    the first one of `key`."""
    seed, step, first = key.unbind()
    place = torch.as_tensor(place, device=key.device)
    counter = (element // GROUP * LANES + element % LANES) & _WORD, (token + first) & _WORD, place & _WORD, step & _WORD
    words = torch.stack(torch.broadcast_tensors(*philox(counter, (seed & _WORD, (seed >> 32) & _WORD))), dim=-1)
    slot = (element // LANES % SLOTS).expand(words.shape[:-1])
    word = words.gather(-1, (slot // 2).unsqueeze(-1)).squeeze(-1)
    return ((word >> (slot % 2 * DRAW_BITS)) & _HALF) >= threshold_of(rate)
