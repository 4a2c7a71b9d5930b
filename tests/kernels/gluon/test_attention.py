"""The Gluon attention kernels for Hopper. No GPU is needed: their bodies run under the model in `gluon_model.py`, and they compile for Hopper."""

import dataclasses
import importlib.util
import itertools
import json
from pathlib import Path

import pytest
import torch
from command import python

pytest.importorskip("triton.experimental.gluon")

from cllm.kernels.gluon import attention_backward as attention_hopper_backward
from cllm.kernels.gluon import attention_forward as attention_hopper
from cllm.kernels.torch import attention as reference
from cllm.kernels.triton import launch as launching
from cllm.runtime.gpu import DESCRIBED, described, gpu_of

H200 = DESCRIBED["h200"]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_spec = importlib.util.spec_from_file_location("cllm_gluon_model", Path(__file__).with_name("gluon_model.py"))
gluon_model = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gluon_model)


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def on_model(monkeypatch):
    """on_model(model, num_sms): launches of Gluon kernels go to the model, those of plain Triton to its interpreter or to the GPU."""
    scopes = []

    def enter(model, num_sms: int = 3) -> None:
        def launch(kernel, grid, *args, **options):
            if hasattr(kernel, "is_gluon"):
                model.launch(kernel, grid, *args, **options)
                return
            there = [each.to(DEVICE) if isinstance(each, torch.Tensor) else each for each in args]
            launching.launch(kernel, grid, *there, **options)
            for here, result in zip(args, there):
                if isinstance(here, torch.Tensor):
                    here.copy_(result)

        monkeypatch.setattr(attention_hopper, "launch", launch)
        monkeypatch.setattr(attention_hopper_backward, "launch", launch)
        scope = described(dataclasses.replace(H200, num_sms=num_sms))
        scope.__enter__()
        scopes.append(scope)

    yield enter
    for scope in reversed(scopes):
        scope.__exit__(None, None, None)


# ---- the schedule's formulas, against brute force ---------------------------------------------------------------------------------------


def plain(name: str, module=attention_hopper):
    """A jit function as Python runs it."""
    return gluon_model.Model().namespace(module.__name__, vars(module))[name]


def test_ring_visits_slots_in_turn():
    ring = plain("ring")
    for stages in (1, 2, 3, 4):
        for use in range(20):
            assert ring(use, stages) == (use % stages, use // stages % 2)


def test_every_tile_is_computed_once_and_the_longest_rows_first():
    rounds_of, tile_of, place_of = plain("rounds_of"), plain("tile_of"), plain("place_of")
    for programs, tiles_of_head, heads, section in itertools.product((1, 2, 3, 7, 132), (1, 2, 5), (1, 3, 8), (1, 2, 3, 8)):
        tiles = tiles_of_head * heads
        seen = []
        for program in range(programs):
            mine = [tile_of(turn, program, programs) for turn in range(rounds_of(program, programs, tiles))]
            assert mine == sorted(mine)
            seen += mine
        assert sorted(seen) == list(range(tiles))
        places = [place_of(tile, tiles_of_head, heads, section) for tile in range(tiles)]
        assert sorted(places) == list(itertools.product(range(tiles_of_head), range(heads)))
        for part in range(0, heads, section):  # within a section: falling rows, all heads side by side
            inside = [place for place in places if part <= place[1] < part + section]
            assert inside == sorted(inside, key=lambda place: (-place[0], place[1]))
            assert inside == places[places.index(inside[0]) :][: len(inside)]


def test_limits_and_blocks_are_those_of_the_mask():
    key_limits, query_limits = plain("key_limits"), plain("query_limits")
    spans, first_cut = plain("key_blocks_of"), plain("first_cut_key_block")
    query_spans = plain("query_blocks_of", attention_hopper_backward)
    first_whole = plain("first_whole_query_block", attention_hopper_backward)
    rows, block = 4, 3
    shapes = [(1, 1), (5, 5), (7, 13), (13, 7), (16, 16), (1, 9), (9, 1)]
    for (queries, keys), causal, window, bounds in itertools.product(shapes, (False, True), (0, 1, 2, 5), (None, (0, 3), (0, 0, 1, 5, 5, 99))):
        if window >= keys or (bounds and queries != keys):
            continue
        cu = None if bounds is None else torch.tensor([min(bound, keys) for bound in bounds], dtype=torch.int32)
        seen = reference._visible(queries, keys, causal, window, cu, torch.device("cpu"))
        starts, ends = attention_hopper.document_bounds(cu, keys)
        documents = (None, None) if cu is None else (gluon_model.Pointer(starts), gluon_model.Pointer(ends))
        flags = (causal, window > 0, cu is not None)
        shape = (queries, keys, window)
        for t in range(queries):
            first, last = key_limits(t, shape, documents, *flags)
            assert seen[t].tolist() == [first <= s < last for s in range(keys)]
        for s in range(keys):
            first, last = query_limits(s, shape, documents, *flags)
            assert seen[:, s].tolist() == [first <= t < last for t in range(queries)]
        for row in range(0, queries, rows):
            begin, end = spans(row, rows, shape, documents, block, *flags)
            cut = first_cut(row, begin, end, shape, documents, block, *flags)
            assert 0 <= begin < end and begin <= cut <= end and begin * block < keys
            for j in range(-(-keys // block)):
                tile = seen[row : row + rows, j * block : (j + 1) * block]
                assert not tile.any() or begin <= j < end
                if not (window or bounds):
                    assert not begin <= j < cut or (tile.all() and tile.shape[1] == block)
        for row in range(0, keys, rows):
            begin, end = query_spans(row, rows, shape, documents, block, *flags)
            low = first_whole(row, rows, begin, end, shape, documents, block, *flags)
            assert 0 <= begin < end and begin <= low <= end and begin * block < queries
            for j in range(-(-queries // block)):
                tile = seen[j * block : (j + 1) * block, row : row + rows]
                assert not tile.any() or begin <= j < end
                if not (window or bounds):
                    assert not low <= j < end or tile.all()


# ---- the kernels under the model --------------------------------------------------------------------------------------------------------


def tensors(seed, batch, queries, keys, heads, kv_heads, head_dim, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, queries, heads, head_dim), *[(batch, keys, kv_heads, head_dim)] * 2]
    return [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]


def check_close(ours, plain_result, exact):
    """At most twice the error of plain torch in the same dtype, and one rounding."""
    for mine, theirs, truth in zip(ours, plain_result, exact):
        finite = torch.isfinite(truth)
        assert torch.equal(torch.isfinite(mine), finite)
        mine, theirs, truth = mine[finite].double(), theirs[finite].double(), truth[finite]
        if truth.numel():
            rounding = truth.abs().max() * 2.0 ** (-11 if ours[0].dtype == torch.float16 else -8) + 1e-5  # gradients may be exactly 0
            assert (mine - truth).abs().max() <= 2 * (theirs - truth).abs().max() + rounding


CASES = {
    "one token": ((1, 1, 1, 1, 1, 64), {}),
    "full": ((1, 260, 300, 2, 2, 64), {}),
    "causal, a group of 3": ((1, 300, 300, 6, 2, 64), {"causal": True}),
    "causal, cached keys": ((2, 130, 333, 2, 1, 128), {"causal": True}),
    "causal, rows that see nothing": ((2, 333, 130, 2, 1, 128), {"causal": True}),
    "window": ((1, 500, 500, 2, 1, 64), {"window": 130, "causal": True}),
    "window of one": ((1, 140, 140, 1, 1, 128), {"window": 1, "causal": True}),
    "window ahead": ((1, 500, 400, 1, 1, 128), {"window": 150}),
    "packed": ((1, 600, 600, 2, 1, 64), {"cu_seqlens": (0, 5, 100, 420, 420, 600), "causal": True}),
    "packed, full, open end": ((1, 450, 450, 2, 1, 128), {"cu_seqlens": (0, 200, 390)}),
    "packed, window": ((1, 450, 450, 1, 1, 64), {"cu_seqlens": (0, 200, 450), "window": 100, "causal": True}),
    "softcap": ((1, 200, 200, 2, 1, 128), {"softcap": 3.0, "causal": True}),
    "negative scale": ((1, 150, 150, 1, 1, 64), {"scale": -0.2, "causal": True}),
    "scale 0": ((1, 150, 150, 1, 1, 64), {"scale": 0.0}),
    "many rounds": ((1, 1100, 1100, 2, 1, 64), {"causal": True}),
}  # fmt: skip


def options_of(sizes, causal=False, window=0, softcap=0.0, cu_seqlens=None, scale=None):
    bounds = None if cu_seqlens is None else torch.tensor(cu_seqlens, dtype=torch.int32)
    return causal, sizes[5] ** -0.5 if scale is None else scale, window, softcap, bounds


SCHEDULES = [(0, "random"), (1, "soon"), (2, "late")]


@pytest.mark.parametrize("seed, copies", SCHEDULES)
@pytest.mark.parametrize("name", [*CASES, "head size 256", "head size 256, causal"])
def test_forward(on_model, name, seed, copies):
    sizes, changes = CASES.get(name, ((1, 300, 260, 2, 1, 256), {"causal": "causal" in name}))
    options = options_of(sizes, **changes)
    q, k, v = tensors(seed, *sizes)
    on_model(gluon_model.Model(seed, copies), num_sms=2)
    ours = attention_hopper.forward(q, k, v, *options)
    exact = reference.forward(q.double(), k.double(), v.double(), *options)
    check_close(ours, reference.forward(q, k, v, *options), exact)


@pytest.mark.parametrize("seed, copies", SCHEDULES)
@pytest.mark.parametrize("name", CASES)
def test_backward(on_model, name, seed, copies):
    sizes, changes = CASES[name]
    options = options_of(sizes, **changes)
    q, k, v = tensors(seed, *sizes)
    dout, out = torch.randn(2, *q.shape, generator=torch.Generator().manual_seed(seed)).to(q.dtype)
    dlse = torch.randn(sizes[0], sizes[3], sizes[1], generator=torch.Generator().manual_seed(seed)) if seed else None
    out, lse = reference.forward(q, k, v, *options)
    on_model(gluon_model.Model(seed, copies))
    ours = attention_hopper_backward.backward(dout, dlse, q, k, v, out, lse, *options)
    wide = [x.double() for x in (q, k, v)]
    exact = reference.backward(dout.double(), dlse, *wide, *reference.forward(*wide, *options), *options)
    check_close(ours, reference.backward(dout, dlse, q, k, v, out, lse, *options), exact)


hopper = pytest.mark.skipif(
    not (torch.cuda.is_available() and gpu_of(torch.device("cuda")).is_hopper), reason="the kernels themselves run on a Hopper GPU alone"
)
ON_HOPPER = {**CASES, **{f"head size 256{', causal' * causal}": ((1, 300, 260, 2, 1, 256), {"causal": causal}) for causal in (False, True)}}


@hopper
@pytest.mark.parametrize("name", ON_HOPPER)
def test_forward_on_hopper(name):
    sizes, changes = ON_HOPPER[name]
    options = options_of(sizes, **changes)
    q, k, v = (x.to(DEVICE) for x in tensors(0, *sizes))
    options = *options[:4], options[4] if options[4] is None else options[4].to(DEVICE)
    exact = reference.forward(q.double(), k.double(), v.double(), *options)
    check_close(attention_hopper.forward(q, k, v, *options), reference.forward(q, k, v, *options), exact)


@hopper
@pytest.mark.parametrize("name", CASES)
def test_backward_on_hopper(name):
    sizes, changes = CASES[name]
    options = options_of(sizes, **changes)
    q, k, v = (x.to(DEVICE) for x in tensors(0, *sizes))
    options = *options[:4], options[4] if options[4] is None else options[4].to(DEVICE)
    dout = torch.randn(q.shape, generator=torch.Generator().manual_seed(0)).to(q)
    out, lse = reference.forward(q, k, v, *options)
    ours = attention_hopper_backward.backward(dout, None, q, k, v, out, lse, *options)
    wide = [x.double() for x in (q, k, v)]
    exact = reference.backward(dout.double(), None, *wide, *reference.forward(*wide, *options), *options)
    check_close(ours, reference.backward(dout, None, q, k, v, out, lse, *options), exact)


def test_slices_of_one_projection_in_float16(on_model):
    fused = torch.randn(2, 150, 8, 64, generator=torch.Generator().manual_seed(0)).half()
    q, k, v = fused[:, :, :4], fused[:, :, 4:6], fused[:, :, 6:]
    options = (True, 0.125, 0, 0.0, None)
    assert attention_hopper.can_serve(q, k, v, True, 0, 0.0, None, H200)[0]
    on_model(gluon_model.Model())
    ours = attention_hopper.forward(q, k, v, *options)
    check_close(ours, reference.forward(q, k, v, *options), reference.forward(q.double(), k.double(), v.double(), *options))
    dout = torch.ones_like(ours[0])
    grads = attention_hopper_backward.backward(dout, None, q, k, v, *ours, *options)
    wide = [x.double() for x in (q, k, v)]
    exact = reference.backward(dout.double(), None, *wide, *reference.forward(*wide, *options), *options)
    check_close(grads, reference.backward(dout, None, q, k, v, *ours, *options), exact)


def test_bits_do_not_depend_on_the_number_of_blocks_or_on_timing(on_model):
    q, k, v = tensors(0, 1, 400, 400, 4, 2, 64)
    options = (True, 0.125, 0, 0.0, None)
    found = []
    for seed, num_sms in ((0, 1), (1, 5), (2, 100)):
        on_model(gluon_model.Model(seed), num_sms)
        out, lse = attention_hopper.forward(q, k, v, *options)
        found.append((out, lse, *attention_hopper_backward.backward(out, None, q, k, v, out, lse, *options)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other))


# ---- the model finds what it is there to find --------------------------------------------------------------------------------------------


def broken(monkeypatch, change):
    monkeypatch.setattr(*change)
    sizes = (1, 700, 700, 1, 1, 64)
    q, k, v = tensors(0, *sizes)
    options = options_of(sizes)
    exact = reference.forward(q.double(), k.double(), v.double(), *options)[0]
    wrong = 0
    for seed in range(6):
        model = gluon_model.Model(seed)
        monkeypatch.setattr(attention_hopper, "launch", model.launch)
        with described(dataclasses.replace(H200, num_sms=1)):
            try:
                out = attention_hopper.forward(q, k, v, *options)[0]
            except (AssertionError, gluon_model.Deadlock):
                wrong += 1
                continue
        wrong += not (out - exact).abs().max() < 0.01
    return wrong


def test_model_finds_a_buffer_released_by_one_reader_of_two(monkeypatch):
    init = gluon_model.Barrier.init
    assert broken(monkeypatch, (gluon_model.Barrier, "init", lambda self, count: init(self, 1))) > 0


def test_model_finds_a_lost_arrival(monkeypatch):
    arrivals = itertools.count()
    arrive = gluon_model.Model.arrive

    def forgetful(self, barrier, count=1):
        if next(arrivals) % 20 != 19:
            arrive(self, barrier, count)

    assert broken(monkeypatch, (gluon_model.Model, "arrive", forgetful)) > 0


def test_model_finds_results_read_in_flight_and_missing_fences(monkeypatch):
    wait = gluon_model.Model.mma_wait
    with monkeypatch.context() as patch:
        assert broken(patch, (gluon_model.Model, "mma_wait", lambda self, n, deps: wait(self, n + 1, deps))) == 6
    assert broken(monkeypatch, (gluon_model.Model, "fence", lambda self: None)) == 6


def test_model_finds_a_wait_for_the_wrong_phase(monkeypatch):
    wait = gluon_model.Model.wait
    assert broken(monkeypatch, (gluon_model.Model, "wait", lambda self, barrier, parity: wait(self, barrier, parity ^ 1))) == 6


# ---- what is served, and what it compiles to ---------------------------------------------------------------------------------------------


def test_can_serve_says_why_not():
    def answer(q, k=None, cu_seqlens=None, gpu=H200, module=attention_hopper):
        k = q if k is None else k
        return module.can_serve(q, k, k, True, 0, 0.0, cu_seqlens, gpu)

    x = torch.zeros(2, 16, 4, 128, dtype=torch.bfloat16)
    assert answer(x)[0] and answer(x[:1, :1])[0] and answer(x.transpose(1, 2))[0]
    assert answer(x, module=attention_hopper_backward)[0]
    wide = torch.zeros(1, 16, 4, 256, dtype=torch.bfloat16)
    assert answer(wide)[0] and "256" in answer(wide, module=attention_hopper_backward)[1]
    assert "registers" in attention_hopper.can_serve(wide, wide, wide, True, 0, 9.0, None, H200)[1]
    assert "registers" in attention_hopper_backward.can_serve(x, x, x, False, 0, 9.0, None, H200)[1]
    assert "Hopper" in answer(x, gpu=DESCRIBED["b200"])[1]
    assert "float32" in answer(x.float())[1]
    assert "80" in answer(x[..., :80])[1]
    assert "nothing" in answer(x[:, :0])[1]
    assert "aligned" in answer(torch.zeros(2, 16, 4, 132, dtype=torch.bfloat16)[..., 4:])[1]
    assert "aligned" in answer(torch.zeros(2, 16, 4, 129, dtype=torch.bfloat16)[..., :128])[1]
    assert "aligned" in answer(x[:1].expand(2, -1, -1, -1))[1]
    assert "aligned" in answer(x.mT.contiguous().mT)[1]


COMPILE = """
import dataclasses, json, torch
from cllm.kernels import inspection
from cllm.kernels.gluon import attention_forward as attention_hopper
from cllm.kernels.gluon import attention_backward as attention_hopper_backward
from cllm.kernels.triton.launch import recording
from cllm.runtime.gpu import DESCRIBED, described
gpu = DESCRIBED["h200"]
found = []
with described(gpu), recording() as launches:
    for module in (attention_hopper, attention_hopper_backward):
        for name, call in module.launches(gpu, torch.bfloat16):
            if name in ("attention D=128 causal", "attention backward D=128 causal"):
                call()
    for launch in launches:
        build = inspection.build(launch, gpu)
        found.append({**dataclasses.asdict(build), "complaints": inspection.complaints(build, gpu)})
print(json.dumps(found))
"""


def test_compiles_for_hopper_as_designed(tmp_path):
    """In a process of its own, because here Triton interprets. Products overlap (`wait 1`) and exponentials run beside them, nothing spills, nothing
    is serialised, no barrier is missing, no warpgroup uses more registers than it is granted."""
    done = python("-c", COMPILE, TRITON_CACHE_DIR=str(tmp_path))
    assert done.status == 0, done.err
    builds = {build["kernel"]: build for build in json.loads(done.out.splitlines()[-1])}
    assert len(builds) >= 4
    for name, build in builds.items():
        assert not build["complaints"]
        if name != "attention_row_terms_kernel":
            assert build["wgmma"] and not build["mma"] and build["wait_groups"] == [0, 1] and build["num_warps"] == 12
            beside, alone = build["exponentials"]
            first_softmax = 2 * (128 // 2 + 2) if name == "attention_forward_kernel" else 0  # of a tile: no product runs yet
            assert beside > 0 and alone == first_softmax


@pytest.mark.parametrize("gpu", ["a100", "rtx4090", "b200"])
def test_other_gpus_have_nothing_to_compile(gpu):
    assert not list(attention_hopper.launches(DESCRIBED[gpu], torch.bfloat16))
    assert not list(attention_hopper.launches(H200, torch.float32))
