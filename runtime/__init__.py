"""The machine: what it has, how many workers and which backend an operation gets. Light to import: nothing is measured or compiled here.

with runtime.use(threads=4): ...          backend=, deterministic= likewise; CLLM_BACKEND and CLLM_THREADS do the same from outside
runtime.explain("attention", (1, 1024, 12, 64))
runtime.describe()
"""

from cllm.runtime import compiler, device, gpu, nvml, profiler, progress, threads, tree, tuning
from cllm.runtime.ceiling import Ceilings, ceilings, register_probe
from cllm.runtime.compiler import numba_setup
from cllm.runtime.describe import Report, describe, register_library
from cllm.runtime.errors import BackendError, CheckpointError, CLLMError, DataError, UserError
from cllm.runtime.plan import LaunchPlan, Settings, backends, carried, explain, plan, register_backend, register_operation, settings, use

__all__ = [
    "BackendError",
    "CLLMError",
    "Ceilings",
    "CheckpointError",
    "DataError",
    "LaunchPlan",
    "Report",
    "Settings",
    "UserError",
    "backends",
    "carried",
    "ceilings",
    "compiler",
    "describe",
    "device",
    "explain",
    "gpu",
    "numba_setup",
    "nvml",
    "plan",
    "profiler",
    "progress",
    "register_backend",
    "register_library",
    "register_operation",
    "register_probe",
    "settings",
    "threads",
    "tree",
    "tuning",
    "use",
]
