"""The optimizers, each in a file that reads as its paper; `base` holds what they share, `choice` finds one by its name."""

from cllm.train.optimizers.adamw import AdamW
from cllm.train.optimizers.base import Optimizer
from cllm.train.optimizers.choice import make_optimizer
from cllm.train.optimizers.lion import Lion
from cllm.train.optimizers.muon import Muon
from cllm.train.optimizers.schedule_free import ScheduleFreeAdamW

__all__ = ["AdamW", "Lion", "Muon", "Optimizer", "ScheduleFreeAdamW", "make_optimizer"]
