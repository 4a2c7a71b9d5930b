"""The optimizers beside AdamW, each in a file that reads as its paper; what they share is in `cllm.train.optimizers.base`."""

from cllm.train.optimizers.lion import Lion
from cllm.train.optimizers.muon import Muon
from cllm.train.optimizers.schedule_free import ScheduleFreeAdamW

__all__ = ["Lion", "Muon", "ScheduleFreeAdamW"]
