"""Compile every Triton and Gluon kernel that the library can launch, for GPUs that need not be there, and say what the compiler made of it.

    python profiling/compile_lint.py                        # all kernels, all described GPUs
    python profiling/compile_lint.py --gpu h200 attention   # one GPU, one file of kernels
    python profiling/compile_lint.py --few                  # each value of each kernel's constants once, not every combination
    python profiling/compile_lint.py --largest              # one launch of each kernel, that with the largest tiles

Exit status 1 when a kernel spills registers, asks for more shared memory than a block has, does not use wgmma on sm_90, or is serialised by
ptxas (C75xx).
"""

import argparse
import json
import os
import sys

import report


def main() -> None:
    os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing
    from cllm.kernels import inspection
    from cllm.runtime.gpu import DESCRIBED

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("modules", nargs="*", help=f"files of kernels/triton: {', '.join(inspection.MODULES)} (default: all)")
    parser.add_argument("--gpu", action="append", choices=list(DESCRIBED), help="may be given again (default: all)")
    names = [str(dtype).removeprefix("torch.") for dtype in inspection.DTYPES]
    parser.add_argument("--dtype", action="append", choices=names, help="may be given again (default: all)")
    extent = parser.add_mutually_exclusive_group()
    few, largest = inspection.covering, inspection.largest
    extent.add_argument(
        "--few", dest="choose", action="store_const", const=few, help="only so many that each kernel meets each value of its constants"
    )
    extent.add_argument("--largest", dest="choose", action="store_const", const=largest, help="only the launch of each kernel with the largest tiles")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", action="store_true", help="the last line is one JSON object")
    options = parser.parse_args()
    dtypes = tuple(dtype for dtype, name in zip(inspection.DTYPES, names) if name in (options.dtype or names))
    gpus, modules = tuple(options.gpu or DESCRIBED), tuple(options.modules) or inspection.MODULES
    builds = inspection.build_all(gpus, modules, dtypes, options.processes, options.choose or list)
    rows, wrong = [], []
    for gpu, build in builds:
        complaints = inspection.complaints(build, gpu)
        wrong += [(build, complaint) for complaint in complaints]
        rows.append(
            (
                f"{build.kernel} {build.options}"[:100], build.target, build.call, str(build.registers), str(build.shared_bytes),
                str(build.num_warps), str(build.occupancy), "wgmma" if build.wgmma else "mma" if build.mma else "-", "; ".join(complaints)[:60],
            )
        )  # fmt: skip
    report.print_table(("kernel", "target", "first met in", "registers", "shared", "warps", "blocks/SM", "matrix", "complaints"), rows)
    for build, complaint in wrong:
        print(f"wrong: {build.kernel} on {build.target} ({build.call}; {build.options}): {complaint}", file=sys.stderr)
    print(f"{len(builds)} builds, {len({id(b) for b, _ in wrong})} with complaints")
    if options.json:
        print(json.dumps([{**vars(build), "complaints": inspection.complaints(build, gpu)} for gpu, build in builds]))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    report.run(main)
