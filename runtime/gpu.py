"""What one GPU has, and how many blocks a kernel gets on it: read from the device, or described where a kernel is only compiled.

Kernels choose tiles by these numbers, never by a product's name. The descriptions below serve compilation without a GPU alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any


@dataclass(frozen=True)
class GPU:
    """One GPU. Bytes and counts per multiprocessor unless they say otherwise."""

    name: str
    arch: int
    """Compute capability as one number: 80, 89, 90, 100; for AMD the digits of gfx."""
    num_sms: int
    shared_bytes: int
    """The most shared memory that one block may ask for."""
    shared_bytes_per_sm: int
    l2_bytes: int
    memory_bytes: int
    registers_per_sm: int = 65536
    threads_per_sm: int = 2048
    blocks_per_sm: int = 32
    warp_size: int = 32
    vendor: str = "nvidia"
    index: int = 0

    @property
    def is_hopper(self) -> bool:
        return self.vendor == "nvidia" and self.arch == 90

    def occupancy(self, registers: int, shared_bytes: int, num_warps: int) -> int:
        """Blocks that fit on one multiprocessor at once; `registers` per thread, allocated in units of 8 per thread."""
        threads = num_warps * self.warp_size
        limits = [self.blocks_per_sm, self.threads_per_sm // threads]
        if registers:
            limits.append(self.registers_per_sm // (-(-registers // 8) * 8 * threads))
        if shared_bytes:
            limits.append(self.shared_bytes_per_sm // (shared_bytes + 1024))  # the driver keeps 1 KiB of each block
        return max(0, min(limits))

    def persistent_blocks(self, num_tiles: int, blocks_per_sm: int = 1) -> int:
        """The grid of a kernel whose blocks walk over tiles: as many as run at once, and never more than there are tiles."""
        return max(1, min(num_tiles, self.num_sms * blocks_per_sm))


_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30
DESCRIBED = {
    "a100": GPU("described: A100", 80, 108, 163 * _KIB, 164 * _KIB, 40 * _MIB, 80 * _GIB),
    "rtx4090": GPU("described: RTX 4090", 89, 128, 99 * _KIB, 100 * _KIB, 72 * _MIB, 24 * _GIB, threads_per_sm=1536, blocks_per_sm=24),
    "h200": GPU("described: H200", 90, 132, 227 * _KIB, 228 * _KIB, 50 * _MIB, 141 * _GIB),
    "b200": GPU("described: B200", 100, 148, 227 * _KIB, 228 * _KIB, 126 * _MIB, 180 * _GIB),
}
# What the interpreter plays: few multiprocessors, so that persistent kernels walk over several tiles.
INTERPRETED = GPU("Triton's interpreter", 80, 3, 163 * _KIB, 164 * _KIB, 1 * _MIB, 1 * _GIB)

_described: ContextVar[GPU | None] = ContextVar("cllm_described_gpu", default=None)


@contextmanager
def described(gpu: GPU) -> Iterator[GPU]:
    """Everything inside the scope plans for `gpu`, whatever the machine has."""
    token = _described.set(gpu)
    try:
        yield gpu
    finally:
        _described.reset(token)


@lru_cache(maxsize=64)
def _installed(index: int) -> GPU:
    import torch

    about: Any = torch.cuda.get_device_properties(index)
    amd = torch.version.hip is not None
    gfx = "".join(c for c in getattr(about, "gcnArchName", "").partition(":")[0] if c.isdigit())
    arch = int(gfx or 0) if amd else 10 * about.major + about.minor
    return GPU(
        name=about.name,
        arch=arch,
        num_sms=about.multi_processor_count,
        shared_bytes=getattr(about, "shared_memory_per_block_optin", 48 * _KIB) or 64 * _KIB,
        shared_bytes_per_sm=getattr(about, "shared_memory_per_multiprocessor", 64 * _KIB),
        l2_bytes=getattr(about, "L2_cache_size", 0),
        memory_bytes=about.total_memory,
        registers_per_sm=getattr(about, "regs_per_multiprocessor", 65536),
        threads_per_sm=about.max_threads_per_multi_processor,
        warp_size=getattr(about, "warp_size", 32),
        vendor="amd" if amd else "nvidia",
        index=index,
    )


def allows_tf32() -> bool:
    """Whether torch may multiply float32 matrices in tf32 on a GPU: `torch.backends.cuda.matmul.fp32_precision`, which every older switch sets too.

    `allow_tf32` is not read, because reading it raises once the newer setting was used.
    """
    import torch

    return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


RATE_SIZE, COPY_BYTES, RATE_CALLS = 8192, 1 << 30, 10


def measured_rates(device: Any) -> dict[str, float]:
    """GFLOP/s of a large square product in "fp32" (tf32 where torch allows it), "bf16" and "fp16", and GB/s of a large "copy", read plus written.

    Measured once for this GPU and torch, then kept; random data, for zeros raise the clock.
    """
    import torch

    from cllm.runtime import tuning

    def fastest(call: Any) -> float:
        call()
        seconds = []
        for _ in range(RATE_CALLS):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            stop.record()
            stop.synchronize()
            seconds.append(float(start.elapsed_time(stop)) / 1e3)
        return min(seconds)

    def measure() -> dict[str, float]:
        found = {}
        with torch.cuda.device(device), torch.no_grad():
            for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
                a, b = (torch.randn(RATE_SIZE, RATE_SIZE, device=device).to(dtype) for _ in range(2))
                found[name] = 2e-9 * RATE_SIZE**3 / fastest(lambda a=a, b=b: a @ b)
            source = torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
            target = torch.empty_like(source)
            found["copy"] = 2e-9 * COPY_BYTES / fastest(lambda: target.copy_(source))
        return found

    key = f"gpu rates|{torch.cuda.get_device_name(device)}|torch {torch.__version__}|tf32 {allows_tf32()}"
    names = {"fp32", "bf16", "fp16", "copy"}
    return dict(tuning.remembered(key, measure, lambda value: isinstance(value, dict) and set(value) == names))


def gpu_of(device: Any) -> GPU:
    """The GPU of a torch.device: the described one where a scope is open, the installed one, or what the interpreter plays."""
    scope = _described.get()
    if scope is not None:
        return scope
    if device.type != "cuda":
        return INTERPRETED
    import torch

    if not torch.cuda.is_available():  # somebody asks what would run on one
        return INTERPRETED
    return _installed(torch.cuda.current_device() if device.index is None else device.index)


def multiplies_bf16(device: Any) -> bool:
    """Whether the GPU `device`, a torch.device, multiplies bfloat16 tiles in hardware; NVIDIA's before Ampere multiply float16 alone."""
    gpu = gpu_of(device)
    return gpu.vendor != "nvidia" or gpu.arch >= 80
