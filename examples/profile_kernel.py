"""One kernel from a script: which backend runs and why, how long it takes beside PyTorch, and a trace to look at.

python examples/profile_kernel.py [--rows 1024 --columns 1024 --out trace.json]
"""

import argparse
import statistics
import time
from pathlib import Path

import torch

from cllm import runtime
from cllm.kernels import softmax

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--rows", type=int, default=1024)
parser.add_argument("--columns", type=int, default=1024)
parser.add_argument("--rounds", type=int, default=20)
parser.add_argument("--out", type=Path, default=Path("trace.json"))
options = parser.parse_args()

x = torch.randn(options.rows, options.columns)
print(runtime.explain("softmax", tuple(x.shape)))

ours, theirs = softmax(x), torch.softmax(x, -1)  # the first call compiles; a wrong result is not worth timing
torch.testing.assert_close(ours, theirs)

# The two take turns, so that a machine whose speed drifts favours neither; medians ignore what other programs did meanwhile.
seconds: dict[str, list[float]] = {"cllm": [], "torch": []}
for _ in range(options.rounds):
    for name, call in (("cllm", lambda: softmax(x)), ("torch", lambda: torch.softmax(x, -1))):
        began = time.perf_counter()
        call()
        seconds[name].append(time.perf_counter() - began)
for name, each in seconds.items():
    print(f"{name:6} {statistics.median(each) * 1e6:10.1f} us")

# Every kernel that runs inside is recorded by its name. The file opens in ui.perfetto.dev.
with runtime.profiler.record() as recording:
    softmax(x)
for event in recording.kernels():
    print(f"{event.name}: {(event.end_ns - event.start_ns) / 1e3:.1f} us on backend {event.backend}")
recording.save(options.out)
print(f"The trace is in {options.out}.")
