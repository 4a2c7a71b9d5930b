"""What this machine has. Every number is read from the machine, none is assumed; what cannot be read is None or 0 and said so."""

from __future__ import annotations

import importlib.util
import os
import platform
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cllm.runtime import nvml, progress, toolchain
from cllm.runtime.errors import UserError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Device:
    """One place where kernels can run. `kind` is torch's device type; a GPU is one more entry of `devices()`."""

    kind: str
    name: str
    workers: int
    """Usable cores of a CPU, multiprocessors of a GPU."""
    memory_bytes: int
    features: tuple[str, ...] = ()
    """Instruction sets of a CPU, compute capability of a GPU."""
    cache_bytes: tuple[tuple[str, int], ...] = ()
    index: int = 0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"cache_bytes": dict(self.cache_bytes)}


def _read(path: str | Path) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _cgroup_folders(root: str, own: str | None) -> list[Path]:
    """This process's control group and all above it, in both versions of the interface."""
    folders = [Path(root), Path(root) / "cpu", Path(root) / "memory"]
    for line in (own or "").splitlines():
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        base = Path(root) if not controllers else Path(root) / controllers
        parts = Path(path.lstrip("/")).parts
        folders += [base.joinpath(*parts[:count]) for count in range(1, len(parts) + 1)]
    return folders


def cgroup_cpus(root: str = "/sys/fs/cgroup", own: str | None = None) -> float | None:
    """The CPU quota of the tightest control group in cores, or None where there is none."""
    limits = []
    for folder in _cgroup_folders(root, own if own is not None else _read("/proc/self/cgroup")):
        both = _read(folder / "cpu.max")
        old = (_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))
        quota, period = both.split()[:2] if both and len(both.split()) >= 2 else old
        try:
            if quota and period and int(quota) > 0 and int(period) > 0:
                limits.append(int(quota) / int(period))
        except ValueError:  # "max"
            continue
    return min(limits, default=None)


def cgroup_memory(root: str = "/sys/fs/cgroup", own: str | None = None) -> int | None:
    """The memory limit of the tightest control group in bytes, or None."""
    limits = []
    for folder in _cgroup_folders(root, own if own is not None else _read("/proc/self/cgroup")):
        for name in ("memory.max", "memory.limit_in_bytes"):
            text = _read(folder / name)
            if text and text.isdigit() and int(text) < 1 << 60:  # the old interface writes a huge number for "none"
                limits.append(int(text))
    return min(limits, default=None)


@lru_cache(maxsize=1)
def usable_cores() -> int:
    """Cores that this process may really use: its affinity mask, cut by the control group's quota (at least 1)."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroup_cpus()
    return max(1, min(cores, int(quota + 0.5))) if quota else cores


def _cpu_name() -> str:
    for line in (_read("/proc/cpuinfo") or "").splitlines():
        if line.startswith(("model name", "Model")):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _cpu_caches() -> tuple[tuple[str, int], ...]:
    """Bytes of each cache that core 0 reaches, smallest first: (("L1", 49152), ("L2", ...), ...)."""
    found: dict[str, int] = {}
    for folder in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = (_read(folder / name) or "" for name in ("level", "type", "size"))
        unit = {"K": 1 << 10, "M": 1 << 20}.get(size[-1:], 1)
        if kind != "Instruction" and size.rstrip("KM").isdigit():
            found[f"L{level}"] = int(size.rstrip("KM")) * unit
    return tuple(sorted(found.items()))


@lru_cache(maxsize=1)
def cpu() -> Device:
    from cllm.runtime import compiler

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    limit = cgroup_memory()
    wanted = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16", "neon", "sve", "bf16", "asimd")
    features = compiler.cpu_features()
    return Device(
        kind="cpu",
        name=_cpu_name(),
        workers=usable_cores(),
        memory_bytes=min(memory, limit) if limit else memory,
        features=tuple(name for name in wanted if name in features),
        cache_bytes=_cpu_caches(),
    )


def gpus() -> list[Device]:
    """GPUs that torch can use; none where torch was built without them."""
    import torch

    if not torch.cuda.is_available():
        return []
    found = []
    for index in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(index)
        found.append(Device("cuda", about.name, about.multi_processor_count, about.total_memory, (f"sm_{about.major}{about.minor}",), index=index))
    return found


def devices() -> list[Device]:
    return [cpu(), *gpus()]


def available_memory() -> int:
    """Bytes that can be had now without swapping, under the control group's limit."""
    import psutil

    free = psutil.virtual_memory().available
    limit = cgroup_memory()
    return min(free, max(0, limit - psutil.Process().memory_info().rss)) if limit else free


def operating_system() -> str:
    return f"{platform.system()} {platform.release()} ({platform.machine()}), Python {sys.version.split()[0]}"


# -- where a model runs ----------------------------------------------------------------------------------------------------

CHOICES = ("auto", "cpu", "cuda")


def resolve(asked: str) -> tuple[torch.device, str]:
    """The device for "auto", "cpu" or "cuda", and why. Of several GPUs the one with the most free memory; CUDA_VISIBLE_DEVICES narrows the choice.

    A GPU becomes the current device of the process, so that nothing is put on another one. Raises UserError for a GPU that is asked for and
    cannot be used.
    """
    import torch

    kind, why = resolve_kind(asked)
    if kind == "cpu":
        return torch.device("cpu"), why
    index, why = _freest_gpu(torch.cuda.device_count())
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device, f"{torch.cuda.get_device_name(device)}, {why}"


def resolve_kind(asked: str) -> tuple[str, str]:
    """The kind of device for "auto", "cpu" or "cuda", which is "cpu" or "cuda", and why it is the CPU. UserError as in `resolve`."""
    if asked not in CHOICES:
        raise UserError(f"device must be one of {', '.join(CHOICES)}, got {asked!r}. Choose among GPUs with CUDA_VISIBLE_DEVICES.")
    if asked == "cpu":
        return "cpu", "asked for"
    obstacle = _obstacle()
    if obstacle and asked == "cuda":
        raise UserError(f"--device cuda: {obstacle}. Use --device cpu, or install what is missing.")
    if obstacle and _sees_a_gpu():
        _warn_of_unused_gpu(obstacle)
    return ("cpu", obstacle) if obstacle else ("cuda", "")


@lru_cache(maxsize=1)
def _freest_gpu(count: int) -> tuple[int, str]:
    """The GPU with the most free memory, and how much that is, when it is first asked for: a process keeps to one. NVML is asked, since torch would
    take some memory of each GPU to tell."""
    if count == 1:
        free = nvml.free_memory(0)
        return 0, "the only GPU" if free is None else f"{free / 2**30:.0f} GiB free"
    free_bytes = [nvml.free_memory(index) or 0 for index in range(count)]
    if not any(free_bytes):
        return 0, f"the first of {count} GPUs, whose free memory is not known; CUDA_VISIBLE_DEVICES chooses another one"
    index = max(range(count), key=free_bytes.__getitem__)
    return index, f"{free_bytes[index] / 2**30:.0f} GiB free, the most of {count} GPUs"


def _sees_a_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def _obstacle() -> str:
    """Why no GPU can be used; empty where one can."""
    import torch

    if not _sees_a_gpu():
        built = torch.version.cuda or torch.version.hip
        return "no GPU is visible to PyTorch" if built else "this PyTorch was built without GPU support"
    if importlib.util.find_spec("triton") is None:
        return "Triton, which the GPU kernels need, is not installed (pip install triton)"
    return toolchain.obstacle()


@lru_cache(maxsize=1)
def _warn_of_unused_gpu(obstacle: str) -> None:
    progress.say(f"warning: the GPU is not used and everything runs on the CPU: {obstacle}.")


def free_memory(device: torch.device) -> int:
    """Bytes that can be had on `device` now."""
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
