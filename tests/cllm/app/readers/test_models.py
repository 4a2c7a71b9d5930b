"""Models: listed whatever lies around, inspected without reading weights, deleted with an undo, brought in and taken away."""

import io
import json
import os
import shutil
import struct
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.app.talk import Talk
from cllm.checkpoint.header import read_header
from cllm.checkpoint.model_file import load
from cllm.monitor.guards import RunLock
from cllm.runtime.errors import CheckpointError


def listed(client):
    return {each["path"]: each for each in client.get("/api/models").json}


# -- listing and inspecting ------------------------------------------------------------------------------------------------


def test_runs_and_files_are_listed(reader, made):
    found = listed(reader)
    assert set(found) == {"chat.cllm", "runs/tiny"}
    model, tokenizer = load(made / "chat.cllm")
    file, run = found["chat.cllm"], found["runs/tiny"]
    assert (file["kind"], file["context"], file["has_chat"], file["loadable"]) == ("file", model.config.max_seq_len, True, True)
    assert file["parameters"] == model.config.num_parameters() and file["tokenizer"]["vocab_size"] == tokenizer.vocab_size
    assert (run["kind"], run["loadable"], run["has_chat"], run["state"], run["parent"]) == ("run", True, False, "finished", None)
    assert run["val_loss"] > 0 and run["tokenizer"]["vocab_size"] == 320
    assert [each["id"] for each in reader.get("/v1/models").json["data"]] == ["chat.cllm", "runs/tiny"]  # loaded when they are first asked


def test_a_hugging_face_folder_and_what_cannot_be_loaded(client, workspace):
    from cllm.interop.hf import save_hf

    model, tokenizer = load(workspace / "chat.cllm")
    save_hf(model, workspace / "hf", tokenizer)
    (workspace / "a.gguf").write_bytes(b"GGUF" + bytes(100))
    (workspace / "b.gguf").write_bytes(b"text")
    shutil.copytree(workspace / "hf", workspace / "strange")
    (workspace / "strange" / "config.json").write_text('{"architectures": ["Mamba"], "model_type": "mamba"}')
    found = listed(client)
    assert found["hf"]["loadable"] and found["hf"]["parameters"] == model.config.num_parameters() and found["hf"]["has_chat"]
    assert not found["strange"]["loadable"] and "Mamba" in found["strange"]["damaged"]
    assert not found["a.gguf"]["loadable"] and found["a.gguf"]["damaged"] is None and found["b.gguf"]["damaged"]
    inspected = client.get("/api/models/inspect", path="hf").json
    assert sum(len(each["shape"]) > 0 for each in inspected["tensors"]) == len(inspected["tensors"]) > 3 and inspected["model"]["vocab_size"]


def rewritten(source, place, **metadata):
    """A copy of a .cllm file with other words in its header."""
    content = source.read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    header["__metadata__"] |= metadata
    words = json.dumps(header).encode()
    place.write_bytes(len(words).to_bytes(8, "little") + words + content[8 + size :])


def test_a_file_that_cannot_be_loaded_says_why_in_the_list(client, workspace):
    source = workspace / "chat.cllm"
    config = json.loads(read_header(source).metadata["config"])
    wrong = {
        "format": ({"cllm_format": "9"}, "format version 9"),
        "config": ({"config": json.dumps(config | {"num_layers": 0})}, "num_layers"),
        "layers": ({"config": json.dumps(config | {"num_layers": config["num_layers"] + 1})}, "its configuration needs"),
        "vocab": ({"config": json.dumps(config | {"vocab_size": 8, "embed_dim": 1})}, ""),
        "tokenizer": ({"tokenizer": "{}"}, "tokenizer"),
    }
    for name, (metadata, _) in wrong.items():
        rewritten(source, workspace / f"{name}.cllm", **metadata)
    found = listed(client)
    for name, (_, words) in wrong.items():
        assert not found[f"{name}.cllm"]["loadable"] and words in found[f"{name}.cllm"]["damaged"], name
        assert client.post("/api/llm/load", {"path": f"{name}.cllm"}).status == 400
    assert found["chat.cllm"]["loadable"] and found["chat.cllm"]["damaged"] is None


def test_a_file_whose_weights_are_damaged_stands_as_that_once_it_was_asked_for(client, workspace):
    place = workspace / "chat.cllm"
    content = place.read_bytes()
    place.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert listed(client)["chat.cllm"]["loadable"]  # its weights are not read for a list
    answer = client.post("/api/llm/load", {"path": "chat.cllm"})
    assert answer.status == 400 and answer.message.startswith("chat.cllm is damaged")
    found = listed(client)["chat.cllm"]
    assert not found["loadable"] and "SHA-256 does not match" in found["damaged"]
    assert client.get("/api/models/inspect", path="chat.cllm").json["damaged"] == found["damaged"]
    place.write_bytes(content)
    assert listed(client)["chat.cllm"]["loadable"]


def test_a_run_whose_newest_checkpoint_is_damaged_is_talked_to_as_of_an_older_one(client, workspace):
    folder = workspace / "runs/tiny/checkpoints"
    last = max(folder.glob("step-*"))
    shutil.copytree(last, folder / "step-00000099")
    weights = folder / "step-00000099" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    found = listed(client)["runs/tiny"]
    assert found["loadable"] and "step 99" in found["damaged"]
    shutil.rmtree(weights.parent)
    for each in folder.glob("step-*/model.safetensors"):
        each.write_bytes(each.read_bytes()[:-8])
    found = listed(client)["runs/tiny"]
    assert not found["loadable"] and "model.safetensors" in found["damaged"]


def test_inspecting_reads_no_weights_and_tells_shapes_files_and_ancestry(client, workspace):
    found = client.get("/api/models/inspect", path="runs/tiny").json
    assert found["step"] == 12 and found["model"]["embed_dim"] == 32 and found["data"]["train"]["tokens"] > 0 and found["lineage"] == []
    assert {each["name"] for each in found["files"]} >= {"model.safetensors", "manifest.json"}
    (embedding,) = [each for each in found["tensors"] if each["name"] == "model.embed_tokens.weight"]
    assert embedding["shape"] == [320, 32] and embedding["bytes"] == 320 * 32 * 4
    for name, start in (("b", "runs/tiny"), ("c", "runs/b")):
        shutil.copytree(workspace / "runs/tiny", workspace / "runs" / name)
        for place in (workspace / "runs" / name).glob("checkpoints/*/state.json"):
            state = json.loads(place.read_text())
            state["config"]["finetune"]["start_from"] = str(workspace / start)
            place.write_text(json.dumps(state))
    found = client.get("/api/models/inspect", path="runs/c").json
    assert found["lineage"] == [{"path": "runs/b", "exists": True}, {"path": "runs/tiny", "exists": True}] and found["parent"] == "runs/b"


@pytest.mark.parametrize("path", ["books", "books/0.txt", "sets/books", "runs", "runs/tiny/config.toml", ""])
def test_what_is_no_model_is_refused(reader, path):
    found = reader.get("/api/models/inspect", path=path)
    assert found.status in (400, 404) and found.message.endswith(".")


HEADERS = [
    b"", b"x", bytes(8), struct.pack("<Q", 2**63) + b"{}", struct.pack("<Q", 2) + b"[]", struct.pack("<Q", 2) + b"{}" + b"more",
    *(struct.pack("<Q", len(each)) + each for each in (
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": 5}', b'{"__metadata__": []}', b'{"__metadata__": {"cllm_format": 1}}', b'{"a": {"dtype": "F32", "shape": "x", "data_offsets": []}}',
        b'{"__metadata__": {"cllm_format": "1", "config": "[", "tokenizer": "["}}', b"[" * 50_000,
    )),
]  # fmt: skip


@pytest.mark.parametrize("content", HEADERS)
def test_the_list_survives_garbage(client, workspace, content):
    (workspace / "bad.cllm").write_bytes(content)
    for name in ("hf", "hf2"):
        (workspace / name).mkdir()
        (workspace / name / "model.safetensors").write_bytes(content)
        (workspace / name / "config.json").write_bytes(content if name == "hf" else b'{"model_type": "llama"}')
    (workspace / "dir.cllm").mkdir()
    found = listed(client)
    assert {"chat.cllm", "runs/tiny", "bad.cllm", "hf", "hf2"} <= set(found) and found["chat.cllm"]["loadable"]
    assert not found["bad.cllm"]["loadable"] and not found["hf"]["loadable"] and not found["hf2"]["loadable"]
    assert client.get("/api/models/inspect", path="bad.cllm").status in (200, 400)
    assert client.get("/api/models/inspect", path="hf").status in (200, 400)


@given(st.binary(max_size=200), st.integers(0, 60))
@settings(max_examples=60, deadline=None)
def test_a_header_is_read_or_refused(tmp_path_factory, made, content, place):
    """Bytes of a real file that were changed: a header that makes no sense is a CheckpointError and nothing else."""
    whole = (made / "chat.cllm").read_bytes()
    file = tmp_path_factory.mktemp("header") / "x.cllm"
    file.write_bytes(whole[:place] + content + whole[place + len(content) :])
    try:
        header = read_header(file)
    except CheckpointError as error:
        assert "x.cllm" in str(error)
    else:
        assert header.num_parameters >= 0


def test_the_sample_model_becomes_a_file_of_the_workspace_and_stays_what_it_is(client, workspace):
    path = client.post("/api/models/sample").json["path"]
    found = listed(client)[path]
    model, tokenizer = load("sample")
    assert (found["kind"], found["dtype"], found["loadable"], found["has_chat"], found["damaged"]) == ("file", "I8", True, False, None)
    assert found["parameters"] == model.config.num_parameters() and found["tokenizer"]["vocab_size"] == tokenizer.vocab_size
    shutil.copy(workspace / "chat.cllm", workspace / path)
    assert client.post("/api/models/sample").json["path"] == path and listed(client)[path]["has_chat"], "a file that is there is not replaced"


# -- deleting --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", ["runs/tiny", "chat.cllm"])
def test_deleting_can_be_undone(client, workspace, path):
    before = {each: each.read_bytes() for each in (workspace / path).rglob("*") if each.is_file()} or (workspace / path).read_bytes()
    trash = client.post("/api/models/delete", {"path": path}).json["trash"]
    assert path not in listed(client) and not (workspace / path).exists()
    (entry,) = client.get("/api/trash").json
    assert entry["id"] == trash and entry["path"] == path and entry["bytes"] > 1_000
    assert client.post("/api/models/restore", {"trash": trash}).json == {"path": path}
    after = {each: each.read_bytes() for each in (workspace / path).rglob("*") if each.is_file()} or (workspace / path).read_bytes()
    assert after == before and client.get("/api/trash").json == [] and path in listed(client)
    assert client.post("/api/models/restore", {"trash": trash}).status == 404


def test_something_else_in_its_place_is_not_overwritten(client, workspace):
    trash = client.post("/api/models/delete", {"path": "chat.cllm"}).json["trash"]
    (workspace / "chat.cllm").write_text("mine")
    assert client.post("/api/models/restore", {"trash": trash}).status == 409 and (workspace / "chat.cllm").read_text() == "mine"
    (workspace / "chat.cllm").unlink()
    assert client.post("/api/models/restore", {"trash": trash}).status == 200


def test_the_trash_can_be_emptied(client, workspace):
    trash = client.post("/api/models/delete", {"path": "chat.cllm"}).json["trash"]
    assert client.post("/api/trash/forget", {"trash": trash}).json["bytes"] > 1_000
    assert client.get("/api/trash").json == [] and not list((workspace / ".cllm" / "trash").iterdir())


def test_a_run_that_is_trained_is_not_deleted(client, workspace):
    with RunLock(workspace / "runs/tiny"):
        found = client.post("/api/models/delete", {"path": "runs/tiny"})
    assert found.status == 409 and "is being trained by process" in found.message and (workspace / "runs/tiny").is_dir()


def test_a_model_that_is_loaded_is_deleted_unless_it_is_answering(client, workspace):
    assert client.post("/api/llm/load", {"path": "chat.cllm"}).status == 200
    talk = client.app.part(Talk)
    with talk._service._using("chat.cllm"):
        found = client.post("/api/models/delete", {"path": "chat.cllm"})
        assert found.status == 409 and "is answering somebody" in found.message and (workspace / "chat.cllm").is_file()
    assert client.post("/api/models/delete", {"path": "chat.cllm"}).status == 200
    assert talk.loaded() == [] and not (workspace / "chat.cllm").exists()


@pytest.mark.parametrize("path", ["", ".", "books", "..", ".cllm", ".cllm/secret", "runs", "runs/tiny/checkpoints", None, 5, ["a"]])
def test_nothing_but_models_is_deleted(client, workspace, path):
    assert client.post("/api/models/delete", {"path": path}).status in (400, 404)
    assert (workspace / "books").is_dir() and (workspace / "runs/tiny/checkpoints").is_dir()


@pytest.mark.parametrize("trash", ["", "..", "../..", "0" * 16, "x" * 16, None, 5, "\u0660" * 16])
def test_ids_of_the_trash_are_no_paths(client, trash):
    for route in ("models/restore", "trash/forget"):
        assert client.post(f"/api/{route}", {"trash": trash}).status in (400, 404)


@pytest.mark.parametrize("damage", ["", "[]", '{"path": 5}', '{"path": "../../x", "kind": "run", "bytes": 1, "deleted": 1}'])
def test_a_damaged_entry_of_the_trash_hides_only_itself(client, workspace, damage):
    kept = client.post("/api/models/delete", {"path": "chat.cllm"}).json["trash"]
    other = client.post("/api/models/delete", {"path": "runs/tiny"}).json["trash"]
    (workspace / ".cllm" / "trash" / other / "entry.json").write_text(damage)
    assert kept in {each["id"] for each in client.get("/api/trash").json}
    assert client.post("/api/models/restore", {"trash": other}).status in (400, 404) and not (workspace.parent / "x").exists()


# -- bringing in and taking away -------------------------------------------------------------------------------------------


def test_a_model_is_brought_in_under_a_name_of_its_own(client, workspace):
    content = (workspace / "chat.cllm").read_bytes()
    found = client.post("/api/models/import", content, kind="cllm")
    assert found.status == 201 and found.json["bytes"] == len(content) and (workspace / found.json["path"]).read_bytes() == content
    again = client.post("/api/models/import", content, kind="cllm").json["path"]
    assert again != found.json["path"] and {again, found.json["path"]} <= set(listed(client))


@pytest.mark.parametrize("cut", [b"", b"text", slice(0, 100), slice(0, -1)])
def test_what_is_no_model_is_not_brought_in(client, workspace, cut):
    content = cut if isinstance(cut, bytes) else (workspace / "chat.cllm").read_bytes()[cut]
    assert client.post("/api/models/import", content, kind="cllm").status == 400
    assert not (workspace / "models").exists() and not list((workspace / ".cllm/uploads").iterdir())


def sent(files):
    """The body that brings a folder."""
    listed = [{"name": name, "bytes": len(content)} for name, content in files.items()]
    return json.dumps(listed).encode() + b"\n" + b"".join(files.values())


@pytest.fixture
def folder(workspace, tmp_path):
    """The files of a Hugging Face folder."""
    from cllm.interop.hf import save_hf

    save_hf(*(parts := load(workspace / "chat.cllm"))[:1], tmp_path / "hf", parts[1])
    return {each.name: each.read_bytes() for each in sorted((tmp_path / "hf").iterdir())}


def test_a_hugging_face_folder_is_brought_in_and_can_be_talked_to(client, workspace, folder):
    found = client.post("/api/models/import", sent(folder), kind="hf", name="My model!")
    assert found.status == 201 and found.json["path"] == "models/My-model"
    assert {each.name: each.read_bytes() for each in (workspace / "models/My-model").iterdir()} == folder
    assert client.post("/api/models/import", sent(folder), kind="hf", name="../My model").json["path"] == "models/My-model-2"
    assert listed(client)["models/My-model"]["loadable"] and not list((workspace / ".cllm/uploads").iterdir())


@pytest.mark.parametrize("harm, words", [
    (lambda files: files | {"modeling.py": b"import os"}, "is not taken"),
    (lambda files: files | {"../x.safetensors": b"x"}, "is not taken"),
    (lambda files: files | {".safetensors": b"x"}, "is not taken"),
    (lambda files: files | {"pytorch_model.bin": b"x"}, "is not taken"),
    (lambda files: {name: files[name] for name in files if not name.endswith(".safetensors")}, "no .safetensors weights"),
    (lambda files: {name: files[name] for name in files if name != "config.json"}, "Choose the one in which config.json lies"),
    (lambda files: files | {"config.json": b"[]"}, "is damaged"),
    (lambda files: files | {"config.json": b'{"architectures": ["Mamba"]}'}, "Mamba"),
    (lambda files: files | {"model.safetensors": b"x" * 100}, "not a readable safetensors file"),
    (lambda files: sent(files)[:-1], "did not arrive whole"),
    (lambda files: sent(files) + b"x", "did not arrive whole"),
    (lambda files: b"no list\n" + b"x" * 100, "is no folder"),
    (lambda files: b'[{"name": "config.json"}]\n', "is no folder"),
    (lambda files: b'[{"name": "config.json", "bytes": -1}]\n', "is no folder"),
    (lambda files: b'[{"name": "config.json", "bytes": 0}, {"name": "config.json", "bytes": 0}]\n', "is no folder"),
    (lambda files: b'{"name": "config.json"}\n', "is no folder"),
    (lambda files: b"[" * 100_000, "is no folder"),
])  # fmt: skip
def test_a_folder_that_is_no_model_leaves_nothing(client, workspace, folder, harm, words):
    harmed = harm(folder)
    found = client.post("/api/models/import", harmed if isinstance(harmed, bytes) else sent(harmed), kind="hf", name="x")
    assert found.status == 400 and words in found.message and str(workspace) not in found.message, found.message
    assert not (workspace / "models").exists() and not list((workspace / ".cllm/uploads").iterdir())


def test_a_folder_comes_as_a_zip_and_a_file_as_it_is(reader, made):
    found = reader.get("/api/download", path="runs/tiny")
    assert found.status == 200 and "tiny.zip" in found.headers["content-disposition"] and found.headers["content-type"] == "application/zip"
    with zipfile.ZipFile(io.BytesIO(found.content)) as archive:
        assert archive.testzip() is None
        expected = {f"tiny/{each.relative_to(made / 'runs/tiny')}": each.read_bytes() for each in (made / "runs/tiny").rglob("*") if each.is_file()}
        assert {each.filename: archive.read(each) for each in archive.infolist()} == expected
    file = reader.get("/api/download", path="chat.cllm")
    assert file.content == (made / "chat.cllm").read_bytes() and file.headers["content-disposition"].startswith("attachment")


def test_a_large_folder_is_sent_piece_by_piece(client, workspace):
    (workspace / "large").mkdir()
    with open(workspace / "large" / "file.txt", "wb") as file:
        file.truncate(20 << 20)
    found = client.get("/api/download", path="large")
    assert max(map(len, found.parts)) < 4 << 20 and len(found.content) > 20 << 20


def test_links_pipes_and_hidden_files_are_not_sent(client, workspace, tmp_path):
    (tmp_path / "secret").write_text("the secret")
    folder = workspace / "folder"
    folder.mkdir()
    (folder / "a.txt").write_text("a")
    (folder / ".hidden").write_text("the secret")
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "links").symlink_to(tmp_path)
    os.mkfifo(folder / "pipe")
    with zipfile.ZipFile(io.BytesIO(client.get("/api/download", path="folder").content)) as archive:
        assert archive.namelist() == ["folder/a.txt"]
    for path in ("folder/link", "folder/links", "folder/links/secret", "folder/pipe", ""):
        assert client.get("/api/download", path=path).status == 400


@pytest.mark.parametrize("name", ['a"b.txt', "a\r\nx: y.txt", "\u00e9\u4e2d.txt", "x" * 200 + ".txt"])
def test_a_files_name_stands_safely_in_the_header(client, workspace, name):
    if "\n" in name:
        assert client.get("/api/download", path=f"books/{name}").status == 400
        return
    (workspace / "books" / name).write_text("a")
    found = client.get("/api/download", path=f"books/{name}")
    assert found.status == 200 and found.headers["content-disposition"].isascii() and '"' not in found.headers["content-disposition"]
