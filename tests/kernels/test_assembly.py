"""What is read from PTX and SASS: each rule on a few lines that keep it and on the same lines with one mistake."""

import pytest

pytest.importorskip("triton")

from cllm.kernels import assembly

ORDERLY = """
    bar.sync 1, 128;
    @%p12 mbarrier.arrive.shared::cta.b64 _, [%r1];
    mbarrier.try_wait.parity.shared::cta.b64 complete, [%r2], %r3;
    wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, 1, 1, 1, 0, 0;
    wgmma.wait_group.sync.aligned 1;
    st.shared.b32 [%r4], %r5;
    fence.proxy.async.shared::cta;
    bar.sync 2, 128;
    @%p1 cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%rd3, {%r1}], [%r6];
    cp.async.bulk.wait_group.read 0;
    bar.sync 0, 128;
    @%p2 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 32768;
    bar.sync 0, 128;
    @%p2 cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%r7], [%rd3, {%r1}], [%r8];
"""


def test_accesses_that_follow_their_barrier_are_in_order():
    assert assembly.unordered_accesses(ORDERLY) == []
    waited = ORDERLY.replace("bar.sync 2, 128", "mbarrier.try_wait.parity.shared::cta.b64 complete, [%r2], %r3")
    assert assembly.unordered_accesses(waited) == []


@pytest.mark.parametrize(
    ("barrier", "found"),
    [
        ("    bar.sync 1, 128;\n", "an arrival at an mbarrier after nothing"),
        ("    bar.sync 2, 128;\n", "a copy out of shared memory after fence.proxy"),
        ("    bar.sync 0, 128;\n", "a copy into shared memory after mbarrier.arrive.expect_tx"),
    ],
)
def test_a_barrier_that_is_missing_is_found(barrier, found):
    assert assembly.unordered_accesses("".join(ORDERLY.split(barrier))) == [found]


def _sass(*instructions: str) -> str:
    return "\n".join(
        f"        /*{16 * index:04x}*/                   {each} ;        /* 0x000fe20000000f00 */" for index, each in enumerate(instructions)
    )


GRANTED = (
    "S2R R250, SR_TID.X", "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8", "FADD R231, R4, R5", "@P0 FMUL R7, R231.reuse, R8",
    "USETMAXREG.DEALLOC.CTAPOOL 0x28", "IADD3 R39, R1, R2, RZ",
)  # fmt: skip


def test_registers_stay_below_what_was_granted():
    assert assembly.registers_over_limit(_sass(*GRANTED)) == []
    over = _sass(*GRANTED, "IADD3 R40, R1, R2, RZ")
    assert assembly.registers_over_limit(over) == ["R40 behind USETMAXREG.DEALLOC.CTAPOOL 0x28"]
    assert len(assembly.registers_over_limit(_sass(*GRANTED[:3], "FADD R232, R4, R5", *GRANTED[3:]))) == 1


def test_local_memory_is_counted_and_nothing_else():
    assert assembly.local_accesses(_sass(*GRANTED, "LDS R1, [R2]", "STG.E [R2], R3", "LDC R1, c[0x0][0x28]")) == 0
    assert assembly.local_accesses(_sass("STL [R1], R0", "@!P3 LDL.LU R2, [R1+0x4]", "@UP0 LDL R2, [R1]", "FADD R1, R2, R3")) == 3


def test_exponentials_run_beside_a_product_that_is_left_running():
    exponential, one, all_ = "MUFU.EX2 R1, R2", "WARPGROUP.DEPBAR.LE gsb0, 0x1", "WARPGROUP.DEPBAR.LE gsb0, 0x0"
    assert assembly.exponentials(_sass(exponential, one, exponential, "@!P1 MUFU.EX2 R3, R4", all_)) == (2, 1)
    assert assembly.exponentials(_sass(one, all_, exponential, exponential, one, exponential, one, exponential, all_, "MUFU.LG2 R1, R2")) == (2, 2)


def test_the_narrowest_product_is_found():
    assert assembly.narrowest_wgmma("") == 0
    assert assembly.narrowest_wgmma(ORDERLY) == 128
    assert assembly.narrowest_wgmma(ORDERLY + ORDERLY.replace("m64n128k16", "m64n16k16")) == 16
