"""The optimizers beside AdamW, each in a file that reads as its paper; what they share is in `cllm.optim`."""

from cllm.optimizers.lion import Lion
from cllm.optimizers.muon import Muon
from cllm.optimizers.schedule_free import ScheduleFreeAdamW

__all__ = ["Lion", "Muon", "ScheduleFreeAdamW"]
