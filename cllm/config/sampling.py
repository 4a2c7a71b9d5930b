"""How the next token is chosen: the settings of `cllm generate` and `cllm chat`, of `cllm.generate`, and of whoever asks for text."""

from __future__ import annotations

from dataclasses import dataclass

from cllm.config.setting import setting, settings_of


@dataclass(frozen=True)
class Sampling:
    """Settings in the order in which they apply, which is Hugging Face's. Raises UserError for a value outside its limits."""

    temperature: float = setting(0.8, "Divides the logits; 0 always takes the likeliest token.", at_least=0.0, example=0.8)
    top_k: int | None = setting(None, "Choose among the k likeliest tokens. Default: all.", at_least=1, example=40)
    top_p: float | None = setting(
        None, "Choose among the likeliest tokens that together reach this probability. Default: all.", above=0.0, at_most=1.0, example=0.95
    )
    min_p: float | None = setting(
        None, "Drop tokens below this share of the likeliest one's probability. Default: none.", at_least=0.0, at_most=1.0, example=0.05
    )
    repetition_penalty: float = setting(1.0, "Above 1 makes tokens that occurred less likely; 1 changes nothing.", above=0.0, example=1.1)

    def __post_init__(self) -> None:
        for name, each in SAMPLING.items():
            object.__setattr__(self, name, each.checked(getattr(self, name)))


SAMPLING = settings_of(Sampling)
