"""What the compiler makes of a launch, without a GPU: registers, spills, shared memory, occupancy, matrix instructions, warnings of ptxas, and what
`assembly.py` finds in the instructions.

    with runtime.gpu.described(gpu), recording() as launches: forward(meta tensors)
    build(launches[0], gpu)

Builds are kept on disk under a hash of the compiled PTX's inputs, so that a second look costs nothing.
"""

import gc
import hashlib
import importlib
import io
import json
import math
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from cllm.kernels import assembly
from cllm.kernels.triton.launch import Launch, recording
from cllm.runtime import files, heap, tuning
from cllm.runtime.gpu import DESCRIBED, GPU, described

MODULES = (  # those of kernels/triton, unless another folder is named
    "softmax", "norm", "rotary", "embedding", "cross_entropy", "linear_cross_entropy", "matmul", "feed_forward", "attention", "cached_attention",
    "paged_attention", "quantized", "adamw", "update", "norm_dropout", "attention_dropout",
    "gluon.attention_forward", "gluon.attention_backward",
)  # fmt: skip
# Tiles of fewer rows than wgmma's 64: a decoding step has no more.
SMALL_TILES = ("attention_decode_kernel", "cached_attention_kernel", "paged_attention_kernel", "packed_kernel")
# A wgmma of fewer columns than these reads more of shared memory in a clock than it delivers: 64 rows of one operand for few columns of the other.
NARROWEST_WGMMA = 32
Choice = Callable[[Iterable[tuple[str, Launch]]], list[tuple[str, Launch]]]
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Build:
    """One kernel as compiled for one target. `error` is set, and the rest 0, where it did not compile."""

    kernel: str
    target: str
    call: str
    options: str
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    num_warps: int = 0
    occupancy: int = 0
    wgmma: int = 0
    mma: int = 0
    dots: int = 0
    wait_groups: tuple[int, ...] = ()
    narrowest_wgmma: int = 0
    exponentials: tuple[int, ...] = ()
    """Of a kernel with wgmma: how many stand beside a product that is left running, and how many elsewhere."""
    findings: tuple[str, ...] = ()
    """Of a warp-specialised kernel: accesses without the barrier they need, registers beyond what `setmaxnreg` grants, local memory."""
    warnings: tuple[str, ...] = field(default=())
    error: str = ""


def find_launches(gpu: GPU, modules: tuple[str, ...] = MODULES, dtypes: tuple[torch.dtype, ...] = DTYPES) -> Iterator[tuple[str, Launch]]:
    """Every kind of launch that the kernel files can plan for `gpu`, each once, with the call that makes it."""
    seen: set[Any] = set()
    for name in modules:
        module = importlib.import_module(f"cllm.kernels.{name}" if "." in name else f"cllm.kernels.triton.{name}")
        for dtype in dtypes:
            with described(gpu), recording() as launches:
                for call_name, call in module.launches(gpu, dtype):
                    launches.clear()
                    call()
                    for launch in launches:
                        key = _identity(launch)
                        if key not in seen:
                            seen.add(key)
                            yield f"{name}: {call_name} {str(dtype).removeprefix('torch.')}", launch


def _identity(launch: Launch) -> Any:
    return launch.kernel, launch.signature, tuple((n, str(v)) for n, v in launch.constants), launch.aligned, launch.num_warps, launch.num_stages


def covering(found: Iterable[tuple[str, Launch]]) -> list[tuple[str, Launch]]:
    """So few of the launches that each kernel still meets every value of each of its constants, argument types, warps and stages.

    Kernels have up to 72 combinations of these, and a mistake is mostly in what one value brings.
    """
    chosen = []
    of_kernel: dict[Any, list[tuple[set[Any], tuple[str, Launch]]]] = {}
    for each in found:
        of_kernel.setdefault(each[1].kernel, []).append((_values(each[1]), each))
    for launches in of_kernel.values():
        missing = set[Any]().union(*(values for values, _ in launches))
        while missing:
            values, best = max(launches, key=lambda launch: len(launch[0] & missing))
            missing -= values
            chosen.append(best)
    return chosen


def largest(found: Iterable[tuple[str, Launch]]) -> list[tuple[str, Launch]]:
    """Of each kernel in each file that launches it the one launch with the largest tiles, which needs most registers and shared memory."""
    chosen: dict[Any, tuple[float, tuple[str, Launch]]] = {}
    for each in found:
        call, launch = each
        size = math.prod(float(value) for _, value in launch.constants if isinstance(value, int) and value > 1) * launch.num_warps * launch.num_stages
        kind = call.partition(":")[0], launch.kernel
        if kind not in chosen or size > chosen[kind][0]:
            chosen[kind] = size, each
    return [each for _, each in chosen.values()]


def _values(launch: Launch) -> set[Any]:
    constants = {(name, str(getattr(value, "__name__", value))) for name, value in launch.constants}
    return {*constants, *launch.signature, ("warps", launch.num_warps), ("stages", launch.num_stages)}


def _source(launch: Launch) -> Any:
    positions = {name: index for index, name in enumerate(launch.kernel.arg_names)}
    constants = {(positions[name],): value for name, value in launch.constants}
    attributes = {(position,): [["tt.divisibility", 16]] for position in launch.aligned}
    kind: Any = ASTSource
    if type(launch.kernel).__module__.startswith("triton.experimental.gluon") or getattr(launch.kernel, "is_gluon", lambda: False)():
        from triton.experimental.gluon._runtime import GluonASTSource

        kind = GluonASTSource
    return kind(launch.kernel, dict(launch.signature), constants, attributes)


def build(launch: Launch, gpu: GPU, call: str = "") -> Build:
    """Compiles one launch for `gpu` and reads what ptxas says of it."""
    constants = ", ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in launch.constants)
    options = f"{constants} w{launch.num_warps} s{launch.num_stages}"
    about: dict[str, Any] = {"kernel": launch.name, "target": f"sm_{gpu.arch}", "call": call, "options": options}
    source = _source(launch)
    key = hashlib.sha256(f"3|{triton.__version__}|{gpu}|{source.hash()}|{launch.num_warps}|{launch.num_stages}".encode()).hexdigest()
    kept = tuning.cache_dir() / "gpu-builds" / f"{key}.json"
    try:
        return _read({**about, **json.loads(kept.read_text())})
    except (OSError, ValueError, TypeError):
        pass
    found = _compile(source, launch, gpu)
    with suppress(OSError):  # a cache that cannot be written costs only the next build
        files.write_file(kept, json.dumps(found).encode())
    return _read({**about, **found})


def _read(values: dict[str, Any]) -> Build:
    fields: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
    return Build(**fields)


def _compile(source: Any, launch: Launch, gpu: GPU) -> dict[str, Any]:
    target = GPUTarget("cuda", gpu.arch, gpu.warp_size)
    log = io.StringIO()
    try:
        # Triton prints what ptxas says of the compilation that will run; a kernel out of its cache would say nothing.
        with triton.knobs.nvidia.scope(), triton.knobs.compilation.scope(), redirect_stdout(log):
            triton.knobs.nvidia.dump_ptxas_log = triton.knobs.compilation.always_compile = True
            compiled = triton.compile(source, target=target, options={"num_warps": launch.num_warps, "num_stages": launch.num_stages})
    except Exception as error:  # whatever the compiler raises is the finding
        return {"error": f"{type(error).__name__}: {str(error)[-800:]}", "num_warps": launch.num_warps}
    said, ptx = log.getvalue(), compiled.asm["ptx"]
    specialised = "setmaxnreg" in ptx
    sass = _disassembly(compiled.asm["cubin"]) if specialised else ""
    findings = [*assembly.unordered_accesses(ptx), *assembly.registers_over_limit(sass)] if specialised else []
    if assembly.local_accesses(sass):
        findings.append(f"{assembly.local_accesses(sass)} loads and stores of local memory")
    registers = max(map(int, re.findall(r"Used (\d+) registers", said)), default=0)
    spills = sum(map(int, re.findall(r"(\d+) bytes spill (?:stores|loads)", said)))
    num_warps = int(getattr(compiled.metadata, "num_warps", launch.num_warps))
    threads = re.search(r"\.reqntid +(\d+)", ptx)
    if threads:  # warp specialisation adds warps
        num_warps = int(threads.group(1)) // gpu.warp_size
    shared = int(compiled.metadata.shared)
    return {
        "registers": registers,
        "spill_bytes": spills,
        "shared_bytes": shared,
        "num_warps": num_warps,
        "occupancy": gpu.occupancy(registers, shared, num_warps),
        "wgmma": ptx.count("wgmma.mma_async"),
        "mma": len(re.findall(r"\bmma\.sync|tcgen05\.mma", ptx)),
        "dots": compiled.asm["ttir"].count("tt.dot ") if "ttir" in compiled.asm else 0,
        "wait_groups": tuple(sorted({int(n) for n in re.findall(r"wgmma\.wait_group\.sync\.aligned (\d+)", ptx)})),
        "narrowest_wgmma": assembly.narrowest_wgmma(ptx),
        "exponentials": assembly.exponentials(sass) if specialised else (),
        "findings": tuple(dict.fromkeys(findings)),
        "warnings": tuple(sorted({line.strip()[:300] for line in said.splitlines() if re.search(r"C75\d\d", line)})),
    }


def _disassembly(cubin: bytes) -> str:
    """The machine instructions (SASS) of a compiled kernel, as text."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "kernel.cubin").write_bytes(cubin)
        dump: list[str | Path] = [Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump", "-sass", "kernel.cubin"]
        return subprocess.run(dump, cwd=folder, capture_output=True, text=True, check=True).stdout


def complaints(build: Build, gpu: GPU) -> list[str]:
    """What is wrong with a build; nothing where it is fit to run. IEEE float32 attention of large heads, which no matrix unit computes, may spill."""
    if build.error:
        return [f"does not compile: {build.error}"]
    wrong = []
    if build.spill_bytes and not ("ieee" in build.options and re.search("BLOCK_D=(128|256)", build.options)):
        wrong.append(f"{build.spill_bytes} bytes of registers spilled")
    if build.shared_bytes > gpu.shared_bytes:
        wrong.append(f"{build.shared_bytes} bytes of shared memory, a block has {gpu.shared_bytes}")
    if not build.occupancy:
        wrong.append("not one block fits on a multiprocessor")
    if gpu.is_hopper and build.mma and "ieee" not in build.options and build.kernel not in SMALL_TILES:
        wrong.append("a matrix product that is not wgmma")
    if build.wgmma and build.narrowest_wgmma < NARROWEST_WGMMA and build.kernel not in SMALL_TILES:
        wrong.append(f"a wgmma of {build.narrowest_wgmma} columns, for which shared memory is too slow")
    if build.exponentials and build.exponentials[1] > _exponentials_before_any_product(build):
        wrong.append(f"{build.exponentials[1]} exponentials wait for products to end, {build.exponentials[0]} run beside them")
    return [*wrong, *build.findings, *build.warnings]


def _exponentials_before_any_product(build: Build) -> int:
    """The softmax of a tile's first block of keys in Gluon's forward pass, for which nothing runs yet: of 64 rows in each of two warpgroups."""
    keys = re.search(r"\bKEYS=(\d+)", build.options)
    if build.kernel != "attention_forward_kernel" or keys is None:
        return 0
    of_scores = int(keys[1]) // 2 * (2 if "SOFTCAP=True" in build.options else 1)
    return 2 * (of_scores + 2)


_shared: list[tuple[GPU, str, Launch]] = []


def _share(found: list[tuple[GPU, str, Launch]]) -> None:
    """In a process that builds. What all of them have in common is there to stay; what a build frees, the next one takes."""
    _shared[:] = found
    gc.freeze()
    heap.keep_freed_memory()


def _one(index: int) -> dict[str, Any]:
    gpu, call, launch = _shared[index]
    return asdict(build(launch, gpu, call))


def build_all(
    gpus: tuple[str, ...] = tuple(DESCRIBED),
    modules: tuple[str, ...] = MODULES,
    dtypes: tuple[torch.dtype, ...] = DTYPES,
    processes: int = 2,
    choose: Choice = list,
) -> list[tuple[GPU, Build]]:
    """Every launch for every described GPU, or those that `choose` (`covering`, `largest`) takes of a GPU's launches, compiled in parallel."""
    found = [(DESCRIBED[name], call, launch) for name in gpus for call, launch in choose(find_launches(DESCRIBED[name], modules, dtypes))]
    # Forked, because launches hold functions, which do not travel: each process would import all and find all again.
    with ProcessPoolExecutor(processes, mp_context=get_context("fork"), initializer=_share, initargs=(found,)) as pool:
        return [(gpu, _read(values)) for (gpu, _, _), values in zip(found, pool.map(_one, range(len(found))))]
