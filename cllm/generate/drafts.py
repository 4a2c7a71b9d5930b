"""Guesses of the tokens that come next, taken from what the text repeats of itself; the model checks several in one step.

Prompt lookup (Saxena 2023; the n-grams of Fu et al. 2024, arXiv 2402.02057): what followed the last time that the newest tokens stood together is
likely to follow again, in code, tables, quotations and names. A guess changes nothing but speed: each token is chosen from the model's logits as
it would be without guesses, and a guess counts only where it is that token.
"""

from collections.abc import Sequence

GRAM = 3  # tokens that have to be the same
MOST = 7  # guesses in one step
_PATIENCE = 3  # steps without a right guess before guessing pauses
_PAUSE = 16  # tokens of the first pause; every further one is twice as long
_LONGEST_PAUSE = 512


class Trust:
    """How many guesses are worth making: more of them after right ones, fewer and at last none for a while after wrong ones."""

    def __init__(self) -> None:
        self._size, self._failures, self._pause, self._resting = 2, 0, _PAUSE, 0

    def allows(self, most: int) -> int:
        """Guesses in the next step, at most so many."""
        if self._resting > 0:
            self._resting -= 1
            return 0
        return min(most, self._size)

    def learn(self, guessed: int, right: int) -> None:
        """How many of the last guesses were right, counted from the first one up to the first wrong one."""
        if not guessed:
            return
        if right == guessed:
            self._size, self._failures, self._pause = min(MOST, 2 * self._size), 0, _PAUSE
        elif right:
            self._size, self._failures = max(1, right), 0
        else:
            self._size, self._failures = 1, self._failures + 1
            if self._failures >= _PATIENCE:
                self._failures, self._resting, self._pause = 0, self._pause, min(_LONGEST_PAUSE, 2 * self._pause)


class Drafts:
    """Guesses for one text while it grows."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}  # the tokens of a gram -> where the token behind it stands
        self._indexed = GRAM  # tokens whose grams are in `_after`
        self.trust = Trust()

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `tokens`, which has only grown since the last call."""
        for end in range(self._indexed, len(tokens)):
            self._after[tuple(tokens[end - GRAM : end])] = end
        self._indexed = max(self._indexed, len(tokens))
        size = self.trust.allows(most)
        begin = self._after.get(tuple(tokens[-GRAM:])) if size > 0 and len(tokens) >= GRAM else None
        if begin is None:
            return []
        found: list[int] = []
        for place in range(begin, begin + size):  # a short period goes on with the guesses themselves
            found.append(tokens[place] if place < len(tokens) else found[place - len(tokens)])
        return found
