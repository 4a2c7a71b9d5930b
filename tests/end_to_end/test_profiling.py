"""The profiling scripts run through on tiny shapes and say what they measured. What they measure is no test's business."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from command import Ran, python

from cllm import runtime

PROFILING = Path(__file__).parents[2] / "profiling"
SCALING = {"threads", "seconds", "tokens_per_second", "speed_up", "efficiency", "sha256", "same_bits"}
MEMORY = {"cllm", "pytorch", "ratio", "predicted_step_bytes", "predicted_peak_bytes"}
TRACE = {"kind", "name", "calls", "ms", "ms_per_step", "share_of_step", "gflops", "gbps", "share"}


def run(*words: object, status: int = 0) -> Ran:
    done = python(*words, cwd=PROFILING)
    assert done.status == status, done.err
    assert "Traceback" not in done.err, done.err
    return done


def module(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"profiling_{name}", PROFILING / f"{name}.py")
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize(
    ("script", "arguments", "keys"),
    [
        ("kernels.py", ["--tiny", "--rounds", "1"], {"op", "shape", "dtype", "direction", "ours_ms", "peer_ms", "ratio", "share"}),
        ("train.py", ["--shapes", "tiny", "--rounds", "1"], {"shape", "precision", "seconds", "tokens_per_second", "ratio"}),
        (
            "generate.py",
            ["--shapes", "llama-tiny", "--weights", "bf16", "int8", "--prompt", "9", "--tokens", "3", "--rounds", "1"],
            {"shape", "weights", "prefill_tokens_per_second", "decode_tokens_per_second", "decode_ratio", "weights_gbps", "copy_gbps"},
        ),
        (
            "serve.py",
            ["--shapes", "llama-tiny", "--requests", "2", "--streams", "2", "--prompt", "9", "--answer", "3", "--rounds", "1"],
            {"shape", "weights", "work", "unit", "cllm", "ratio"},
        ),
        ("memory.py", ["--shapes", "tiny", "--precision", "bf16"], MEMORY),
    ],
)
def test_a_script_prints_a_table_and_an_object(script, arguments, keys):
    rows = json.loads(run(script, *arguments, "--json").out.splitlines()[-1])
    assert rows and all(keys <= row.keys() for row in rows)


def test_scaling_compares_the_bits_of_every_number_of_threads(tmp_path):
    pytest.importorskip("matplotlib", reason="the pictures need the extra [plot]")
    picture = tmp_path / "scaling.png"
    done = run(
        "scaling.py", "--shapes", "tiny", "--precision", "fp32", "--threads", "1", "3", "70", "--rounds", "1", "--parts", "--plot", picture, "--json"
    )
    found = json.loads(done.out.splitlines()[-1])
    rows, parts = found[:3], {row["part"]: row["seconds"] for row in found[3:]}
    assert {"matmul", "attention backward", "adamw", "outside kernels"} <= parts.keys() and all(each["1"] > 0 for each in parts.values())
    assert [row["threads"] for row in rows] == [1, 3, 70] and all(row.keys() >= SCALING for row in rows)
    assert len({row["sha256"] for row in rows}) == 1 and all(row["same_bits"] for row in rows)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_scaling_predicts_more_workers_than_there_are_cores_and_names_what_limits_them_for_all_that_is_asked_for():
    done = run("scaling.py", "--shapes", "tiny", "--predict", "8", "--rounds", "1", "--json")
    found = json.loads(done.out.splitlines()[-1])
    assert {row["precision"] for row in found} == {"fp32", "bf16"}
    for precision in ("fp32", "bf16"):
        of_it = [row for row in found if row["precision"] == precision]
        rows, limits = [row for row in of_it if "part" not in row], [row for row in of_it if "part" in row]
        assert [row["workers"] for row in rows] == [1, 2, 4, 8, 1741] and rows[0]["predicted_speed_up"] == 1.0
        assert rows[0]["measured_seconds"] > 0 and all(row["predicted_seconds"] > 0 for row in rows)
        assert rows[0]["predicted_seconds"] == pytest.approx(rows[0]["measured_seconds"])
        assert 0 < rows[0]["outside_seconds"] < rows[0]["measured_seconds"]
        assert "gemm_kernel._task" in {row["part"] for row in limits} and all(row["launches"] > 0 for row in limits)


def test_a_trace_holds_our_kernels_inside_their_stages_and_says_their_rate(tmp_path):
    trace = tmp_path / "trace.json"
    rows = json.loads(run("trace.py", "--shape", "tiny", "--steps", "1", "--out", trace, "--json").out.splitlines()[-1])
    assert all(row.keys() >= TRACE for row in rows)
    found = {row["name"]: row for row in rows}
    kernels = {
        "matmul",
        "attention forward",
        "attention backward",
        "feed_forward forward",
        "feed_forward backward",
        "layer_norm forward",
        "layer_norm backward",
        "linear_cross_entropy forward with grads",
        "embedding forward",
        "adamw",
    }
    assert kernels <= found.keys() and all(found[name]["gflops"] is not None for name in kernels)
    assert found["attention forward"]["calls"] == 2  # one for each layer
    events = [each for each in json.loads(trace.read_text())["traceEvents"] if each["ph"] == "X"]
    assert {each["name"] for each in events} >= kernels | {"step", "forward", "backward", "update"}
    times = {each["name"]: (each["ts"], each["ts"] + each["dur"]) for each in events}
    for inner, outer in (("attention forward", "forward"), ("attention backward", "backward"), ("adamw", "update"), ("update", "step")):
        assert times[outer][0] <= times[inner][0] and times[inner][1] <= times[outer][1], (inner, outer)
    assert str(Path.home()) not in trace.read_text()


NORM_AND_ROTARY = """
import trace, torch
from cllm import kernels
from cllm.runtime import profiler
x, weight, table = torch.ones(2, 3, 4, 8, requires_grad=True), torch.ones(4, 8, requires_grad=True), torch.ones(3, 4)
with profiler.record() as recording:
    kernels.rotary(x, table, table, norm_weight=weight).sum().backward()
print({event.name: trace.work(event) for event in recording.kernels()})
"""


def test_a_trace_counts_the_norm_of_queries_and_keys_with_their_rotation():
    elements = 2 * 3 * 4 * 8
    forward, backward = (11.0 * elements, 2.0 * 4 * elements), (1.5 * 11.0 * elements, 3.0 * 4 * elements)
    assert run("-c", NORM_AND_ROTARY).out.strip() == str({"rotary norm forward": forward, "rotary norm backward": backward})


def test_a_picture_without_matplotlib_is_refused_before_anything_is_measured(monkeypatch, tmp_path):
    plots = module("plots")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(runtime.UserError, match=r'pip install "cllm\[plot\]"'):
        plots.check(tmp_path / "a.png")
    with pytest.raises(runtime.UserError, match=r"\.png"):
        plots.check(tmp_path / "a.xyz")
    with pytest.raises(runtime.UserError, match="no folder"):
        plots.check(tmp_path / "missing" / "a.png")
    plots.check(None)


def test_pictures_of_bars_and_lines_are_drawn(tmp_path):
    pytest.importorskip("matplotlib", reason="the pictures need the extra [plot]")
    plots = module("plots")
    plots.bars(tmp_path / "bars.png", "title", ["a", "b"], {"x": [1.0, None], "y": [2000.0, 0.5]}, "unit", line=1.0)
    plots.lines(tmp_path / "lines.svg", "title", {"x": [(1, 1.0), (2, 1.9)]}, "threads", "speed", ideal=[(1, 1), (2, 2)])
    assert (tmp_path / "bars.png").stat().st_size > 1000 and "<svg" in (tmp_path / "lines.svg").read_text()


@pytest.fixture
def report(monkeypatch, tmp_path):
    """report.py writing into a folder of the test, on a machine that need not be measured."""
    report = module("report")
    ceilings = {"fp32_gflops": 100.0, "bf16_gflops": 200.0, "copy_gbps": 10.0, "best": {}, "disturbed": False}
    monkeypatch.setattr(report, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runtime, "describe", lambda: runtime.Report({"devices": [], "ceilings": ceilings, "cache_dir": "/somewhere"}))
    report.ceilings = ceilings
    return report


def test_a_share_above_the_peak_is_marked_invalid_and_said_aloud(report, capsys):
    rows = [{"share": 0.97}, {"share": 1.31}, {"copy_share": 1.02, "share": None}, {"ratio": 3.0, "share_of_step": 1.0}, {"share": float("nan")}]
    written = json.loads(report.write("here", rows).read_text())
    assert ["invalid" in row for row in written["rows"]] == [False, True, True, False, True]
    assert "above 100 %" in written["rows"][1]["invalid"] and "copy_share" in written["rows"][2]["invalid"]
    assert any("3 of 5 rows" in text for text in written["warnings"])
    assert "3 of 5 rows" in capsys.readouterr().err
    assert [report.percent(share) for share in (0.97, 1.31, None)] == ["97 %", "invalid", "-"]


@pytest.mark.parametrize("dirty", [False, True])
def test_code_that_no_commit_holds_and_a_busy_machine_are_recorded(report, monkeypatch, capsys, dirty):
    monkeypatch.setattr(report, "commit", lambda: ("abc1234-dirty" if dirty else "abc1234", dirty))
    report.ceilings["disturbed"] = dirty
    written = json.loads(report.write("here", [{"share": 0.5}], threads=7).read_text())
    assert written["dirty"] is dirty and written["threads"] == 7 and written["machine"]["ceilings"]["disturbed"] is dirty
    assert {"commit", "date", "versions", "machine", "rows"} <= written.keys() and "cache_dir" not in written["machine"]
    assert len(written["warnings"]) == 2 * dirty == capsys.readouterr().err.count("warning: ")


def test_results_and_notes_do_not_make_the_code_dirty(tmp_path, monkeypatch):
    report = module("report")
    for folder in ("cllm", "kernels", "runtime", "profiling/results"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "file.py").touch()

    def git(*words: str) -> None:
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(report, "__file__", str(tmp_path / "profiling" / "report.py"))
    git("init")
    assert report.commit() == ("unknown", True)
    git("add", ".")
    git("commit", "-m", "first")
    for name in ("profiling/results/new.json", "profiling/NOTES.md", "trace.json"):
        (tmp_path / name).write_text("measured")
    name, dirty = report.commit()
    assert not dirty and "dirty" not in name
    (tmp_path / "kernels" / "file.py").write_text("changed")
    assert report.commit() == (f"{name}-dirty", True)


def test_the_five_lines_of_the_readme_run():
    example = (PROFILING / "README.md").read_text().split("```python\n")[1].split("```")[0]
    assert "causal" in run("-c", example).out


def test_the_comparison_of_optimizers_trains_through_the_command_line_and_keeps_what_it_trained(tmp_path):
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question:\n" * 200)
    (tmp_path / "work" / "lion").mkdir(parents=True)
    (tmp_path / "work" / "lion" / "find-lr.json").write_text('{"suggestion": 2e-3}')
    words = ("optimizers.py", tmp_path / "text.txt", "--work", tmp_path / "work", "--optimizers", "lion", "--steps", "3", "--factors", "0.5")
    (row,) = json.loads(run(*words, "--json").out.splitlines()[-1])
    assert row["optimizer"] == "lion" and row["learning_rate"] == 1e-3 and row["validation_loss"] > 0
    latest = tmp_path / "work" / "lion" / "0.001" / "checkpoints" / "latest"
    trained = latest.stat().st_mtime_ns
    (again,) = json.loads(run(*words, "--json").out.splitlines()[-1])
    assert again == row and latest.stat().st_mtime_ns == trained


def test_an_ablation_reads_the_plain_loss_off_at_the_cost_of_each_part(monkeypatch):
    monkeypatch.syspath_prepend(PROFILING)
    rows = [{"contestant": "plain", "steps": steps, "loss": loss, "cost": 1.0} for steps, loss in ((600, 2.0), (900, 1.8))]
    rows += [{"contestant": "more", "steps": 600, "loss": 1.7, "cost": 1.5}, {"contestant": "less", "steps": 600, "loss": 1.95, "cost": 1.5**0.5}]
    module("ablation").at_equal_cost(rows)
    assert [row["plain_loss_at_its_cost"] for row in rows] == pytest.approx([2.0, 1.8, 1.8, 1.9])
    assert [row["gain"] for row in rows] == pytest.approx([0.0, 0.0, 0.1, -0.05])
