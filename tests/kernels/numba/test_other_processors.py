"""The micro-kernels that stream weights compile for processors that this machine is not, to the instructions that they are written for."""

import json
import os
import re

import pytest
from command import python

pytest.importorskip("numba")

SCRIPT = """
import json, re, sys
features, target = json.loads(sys.argv[1]), sys.argv[2]
from cllm.runtime import compiler
compiler.cpu_features = lambda: frozenset(features)
compiler._llvm_features = lambda: dict.fromkeys(features, True)
import llvmlite.binding as llvm
llvm.get_host_cpu_name = lambda: target
import numba
from cllm.kernels.numba import integers, stream
from cllm.kernels.numba.llvm import HAS_PAIRS
micros = [integers._make_micro(rows, bits) for rows in (1, 4) for bits in (8, 4)]
micros += [stream._make_micro(*shape, stream.BFLOAT16) for shape in ((1, 4), *stream.SHAPES)]
micros += [stream._make_micro(1, 4, stream.BFLOAT16, True)] * HAS_PAIRS
for number, micro in enumerate(micros):
    names = ", ".join("abcdefgh"[: 7 if number < 4 else 8])
    space = {"micro": micro}
    exec(f"def call({names}):\\n    micro({names})", space)
    call = numba.njit(space["call"], nogil=True)
    call.compile((numba.types.intp,) * len(names.split(", ")))
    if not features[0].startswith("neon"):
        print(next(iter(call.inspect_asm().values())))
        continue
    # Compiled for this machine in vectors of 128 bits; the same intermediate code for the other one.
    code = re.sub('target (triple|datalayout) = ".*"|attributes #\\\\d+ = .*|#\\\\d+', "", next(iter(call.inspect_llvm().values())))
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    machine = llvm.Target.from_triple("aarch64-unknown-linux-gnu").create_target_machine(cpu=target, opt=3)
    print(machine.emit_assembly(llvm.parse_assembly(code)))
"""
AVX2 = ["avx", "avx2", "fma", "f16c", "sse2"]
AVX512 = [*AVX2, "avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"]


@pytest.mark.parametrize(
    ("features", "target", "instructions"),
    [
        (AVX2, "haswell", (r"vpmaddwd\s.*%ymm", r"vfmadd231ps\s.*%ymm")),
        (AVX512, "skylake-avx512", (r"vpmaddwd\s.*%zmm", r"vfmadd231ps\s.*%zmm")),
        ([*AVX512, "avx512vnni", "avx512bf16"], "sapphirerapids", (r"vpdpwssd\s.*%zmm", r"vdpbf16ps\s.*%zmm", r"vfmadd231ps\s.*%zmm")),
        (["neon"], "neoverse-n1", (r"mla\s+v\d+\.4s", r"fmla\s+v\d+\.4s")),
    ],
    ids=["avx2", "avx512", "avx512_vnni_bf16", "neon"],
)
def test_streamed_products_compile_to_the_instructions_of(features, target, instructions, tmp_path):
    if os.uname().machine != "x86_64":
        pytest.skip("numba compiles for the machine's own family of processors")
    lanes = {} if target != "neoverse-n1" else {"CLLM_SIMD_LANES": "4"}
    done = python("-c", SCRIPT, json.dumps(features), target, CLLM_CACHE_DIR=str(tmp_path), **lanes)
    assert done.status == 0, done.err[-3000:]
    missing = [each for each in instructions if not re.search(each, done.out)]
    assert not missing, f"{target} is not given {missing}"
