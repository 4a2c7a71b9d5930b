"""Folders to choose from, and files that arrive: no name leads anywhere, nothing is overwritten, and nothing half is left."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.app.readers import uploads
from cllm.app.readers.uploads import SUFFIXES, safe_name
from cllm.serve.errors import Refused


def test_browsing(client, workspace):
    (workspace / "books" / ".hidden").write_text("")
    (workspace / "books" / "sub").mkdir()
    (workspace / "books" / "inside").symlink_to(workspace / "sets")
    (workspace / "books" / "outside").symlink_to(workspace.parent)
    top = client.get("/api/browse").json
    assert [each["name"] for each in top["folders"]] == ["books", "pages", "runs", "sets"] and top["parent"] is None and top["path"] == ""
    found = client.get("/api/browse", path="books").json
    assert [each["path"] for each in found["folders"]] == ["books/inside", "books/sub"] and found["parent"] == ""
    assert {"name": "short.txt", "path": "books/short.txt", "bytes": 9} in found["files"] and client.get("/api/browse", path="books/sub").json[
        "parent"
    ] == "books"
    assert client.get("/api/browse", path="books/short.txt").status == 400 and client.get("/api/browse", path="nowhere").status == 404


def test_an_upload(client, workspace):
    found = client.post("/api/uploads", b"some text", into="uploads/new", name="My notes.txt")
    assert found.status == 201 and found.json == {"path": "uploads/new/My-notes.txt", "bytes": 9}
    again = client.post("/api/uploads", b"other", into="uploads/new", name="My notes.txt").json["path"]
    assert again == "uploads/new/My-notes-2.txt" and (workspace / "uploads/new/My-notes.txt").read_bytes() == b"some text"


NAMES = {
    "../../etc/cron.txt": "cron.txt", "/etc/passwd.txt": "passwd.txt", "..\\..\\x.md": "x.md", "-rf.txt": "rf.txt", ".bashrc.txt": "bashrc.txt",
    "a\0b\n.txt": "a-b.txt", "<script>.html": "script.html", "\u00e9t\u00e9.txt": "\u00e9t\u00e9.txt", "x.tar.gz": "x.tar.gz", "A B.TXT": "A-B.txt",
    ".txt.txt": "txt.txt", "x" * 500 + ".txt": "x" * 80 + ".txt", "a..b.txt": "a-b.txt", "\u202etxt.exe.txt": "txt.exe.txt",
}  # fmt: skip


@pytest.mark.parametrize(("given", "kept"), NAMES.items())
def test_names(given, kept):
    assert safe_name(given) == kept


@pytest.mark.parametrize("name", ["a.exe", "a", "", ".txt", "a.txt.exe", "a.sh.exe.", "a.exe.gz", "x" * 5_000 + ".so", "a.pkl", "a.pt"])
def test_what_is_not_on_the_list_is_not_taken(client, workspace, name):
    found = client.post("/api/uploads", b"x", into="uploads", name=name)
    assert found.status == 400 and found.json["error"]["param"] == "name" and not (workspace / "uploads").exists()


@given(st.text(max_size=60), st.sampled_from(sorted(SUFFIXES)))
def test_every_name_is_a_plain_one(text, suffix):
    try:
        name = safe_name(text + suffix)
    except Refused:
        return
    assert "/" not in name and "\\" not in name and not name.startswith((".", "-")) and name.isprintable() and len(os.fsencode(name)) < 255
    assert name.endswith(suffix) and ".." not in name


@pytest.mark.parametrize("into", ["", ".", "..", "../x", "/tmp", ".cllm", ".cllm/uploads", "books/short.txt", "-x"])
def test_places_that_are_none(client, into):
    assert client.post("/api/uploads", b"x", into=into, name="a.txt").status == 400


def test_an_upload_into_a_link_out_of_the_workspace_is_refused(client, workspace):
    (workspace / "out").symlink_to(workspace.parent)
    assert client.post("/api/uploads", b"x", into="out", name="a.txt").status == 400 and not (workspace.parent / "a.txt").exists()


def pieces(*contents, last=True):
    messages = [{"type": "http.request", "body": each, "more_body": True} for each in contents]
    return [*messages, {"type": "http.request", "body": b"", "more_body": False} if last else {"type": "http.disconnect"}]


def upload(client, messages, headers=()):
    return client.ask("POST", "/api/uploads", {"into": "uploads", "name": "a.txt"}, b"", headers, messages)


def test_a_body_in_pieces(client, workspace):
    assert upload(client, pieces(b"one ", b"two ", b"three")).json["bytes"] == 13
    assert (workspace / "uploads/a.txt").read_bytes() == b"one two three"


@pytest.mark.parametrize("messages", [pieces(b"one", last=False), pieces(), pieces(b"")], ids=["client left", "empty", "nothing"])
def test_what_does_not_arrive_leaves_nothing(client, workspace, messages):
    upload(client, messages)
    assert not (workspace / "uploads").exists() and not list((workspace / ".cllm/uploads").iterdir())


def test_a_body_that_is_shorter_than_announced_leaves_nothing(client, workspace):
    upload(client, pieces(b"one"), [("content-length", "10")])
    assert not (workspace / "uploads").exists()


def test_limits(client, workspace, monkeypatch):
    monkeypatch.setattr(uploads, "MOST_BYTES", 100)
    assert upload(client, pieces(b"x" * 60, b"x" * 60)).status == 413
    assert client.post("/api/uploads", b"x" * 101, into="uploads", name="a.txt").status == 413
    monkeypatch.setattr(uploads, "KEPT_FREE", 1 << 60)
    assert client.post("/api/uploads", b"x", into="uploads", name="a.txt").status == 507
    assert not (workspace / "uploads").exists() and not list((workspace / ".cllm/uploads").iterdir())


def test_a_body_that_stalls_is_given_up(client, workspace, monkeypatch):
    monkeypatch.setattr(uploads, "IDLE_SECONDS", 0.05)
    assert upload(client, pieces(b"one")[:1]).status == 408
    assert not list((workspace / ".cllm/uploads").iterdir())


def test_an_upload_of_another_kind_of_body_is_refused(client):
    assert client.post("/api/uploads", {"a": 1}, into="uploads", name="a.txt").status == 415
