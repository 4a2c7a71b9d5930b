"""Attention as torch itself ships it, as a backend of its own ("sdpa"): chosen where it was measured to be faster.

What torch's kernels cannot do is done by ours, and where no others can by the Triton ones, whose limits are therefore the limits of this backend.
"""

from dataclasses import replace

from cllm.kernels import triton

BACKEND = replace(
    triton.BACKEND,
    package=__name__,
    priority={"cuda": 80} | ({"cpu": -2} if triton.INTERPRETED else {}),
    reason="torch's own attention: cuDNN or flash",
)
