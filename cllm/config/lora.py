"""The settings of LoRA adapters, as a checkpoint of adapters carries them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cllm.runtime.errors import CheckpointError, UserError

TARGETS = ("all", "attention")


@dataclass(frozen=True)
class LoraConfig:
    """rank: that of the adapters, at least 1. alpha: their sum is multiplied by alpha / rank; 0 stands for 2 * rank. targets: which matrices get
    adapters, "all" of the blocks or those of "attention". base: the SHA-256 of the .cllm file with the frozen weights, "" where there is none.

    Raises UserError for a rank or targets that there cannot be.
    """

    rank: int
    alpha: float = 0.0
    targets: str = "all"
    base: str = ""

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"lora_rank must be at least 1, got {self.rank}.")
        if self.targets not in TARGETS:
            raise UserError(f"lora_targets must be one of {', '.join(TARGETS)}, got {self.targets!r}.")

    @property
    def scale(self) -> float:
        return (self.alpha or 2.0 * self.rank) / self.rank

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LoraConfig:
        try:
            return cls(**values)
        except TypeError as error:
            raise CheckpointError(f"the checkpoint's lora settings {values!r} are not known to this CLLM.") from error
