"""What is read from the machine, and the caches that remember it."""

import itertools
import json
import os
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from command import python, start_python

from cllm import runtime
from cllm.runtime import ceiling, device, threads, tuning


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({"cpu.max": "800000 100000", "a/b/cpu.max": "200000 100000"}, 2.0),
        ({}, None),
    ],
)
def test_the_tightest_cpu_quota_counts_in_both_versions_of_the_interface(tmp_path, files, cores):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert device.cgroup_cpus(str(tmp_path), own="0::/a/b\n4:cpu,cpuacct:/a/b") == cores


def test_the_tightest_memory_limit_counts(tmp_path):
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "memory.max").write_text("1048576\n")
    assert device.cgroup_memory(str(tmp_path), own="0::/a") == 1 << 20
    assert device.cgroup_memory(str(tmp_path / "nothing"), own="") is None


def test_usable_cores_respect_the_affinity_mask():
    code = "import os; os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[0]}); from cllm.runtime import device; print(device.usable_cores())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


def test_the_cpu_is_described():
    cpu = device.cpu()
    assert cpu.workers >= 1 and cpu.memory_bytes > 1 << 28 and cpu.name
    assert json.loads(json.dumps(cpu.to_dict()))["kind"] == "cpu"


def test_torch_threads_are_changed_in_the_scope_and_restored():
    before = torch.get_num_threads()
    with runtime.use(threads=1):
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    with runtime.use(threads=1741):
        assert torch.get_num_threads() <= device.usable_cores()


def test_a_scope_without_a_count_only_cuts_the_pools_to_the_cores(monkeypatch):
    """In a container with a CPU quota torch counts more cores than it may use."""
    before = torch.get_num_threads()
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    try:
        for here, inside in ((5, 2), (1, 1)):
            torch.set_num_threads(here)
            with runtime.use():
                assert torch.get_num_threads() == inside
            assert torch.get_num_threads() == here
        monkeypatch.setenv("CLLM_THREADS", "1")
        torch.set_num_threads(2)
        with runtime.use():
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def test_the_blas_of_numpy_follows_the_scope():
    pools = threads._openblas_pools()
    if not pools:
        pytest.skip("numpy's BLAS is not OpenBLAS here")
    before = [read() for read, _ in pools]
    with runtime.use(threads=1):
        assert [read() for read, _ in pools] == [1] * len(pools)
    assert [read() for read, _ in pools] == before


def test_a_stored_value_comes_back_and_a_damaged_cache_is_measured_again(tmp_path, monkeypatch):
    monkeypatch.setenv("CLLM_CACHE_DIR", str(tmp_path))
    calls = []

    def measure():
        calls.append(1)
        return {"value": len(calls)}

    assert tuning.remembered("key", measure) == {"value": 1}
    assert tuning.remembered("key", measure) == {"value": 1}
    (tmp_path / "tuning.json").write_text('{"key": ')
    assert tuning.remembered("key", measure) == {"value": 2}
    assert tuning.load("other") is None
    assert [name for name in os.listdir(tmp_path) if name.startswith(".tuning-")] == []


def test_a_cache_folder_that_cannot_be_written_is_replaced(tmp_path, monkeypatch, capsys):
    place = tmp_path / "file"
    place.write_text("not a folder")
    monkeypatch.setenv("CLLM_CACHE_DIR", str(place))
    assert os.access(tuning.cache_dir(), os.W_OK) and tuning.cache_dir() != place
    assert "cannot be written" in capsys.readouterr().err


def test_a_temporary_cache_that_others_can_write_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    first = tuning._temporary()
    assert tuning._temporary() == first and first.stat().st_mode & 0o777 == 0o700
    first.chmod(0o777)
    assert tuning._temporary() not in (first, tmp_path)


def test_a_store_that_fails_leaves_no_half_written_file(tmp_path, monkeypatch):
    monkeypatch.setenv("CLLM_CACHE_DIR", str(tmp_path))
    (tmp_path / "tuning.json").mkdir()  # cannot be replaced by a file
    tuning.store("key", 1)
    assert os.listdir(tmp_path) == ["tuning.json"]


def test_processes_that_start_together_compile_into_one_cache(tmp_path):
    pytest.importorskip("numba")
    (tmp_path / "kernel.py").write_text("import numba\n@numba.njit(cache=True)\ndef twice(x): return 2 * x\n")
    code = "from cllm.runtime import compiler; compiler.numba_setup(); import kernel; print(kernel.twice(21))"
    started = [start_python("-c", code, cwd=tmp_path, CLLM_CACHE_DIR=str(tmp_path)) for _ in range(3)]
    assert [process.communicate()[0] for process in started] == ["42\n"] * 3
    assert list(tmp_path.glob("numba-*/**/*.nbi"))


def test_a_damaged_cache_of_compiled_kernels_is_compiled_again(tmp_path):
    """A module for each kind of damage to each of its two files: one process meets all of them."""
    pytest.importorskip("numba")

    def flipped(whole: bytes) -> bytes:
        middle = len(whole) // 2
        return whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]

    kinds = [lambda whole: b"", lambda whole: whole[: len(whole) // 2], flipped, lambda whole: os.urandom(300)]
    damages = {f"kernel{number}": damage for number, damage in enumerate(itertools.product(("nbi", "nbc"), kinds))}
    for name in damages:
        (tmp_path / f"{name}.py").write_text("import numba\n@numba.njit(cache=True)\ndef twice(x): return 2 * x\n")
    code = "import importlib, sys; from cllm import runtime; runtime.numba_setup()\nfor name in sys.argv[1:]:\n"
    code += "    kernel = importlib.import_module(name); print(kernel.twice(21), sum(kernel.twice.stats.cache_hits.values()))"

    def run() -> list[str]:
        return python("-c", code, *damages, cwd=tmp_path, CLLM_CACHE_DIR=str(tmp_path)).out.splitlines()

    assert (run(), run()) == (["42 0"] * len(damages), ["42 1"] * len(damages))
    for name, (suffix, damage) in damages.items():
        (file,) = tmp_path.glob(f"numba-*/**/{name}.*.{suffix}")
        file.write_bytes(damage(file.read_bytes()))
    assert (run(), run()) == (["42 0"] * len(damages), ["42 1"] * len(damages))


def test_importing_the_runtime_loads_nothing_heavy():
    code = "import sys, cllm.runtime; print([m for m in ('torch', 'numpy', 'numba', 'llvmlite', 'rich', 'psutil') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_ceilings_are_measured_once_and_a_report_tells_them(tmp_path, monkeypatch):
    monkeypatch.setenv("CLLM_CACHE_DIR", str(tmp_path))
    runtime.ceilings.cache_clear()
    monkeypatch.setattr(ceiling, "QUIET_SHARE", 0.0)  # whatever else runs on this machine
    first = runtime.ceilings()
    assert first.fp32_gflops > 1 and first.bf16_gflops > 0.1 and first.copy_gbps > 0.1
    runtime.ceilings.cache_clear()
    assert runtime.ceilings() == first  # from the file this time
    report = runtime.describe()
    assert len(report.brief().splitlines()) == 3
    assert json.loads(json.dumps(report.to_dict()))["ceilings"]["fp32_gflops"] == first.fp32_gflops
    runtime.ceilings.cache_clear()


def test_ceilings_are_those_of_all_cores_whatever_limit_is_in_force(tmp_path, monkeypatch):
    """They are kept for other runs: one that was started with a single thread must not decide them."""
    monkeypatch.setenv("CLLM_CACHE_DIR", str(tmp_path))
    seen = []
    monkeypatch.setattr(ceiling, "_probes", {"a kernel": lambda precision: seen.append((runtime.settings().threads, torch.get_num_threads()))})
    monkeypatch.setattr(ceiling, "_torch_gflops", lambda precision, clock: clock.best_seconds(lambda: None, 0.001) and 1.0)
    monkeypatch.setattr(ceiling, "QUIET_SHARE", 0.0)
    runtime.ceilings.cache_clear()
    with runtime.use(threads=1):
        runtime.ceilings()
    runtime.ceilings.cache_clear()
    assert set(seen) == {(device.usable_cores(), device.usable_cores())}


def test_a_product_that_is_slow_here_is_measured_on_few_rows(monkeypatch):
    """bfloat16 on a processor that has no instructions for it: 2 ms a row here, 10 s for one call of each size."""
    computed = []

    def slow(a, b, out):
        computed.append(len(a))
        time.sleep(len(a) * 0.002)

    monkeypatch.setattr(torch, "mm", slow)
    rate = ceiling._torch_gflops("bf16", ceiling._Clock())
    fastest = max(2.0 * depth * columns / 0.002 / 1e9 for _, depth, columns in ceiling.SIZES)
    assert fastest / 2 < rate <= fastest
    assert sum(computed) < min(rows for rows, _, _ in ceiling.SIZES)


def test_a_busy_machine_is_measured_in_one_pass(monkeypatch):
    passes = []
    monkeypatch.setattr(ceiling, "_probes", {"a kernel": passes.append})
    monkeypatch.setattr(ceiling, "_torch_gflops", lambda precision, clock: clock.best_seconds(lambda: None, 0.001) and 1.0)
    for quiet, expected in ((2.0, 1), (0.0, ceiling.PASSES)):
        passes.clear()
        monkeypatch.setattr(ceiling, "QUIET_SHARE", quiet)
        assert ceiling._measure()["disturbed"] == (quiet > 1)
        assert passes == ["fp32", "bf16"] * expected


def test_ceilings_of_a_busy_machine_serve_for_some_minutes_and_are_then_measured_again(tmp_path, monkeypatch):
    monkeypatch.setenv("CLLM_CACHE_DIR", str(tmp_path))
    measured = []

    def measure():
        measured.append(len(measured) < 3)  # the machine is busy for three measurements
        return {"fp32_gflops": 1.0 + len(measured), "bf16_gflops": 1.0, "copy_gbps": 1.0, "best": {}, "disturbed": measured[-1]}

    monkeypatch.setattr(ceiling, "_measure", measure)
    now = [time.time()]
    monkeypatch.setattr(ceiling, "time", SimpleNamespace(time=lambda: now[0]))
    rates = []
    for later in (0.0, ceiling.BUSY_SECONDS - 1, 2.0, -3600.0, ceiling.BUSY_SECONDS + 1, 0.0, 1e9):  # a clock may be put back
        now[0] += later
        runtime.ceilings.cache_clear()
        rates.append((runtime.ceilings().fp32_gflops, runtime.ceilings().disturbed))
    assert rates == [(2.0, True), (2.0, True), (3.0, True), (4.0, True), (5.0, False), (5.0, False), (5.0, False)]
    runtime.ceilings.cache_clear()


def test_a_busy_machine_is_said_to_be_one(tmp_path, monkeypatch):
    monkeypatch.setenv("CLLM_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(ceiling, "QUIET_SHARE", 2.0)  # no machine is as quiet as that
    runtime.ceilings.cache_clear()
    assert runtime.ceilings().disturbed and "other programs were busy" in runtime.describe().brief()
    runtime.ceilings.cache_clear()


def test_freed_memory_stays_in_the_process_unless_asked_otherwise():
    """A buffer that is freed and taken again must not fault its pages in again, be it of a few megabytes or more than glibc keeps by itself."""
    code = """
import resource, torch
from cllm.runtime import heap
heap.keep_freed_memory()
def step():
    return [torch.ones(400_000) for _ in range(5)] + [torch.ones(20_000_000)]
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20): step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    faults = {keep: int(python("-c", code, CLLM_KEEP_HEAP=keep).out) for keep in ("0", "1")}
    if faults["0"] > 5000:  # an allocator that gives memory back; others have nothing to show here
        assert faults["1"] < faults["0"] / 10, faults


def test_a_child_process_with_other_settings_does_not_inherit_its_parents_kernels(tmp_path):
    """The parent's choice of cache folder travels in the environment; kernels of another vector width must not be loaded from it."""
    pytest.importorskip("numba")
    registered = "compiler.register_kernels('kernels', ['CLLM_SIMD_LANES'])"
    code = f"from cllm.runtime import compiler; {registered}; compiler.numba_setup(); import numba; print(numba.config.CACHE_DIR)"

    def folder(**settings: str) -> str:
        env = {**os.environ, "CLLM_CACHE_DIR": str(tmp_path), **settings}
        return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True).stdout.strip()

    parent = folder(CLLM_SIMD_LANES="16", NUMBA_CACHE_DIR="")
    assert folder(CLLM_SIMD_LANES="16", NUMBA_CACHE_DIR=parent) == parent
    assert folder(CLLM_SIMD_LANES="8", NUMBA_CACHE_DIR=parent) != parent
    assert folder(CLLM_SIMD_LANES="8", NUMBA_CACHE_DIR=str(tmp_path / "mine")) == str(tmp_path / "mine")
