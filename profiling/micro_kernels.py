"""Where a matrix product on the CPU loses time: its innermost loop, instruction by instruction, and what packing and the rest add to it.

    python profiling/micro_kernels.py                    # this machine, all cores
    python profiling/micro_kernels.py --threads 1 --json

First table: the compiled innermost loop of each micro-kernel by kinds of instruction (counted in the machine code), and its rate on operands that
lie in the L1 cache. Second table: a whole product against the same with B packed beforehand, and against torch.mm, interleaved; "micro-kernel
share" is the rate of the whole product by that of the innermost loop on as many cores.
"""

import argparse
import re
import time

import plots
import report
import torch

SHAPES = ((256, 768, 3072), (1024, 768, 2304), (4096, 384, 1536), (4096, 768, 3072), (768, 128, 512))


def innermost_loop(assembly: str) -> dict[str, int]:
    """Instructions between a label and the jump back to it, for the loop without loops inside that multiplies most."""
    lines = [line.strip() for line in assembly.splitlines()]
    place = {line[:-1]: number for number, line in enumerate(lines) if line.endswith(":")}
    best: dict[str, int] = {}
    for number, line in enumerate(lines):
        jump = re.match(r"j\w+\s+(\.\S+)$", line)
        if not jump or place.get(jump[1], number) >= number:
            continue
        body = [text for text in lines[place[jump[1]] + 1 : number + 1] if text and not text.endswith(":") and not text.startswith((".", "#"))]
        if any(text.endswith(":") and not text.startswith(".Ltmp") for text in lines[place[jump[1]] + 1 : number]):
            continue
        kinds = {"multiply-add": 0, "load": 0, "broadcast": 0, "store": 0, "other": 0}
        for text in body:
            name = text.split()[0]
            if name.startswith(("vfmadd", "vdpbf16", "tdpbf16")):
                kinds["multiply-add"] += 1
                kinds["load"] += "(" in text  # an operand from memory
            elif name.startswith(("vbroadcast", "vpbroadcast")):
                kinds["broadcast"] += 1
            elif name.startswith(("vmov", "tileload")) and re.search(r"\(.*\),\s*%?\w+$", text):
                kinds["load"] += 1
            elif name.startswith(("vmov", "tilestore")):
                kinds["store"] += 1
            else:
                kinds["other"] += 1
        if kinds["multiply-add"] > best.get("multiply-add", 0):
            best = kinds
    return best


def _l1_loops(threads: int) -> dict[str, tuple[dict[str, int], float]]:
    """For each micro-kernel: (instructions of its loop, GFLOP/s on `threads` cores out of the L1 cache)."""
    import numba

    from cllm.kernels.numba import gemm_block, micro
    from cllm.kernels.numba.gemm import BLOCK_WORDS
    from cllm.kernels.numba.simd import W

    mr, nv, words = micro.MR, micro.NV, BLOCK_WORDS
    micro_n, tile_22 = gemm_block.micro_n, gemm_block.tile_22 if micro.HAS_TILES else None

    @numba.njit(nogil=True, parallel=True)
    def vectors(memory, stride, repeats, workers):
        for worker in numba.prange(workers):
            a = memory + worker * stride
            b = a + W * words * 4
            out = b + nv * W * words * 4
            for _ in range(repeats):
                micro_n(a, b, W * words * 4, 0, 0, out, nv * W * 4, words)

    def tiles_py(memory, stride, repeats, workers, config):
        for worker in numba.prange(workers):
            gemm_block.tiles_on(config)
            a = memory + worker * stride
            b = a + 2 * W * words * 4
            out = b + 2 * W * words * 4
            for _ in range(repeats):
                tile_22(a, W * words * 4, 64, 1024, b, W * words * 4, 0, 0, out, 2 * W * 4, words // W)
            gemm_block.tiles_off()

    stride = 256 << 10
    memory = torch.randn(threads * stride // 4 + 16)
    base = -(-memory.data_ptr() // 64) * 64
    found = {}
    contestants = [("fp32", vectors, 2.0 * mr * nv * W * words, ())]
    if tile_22 is not None:
        memory_half = torch.randn(threads * stride // 2 + 32).bfloat16()
        base_half = -(-memory_half.data_ptr() // 64) * 64
        tiles = numba.njit(nogil=True, parallel=True)(tiles_py)
        contestants.append(("amx", tiles, 2.0 * (2 * W) ** 2 * words * 2, (micro.CONFIGURATION,)))
    for name, call, flops, more in contestants:
        at, repeats = base if name == "fp32" else base_half, 20_000
        call(at, stride, 10, threads, *more)
        best = 1e9
        for _ in range(5):
            start = time.perf_counter()
            call(at, stride, repeats, threads, *more)
            best = min(best, time.perf_counter() - start)
        loop = max((innermost_loop(text) for text in call.inspect_asm().values()), key=lambda kinds: kinds.get("multiply-add", 0))
        found[name] = (loop, threads * repeats * flops / best / 1e9)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=15)
    report.add_output_options(parser)
    options = parser.parse_args()
    plots.check(options.plot)
    from cllm import runtime
    from cllm.kernels.numba.gemm import Packed, gemm, kernel_for
    from cllm.runtime.plan import use

    threads = options.threads or runtime.device.usable_cores()
    rows = []
    with use(threads=threads):
        loops = _l1_loops(threads)
        table = []
        for name, (kinds, rate) in loops.items():
            table.append((name, *(str(kinds[kind]) for kind in kinds), f"{rate:.0f}"))
            rows.append({"part": "micro-kernel", "kernel": name, **kinds, "gflops": rate, "threads": threads})
        report.print_table(("loop", "multiply-add", "load", "broadcast", "store", "other", "GFLOP/s from L1"), table)
        print()
        table = []
        for dtype in (torch.float32, torch.bfloat16):
            kernel = kernel_for(dtype)
            peak = loops[kernel][1] if kernel in loops else float("nan")
            for m, k, n in SHAPES:
                a, weight = torch.randn(m, k).to(dtype), torch.randn(n, k).to(dtype)
                packed = Packed(weight.t(), dtype, threads)
                out = torch.empty(m, n, dtype=dtype)
                seconds = report.interleaved(
                    {
                        "whole": lambda a=a, w=weight, o=out: gemm(a, w.t(), out=o, workers=threads),
                        "packed": lambda a=a, p=packed, o=out: gemm(a, p, out=o, workers=threads),
                        "torch": lambda a=a, w=weight, o=out: torch.mm(a, w.t(), out=o),
                    },
                    options.rounds,
                )
                rates = {name: 2e-9 * m * k * n / each for name, each in seconds.items()}
                row = {
                    "part": "product", "kernel": kernel, "shape": f"{m}x{k}x{n}", **{f"{who}_gflops": rate for who, rate in rates.items()},
                    "micro_share": rates["whole"] / peak, "packing": 1 - seconds["packed"] / seconds["whole"],
                    "ratio": rates["whole"] / rates["torch"],
                }  # fmt: skip
                rows.append(row)
                table.append((f"{kernel} {row['shape']}", f"{rates['whole']:.0f}", f"{rates['packed']:.0f}", f"{rates['torch']:.0f}",
                              f"{row['micro_share']:.0%}", f"{row['packing']:.0%}", f"{row['ratio']:.2f}"))  # fmt: skip
        report.print_table(("product", "whole GFLOP/s", "B packed before", "torch.mm", "micro-kernel share", "packing B", "ours/torch"), table)

    def draw(path):
        products = [row for row in rows if row["part"] == "product"]
        plots.bars(
            path, "Products against torch.mm", [f"{row['kernel']} {row['shape']}" for row in products],
            {"ours / torch.mm": [row["ratio"] for row in products]}, "ratio", line=1.0,
        )  # fmt: skip

    report.finish(options, rows, draw, threads)


if __name__ == "__main__":
    report.run(main)
