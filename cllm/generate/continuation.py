"""One sample of a generation while it grows: its tokens, its random numbers, its text and where it stops."""

from collections.abc import Sequence
from typing import Any

import torch


class StopFilter:
    """Passes text on until a stop string appears; holds back an end that could still become one."""

    def __init__(self, stop: Sequence[str]) -> None:
        self.stop = stop
        self.held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """More text -> what is certain to stand before any stop string."""
        self.held += text
        found = [index for index in (self.held.find(stop) for stop in self.stop) if index >= 0]
        if found:
            self.stopped = True
            return self.held[: min(found)]
        return self._release(self._possible_start())

    def push_text(self, text: str) -> str:
        """More text in which no stop string may end; one may begin in it."""
        self.held += text
        return self._release(self._possible_start())

    def flush(self) -> str:
        """The end of the text: what was held back was no stop string."""
        return self._release(len(self.held))

    def _release(self, count: int) -> str:
        released, self.held = self.held[:count], self.held[count:]
        return released

    def _possible_start(self) -> int:
        """Where the longest end of the held text begins that is also the beginning of a stop string."""
        for start in range(max(0, len(self.held) - max(map(len, self.stop), default=0) + 1), len(self.held)):
            if any(stop.startswith(self.held[start:]) for stop in self.stop):
                return start
        return len(self.held)


class Continuation:
    """One sample while it grows: its tokens, its random numbers, its text. min_tokens: before so many a stop string is text like any other."""

    def __init__(self, index: int, seed: int, tokenizer: Any, stop: Sequence[str], min_tokens: int = 0) -> None:
        self.index, self._min_tokens = index, min_tokens
        self.tokens: list[int] = []
        self.text = ""
        self.finish_reason = ""
        self.seconds = 0.0
        # One generator per sample, far apart for neighbouring seeds: adding samples does not change the earlier ones.
        self.generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + index) % 2**63)
        self.decoder = tokenizer.stream_decoder()
        self.stop = StopFilter(stop)

    def add(self, token: int, eot: int | None, max_tokens: int) -> str:
        """Takes the next token; returns the text that became certain and sets finish_reason when this was the last."""
        if token == eot:
            return self.end("end")
        piece = self.take(token)
        if self.stop.stopped:
            return piece + self.end("stop")
        return piece + self.end("length") if len(self.tokens) == max_tokens else piece

    def take(self, token: int) -> str:
        """Takes the next token; returns the text that became certain. `stop.stopped` says afterwards whether a stop string appeared."""
        self.tokens.append(token)
        text = self.decoder.push(token)
        piece = self.stop.push_text(text) if len(self.tokens) < self._min_tokens else self.stop.push(text)
        self.text += piece
        return piece

    def end(self, reason: str) -> str:
        """There are no more tokens; returns what was held back. finish_reason is "stop" where a stop string appears only now."""
        piece = ""
        if not self.stop.stopped:
            piece = self.stop.push(self.decoder.finish())
        if not self.stop.stopped:
            piece += self.stop.flush()
        self.finish_reason = "stop" if self.stop.stopped else reason
        self.text += piece
        return piece
