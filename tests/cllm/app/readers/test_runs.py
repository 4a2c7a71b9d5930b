"""The list of runs and one run in detail, over the routes: what the trainer left, and what anybody else may have left in its place."""

import json
import os
import shutil
import threading
import time

import pytest
from command import wait_for

from cllm.app.readers.library import Library
from cllm.checkpoint import CheckpointStore
from cllm.monitor.guards import RunLock, trained_by
from cllm.runtime.errors import CheckpointError


@pytest.fixture
def run(workspace):
    return workspace / "runs" / "tiny"


def entry(client, run="runs/tiny"):
    return next(each for each in client.get("/api/runs").json if each["run"] == run)


# -- what the trainer left -------------------------------------------------------------------------------------------------


def test_a_finished_run_is_listed_with_its_figures(reader, made):
    (found,) = reader.get("/api/runs").json
    rows = [json.loads(line) for line in (made / "runs/tiny/metrics.jsonl").read_text().splitlines()]
    train = [each for each in rows if each["kind"] == "train"]
    evaluations = [each for each in rows if each["kind"] == "eval"]
    assert (found["run"], found["name"], found["state"], found["step"], found["steps"]) == ("runs/tiny", "tiny", "finished", 12, 12)
    assert found["loss"] == train[-1]["loss"] and found["tokens"] == train[-1]["tokens"] and found["damaged"] is None
    assert found["val_loss"] == evaluations[-1]["loss"] and found["best_val_loss"] == min(each["loss"] for each in evaluations)
    size = sum(each.stat().st_size for each in (made / "runs/tiny").rglob("*") if each.is_file())
    assert found["size_bytes"] == size and found["parameters"] > 1_000 and abs(found["updated"] - time.time()) < 3_600


def test_detail(reader):
    found = reader.get("/api/runs/detail", run="runs/tiny").json
    assert found["settings"]["train"]["steps"] == 12 and found["sources"]["train.steps"] == "--steps"
    assert found["data"]["path"] == "books" and found["data"]["train_tokens"] > 100 and found["parent"] is None
    assert [each["step"] for each in found["checkpoints"]] == [12, 8] and found["checkpoints"][0]["path"] == "runs/tiny/checkpoints/step-00000012"
    assert sum(each["best"] for each in found["checkpoints"]) == 1 and all(
        each["bytes"] > 1_000 and not each["damaged"] for each in found["checkpoints"]
    )
    assert found["environment"]["versions"]["torch"] and found["problems"] == [] and found["model"]["embed_dim"] == 32


def test_threads_of_a_training_are_measured_while_it_trains(client, run):
    """The process that holds the run's lock is this one, with a thread that computes."""
    assert client.get("/api/runs/tree", run="runs/tiny").json["threads"] == []
    ends = threading.Event()

    def compute():
        while not ends.is_set():
            pass

    computing = threading.Thread(target=compute)
    with RunLock(run):
        computing.start()
        try:
            wait_for(
                lambda: [each for each in client.get("/api/runs/tree", run="runs/tiny").json["threads"] if not each["main"] and each["share"] <= 1]
            )
        finally:
            ends.set()
            computing.join()


def test_many_questions_about_one_run_keep_nobody_else_waiting(client, run):
    """More of them than the server has threads, while the run's rows cannot be had."""
    with client.app.part(Library).shelf.rows(run):
        waiting = [client.begin("GET", "/api/runs/series", {"run": "runs/tiny"}) for _ in range(50)]
        assert client.begin("GET", "/api/runs").result(60).status == 200
        assert not any(each.done() for each in waiting)
    assert {each.result(300).status for each in waiting} == {200}


def test_curves_layers_samples_and_the_tree(reader):
    curves = reader.get("/api/runs/series", run="runs/tiny", x="step", keys="loss,learning_rate", points=5).json
    assert len(curves["x"]) == 5 and curves["rows"] == 12 and curves["last_step"] == 12 and set(curves["series"]) == {"loss", "learning_rate"}
    assert [each["step"] for each in curves["evaluations"]] == [4, 8, 12] and all(each["unigram_loss"] > 0 for each in curves["evaluations"])
    found = reader.get("/api/runs/layers", run="runs/tiny").json
    assert found["steps"] == [3, 6, 9, 12] and "layer 0" in found["names"] and len(found["gradient_norms"][0]) == 4
    assert [each["step"] for each in reader.get("/api/runs/samples", run="runs/tiny").json] == [12, 6]
    assert reader.get("/api/runs/faults", run="runs/tiny").json == [] and reader.get("/api/runs/rounds", run="runs/tiny").json == []
    found = reader.get("/api/runs/tree", run="runs/tiny").json
    assert found["workers"] == 2 and found["fanout"] == 12 and found["levels"][0] == {"name": "root", "nodes": 1} and found["parts"]["forward"] > 0


def test_a_run_that_is_trained_says_so_and_one_that_was_left_is_stopped(client, run, workspace):
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text("".join(lines[:10]))
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    assert entry(client)["state"] == "stopped"
    with RunLock(run):
        found = entry(client)
        assert found["state"] == "training" and found["eta_seconds"] > 0 and trained_by(run) == f"process {os.getpid()}"
    assert trained_by(run) is None and entry(client)["state"] == "stopped"


def test_a_job_says_what_became_of_its_run(client, run, monkeypatch):
    job = {"id": "j7", "command": "train", "run": "runs/tiny", "out": None, "state": "failed"}
    monkeypatch.setattr(client.app.jobs, "listed", lambda: [job, {**job, "id": "j1", "state": "done"}])
    assert (entry(client)["state"], entry(client)["job"]) == ("finished", "j7")
    shutil.rmtree(run / "checkpoints" / "step-00000012")
    (run / "metrics.jsonl").write_text("".join((run / "metrics.jsonl").read_text().splitlines(keepends=True)[:5]))
    for state, word in [
        ("failed", "failed"),
        ("lost", "failed"),
        ("paused", "paused"),
        ("stopped", "stopped"),
        ("done", "stopped"),
        ("running", "stopped"),
    ]:
        job["state"] = state
        assert entry(client)["state"] == word == client.app.state_of_run("runs/tiny")
    assert client.app.state_of_run("runs/none") is None and client.app.state_of_run("../x") is None


def test_pages_hear_of_a_list_that_changes_and_not_of_every_step(client, run):
    library = client.app.part(Library)
    before = library.shown_of_runs()
    with open(run / "metrics.jsonl", "a") as file:
        file.write((run / "metrics.jsonl").read_text().splitlines(keepends=True)[0])
    assert library.shown_of_runs() == before
    with RunLock(run):
        assert library.shown_of_runs() != before
    shutil.copytree(run, run.with_name("other"))
    assert library.shown_of_runs() != before


def test_looking_at_the_lock_keeps_no_training_out(run):
    """A reader holds the lock for a moment when it looks, so whoever wants it waits a little; a training still keeps others out."""
    with RunLock(run):
        for _ in range(50):
            trained_by(run)
        with pytest.raises(CheckpointError, match="is being trained by process"):
            RunLock(run).__enter__()


def test_new_rows_and_checkpoints_are_seen(client, run):
    before = entry(client)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({**last, "step": 13, "loss": 0.5, "tokens": 99}) + '\n{"kind": "train", "step": 14')
    found = entry(client)
    assert (found["step"], found["loss"], found["tokens"], found["val_loss"]) == (13, 0.5, 99, before["val_loss"])
    shutil.rmtree(run / "checkpoints")
    assert entry(client)["parameters"] is None and entry(client)["size_bytes"] < before["size_bytes"]
    shutil.rmtree(run)
    assert client.get("/api/runs").json == [] and client.get("/api/runs/detail", run="runs/tiny").status == 404


def test_an_evaluation_far_from_the_end_is_found(client, run):
    expected = entry(client)["val_loss"]
    row = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    with open(run / "metrics.jsonl", "a") as file:
        file.writelines(json.dumps({**row, "step": step}) + "\n" for step in range(13, 6_000))
    shutil.copytree(run, run.with_name("copy"))
    assert entry(client)["val_loss"] == expected and entry(client, "runs/copy")["val_loss"] == expected


def test_a_row_about_many_layers_at_the_end_hides_no_figures(client, run):
    expected = entry(client)
    norms = {f"model.layers.{number}.mlp.down_proj.weight": 0.5 for number in range(5_000)}
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"kind": "layers", "step": 12, "gradient_norms": norms, "update_ratios": norms}) + "\n")
    found = entry(client)
    assert (found["loss"], found["val_loss"], found["step"]) == (expected["loss"], expected["val_loss"], 12)


# -- what anybody may have left --------------------------------------------------------------------------------------------


def empty(run):
    for each in run.iterdir():
        if each.name != "config.toml":
            shutil.rmtree(each) if each.is_dir() else each.unlink()


def states(run, content):
    for each in run.glob("checkpoints/*/state.json"):
        each.write_text(content)


def manifests(run, content):
    for each in run.glob("checkpoints/*/manifest.json"):
        each.write_text(content)


def metrics(run, content):
    (run / "metrics.jsonl").write_text(content + "\n")


DAMAGE = {
    "settings": lambda run: (run / "config.toml").write_text("[train\nsteps = "),
    "settings of another program": lambda run: (run / "config.toml").write_text("train = 5\n[model]\nx = [1, {y = 2}]\n"),
    "a folder for settings": lambda run: ((run / "config.toml").unlink(), (run / "config.toml").mkdir()),
    "metrics": lambda run: (run / "metrics.jsonl").write_bytes(os.urandom(5_000)),
    "rows of other types": lambda run: metrics(run, '{"kind": "train", "step": 1, "loss": [1], "tokens": "x", "seconds": {}}'),
    "huge numbers": lambda run: metrics(run, '{"kind": "train", "step": 1, "loss": 1e999, "tokens": ' + "9" * 400 + "}"),
    "nesting": lambda run: metrics(run, "[" * 100_000),
    "state": lambda run: states(run, "[1, 2"),
    "state of other types": lambda run: states(run, '{"model": 5, "best": [], "data": 3, "config": "x", "tokens": "y"}'),
    "no manifest": lambda run: [each.unlink() for each in run.glob("checkpoints/*/manifest.json")],
    "manifest of other types": lambda run: manifests(run, '{"tensors": {"model": {"a": {"shape": "x"}}}}'),
    "environment": lambda run: (run / "environment.jsonl").write_bytes(b"\xff\xfe{}\n[]\n"),
    "samples": lambda run: (run / "samples.txt").write_bytes(b"=== step 5\n\xff\x00<script>alert(1)</script>\n"),
    "a best that is none": lambda run: (run / "checkpoints/best").write_text("x" * 10_000),
    "checkpoints that are a file": lambda run: (shutil.rmtree(run / "checkpoints"), (run / "checkpoints").write_text("")),
    "steps that are no numbers": lambda run: [(run / "checkpoints" / name).mkdir() for name in ("step-\u00b2", "step-", "step-" + "9" * 100)],
    "settings alone": empty,
    "rounds": lambda run: (run / "rounds.jsonl").write_text("no row\n"),
}
ROUTES = ("detail", "series", "layers", "samples", "faults", "tree", "rounds")


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_run_is_told_of_and_never_a_failure(client, run, damage):
    damage(run)
    shutil.copytree(client.app.workspace.root / "books", run.parent / "other")
    listed = client.get("/api/runs")
    assert listed.status == 200 and all(each["run"] == "runs/tiny" for each in listed.json)
    assert client.get("/api/models").status == 200
    for route in ROUTES:
        found = client.get(f"/api/runs/{route}", run="runs/tiny")
        assert found.status in (200, 400, 404), (route, found.content)
        assert found.status == 200 or found.message.endswith((".", "?")), found.message


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.toml", "samples.txt", "environment.jsonl", "checkpoints/step-00000012/state.json"])
def test_a_link_out_of_the_workspace_is_not_read(client, run, tmp_path, name):
    secret = tmp_path / "secret"
    secret.write_text("=== step 1\nthe secret\n")
    (run / name).unlink()
    (run / name).symlink_to(secret)
    assert client.get("/api/runs").status == 200
    for route in ROUTES:
        found = client.get(f"/api/runs/{route}", run="runs/tiny")
        assert found.status == 400 and "out of the workspace" in found.message and b"the secret" not in found.content


@pytest.mark.parametrize("name", ["metrics.jsonl", "config.toml", "samples.txt", ".lock", "rounds.jsonl", "checkpoints/latest"])
def test_a_pipe_is_not_waited_for(client, run, name):
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    assert client.get("/api/runs").status == 200 and client.get("/api/models").status == 200
    for route in ROUTES:
        assert client.get(f"/api/runs/{route}", run="runs/tiny").status in (200, 400)


def test_folders_of_checkpoints_that_lead_elsewhere(client, run, tmp_path):
    shutil.move(run / "checkpoints", tmp_path / "elsewhere")
    (run / "checkpoints").symlink_to(tmp_path / "elsewhere")
    (found,) = client.get("/api/runs").json
    assert "out of the workspace" in found["damaged"] and found["parameters"] is None
    assert client.get("/api/runs/detail", run="runs/tiny").status == 400


HOSTILE = ["<script>alert(1)<", "a b", "-x", "\u202eevil", "x\\..\\y", "x" * 200, "'\"`$(id)", "\u00e9\u4e2d", "%2e%2e"]


@pytest.mark.parametrize("name", HOSTILE)
def test_names_come_back_as_they_are(client, run, name):
    run.rename(run.with_name(name))
    (found,) = client.get("/api/runs").json
    assert found["run"] == f"runs/{name}" and found["name"] == name
    assert client.get("/api/runs/detail", run=found["run"]).json["run"] == found["run"]


def test_a_name_that_is_not_utf8_hides_only_itself(client, run):
    os.rename(os.fsencode(run), os.fsencode(run.parent) + b"/\xff\xfe")
    (run.parent / "new\nline").mkdir()
    assert client.get("/api/runs").json == [] and client.get("/api/models").status == 200 and client.get("/api/browse", path="runs").status == 200


WRONG = [
    "../x",
    "/etc",
    "runs/../../x",
    "runs/\0",
    "runs/a\nb",
    "x" * 5_000,
    "-runs",
    "~/runs",
    ".cllm",
    ".cllm/secret",
    "runs/tiny/../../.cllm",
    "\ud800",
]


@pytest.mark.parametrize("path", WRONG)
def test_paths_that_lead_elsewhere_are_refused(reader, path):
    asked = path.encode("utf-8", "surrogatepass")
    for route, name in [("runs/detail", "run"), ("runs/series", "run"), ("browse", "path"), ("download", "path"), ("models/inspect", "path"),
                        ("datasets/detail", "path"), ("datasets/samples", "path"), ("crawls/detail", "path")]:  # fmt: skip
        found = reader.get(f"/api/{route}", **{name: asked})
        assert found.status in (400, 404) and found.json["error"]["param"] in (name, None), (route, found.content)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({}, "run"), ({"run": "runs"}, "run"), ({"run": "runs/none"}, "run"), ({"run": ""}, "run"), ({"run": "runs/tiny", "x": "epoch"}, "x"),
        ({"run": "runs/tiny", "keys": "loss,<b>"}, "keys"), ({"run": "runs/tiny", "from": "nan"}, "from"),
        ({"run": "runs/tiny", "to": "1e9999"}, "to"),
        ({"run": "runs/tiny", "points": "0"}, "points"), ({"run": "runs/tiny", "points": "1e3"}, "points"), ({"run": ["runs/tiny", "b"]}, "run"),
        ({"run": "runs/tiny", "points": "9" * 5_000}, "points"), ({"run": "runs/tiny/metrics.jsonl"}, "run"),
    ],
)  # fmt: skip
def test_wrong_parameters_are_named(reader, query, param):
    found = reader.get("/api/runs/series", **query)
    assert found.status in (400, 404) and found.json["error"]["param"] == param, found.content


def test_a_store_counts_only_what_is_a_step(run):
    (run / "checkpoints" / "step-\u00b2").mkdir()
    assert CheckpointStore(run / "checkpoints").steps() == [8, 12]
