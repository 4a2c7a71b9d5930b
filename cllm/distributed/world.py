"""The processes of a run as each of them sees them: who it is, and what all of them agree on.

Numbers travel as tensors. Small values (how a run is resumed, what a process has written) travel as JSON through the store that the launcher
keeps, never as pickles.
"""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


@dataclass
class World:
    """This process and the others of its run. Every method is called by all processes together and returns the same in all of them."""

    rank: int  # the number of this process, over all machines
    size: int  # how many processes there are
    local_rank: int  # the number of this process on its machine
    local_size: int
    device: torch.device  # where this process computes
    store: Any  # torch.distributed.Store, for small values
    timeout: float  # seconds after which a process that does not answer ends the run
    patient: Any = None  # a group of the same processes that waits for days; None: the default group
    _values: int = 0  # how many values have gone through the store: the next one's key

    @property
    def leads(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def sums(self, values: Sequence[float], group: Any = None) -> list[float]:
        """Each value summed over the processes in float64, in the order of ranks: exact for whole numbers, the same bits everywhere for others."""
        import torch

        first, *others = gathered(torch.tensor(values, dtype=torch.float64), self.size, group)
        for row in others:
            first += row
        return first.tolist()

    def largest(self, value: float) -> float:
        """The largest value that any process gives."""
        import torch

        return float(gathered(torch.tensor([value], dtype=torch.float64), self.size).max())

    def agreed(self, asked: str | None) -> str | None:
        """The name of the signal that asked any of the processes to stop (`asked` is what this one received), so that all stop together."""
        number = int(self.largest(0 if asked is None else signal.Signals[asked]))
        return signal.Signals(number).name if number else None

    def from_first(self, make: Callable[[], Any]) -> Any:
        """What `make` returns in the first process, which must be JSON. The others wait for as long as that process lives: tokenizing takes hours."""
        self._values += 1
        key = f"value/{self._values}"
        if self.leads:
            value = make()
            self.store.set(key, json.dumps(value))
        self.sums([0.0], self.patient)  # rather than polling the store: a connection that breaks ends this wait at once
        return value if self.leads else json.loads(self.store.get(key))

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of ranks; each must be JSON."""
        self._values += 1
        self.store.set(f"value/{self._values}/{self.rank}", json.dumps(value))
        self.sums([0.0])
        return [json.loads(self.store.get(f"value/{self._values}/{rank}")) for rank in range(self.size)]


def gathered(mine: torch.Tensor, size: int, group: Any = None) -> torch.Tensor:
    """The vectors (length,) of the `size` processes of `group` (None: all), as one tensor (size, length) in the order of ranks."""
    import torch.distributed as dist

    everyone = mine.new_empty(size * mine.numel())
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # its name since torch 2.13
    gather(everyone, mine.contiguous(), group=group)
    return everyone.view(size, -1)
