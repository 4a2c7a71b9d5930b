"""Conversations on the disk: what is written is read as it was, found by its words, and nobody's file is followed or believed."""

import json
import os

import pytest

from cllm.app.readers.conversations import MOST_BYTES, Conversations
from cllm.serve.errors import Refused


def conversation(title="Owls", text="What do owls eat?", **more):
    node = {"id": "n1", "parent": None, "role": "user", "text": text}
    return {"version": 1, "title": title, "mode": "chat", "threads": [{"model": "runs/demo", "nodes": {"n1": node}}], **more}


@pytest.fixture
def kept(tmp_path):
    return Conversations(tmp_path)


def test_what_is_written_is_read_by_another_process_as_it_was(kept, tmp_path):
    value = conversation(text="ein Käuzchen 🦉 <script>alert(1)</script>")
    identity = kept.create(value)
    assert Conversations(tmp_path).read(identity) == value
    kept.replace(identity, value | {"title": "Birds"})
    (entry,) = Conversations(tmp_path).list()
    assert (entry["id"], entry["title"], entry["mode"], entry["model"], entry["messages"]) == (identity, "Birds", "chat", "runs/demo", 1)
    kept.delete(identity)
    assert kept.list() == [] and list(tmp_path.iterdir()) == []


def test_a_search_finds_words_of_titles_and_messages_and_sees_changes(kept):
    owls, ships = kept.create(conversation()), kept.create(conversation("Ships", "How does a SAIL work?"))
    found = lambda query: [each["id"] for each in kept.list(query)]  # noqa: E731
    assert found("owls eat") == [owls] and found("sail") == [ships] and found("sail owls") == []
    assert set(found("")) == {owls, ships}
    kept.replace(owls, conversation(text="about sails"))
    assert set(found("sail")) == {owls, ships}


@pytest.mark.parametrize("name", ["../secret", "a" * 16 + "/..", "", "A" * 16, "0" * 15, "0" * 16])
def test_ids_that_the_app_has_not_made_name_nothing(kept, name, tmp_path):
    for act in (kept.read, kept.delete, lambda each: kept.replace(each, conversation())):
        with pytest.raises(Refused) as refused:
            act(name)
        assert refused.value.status == 404
    assert list(tmp_path.iterdir()) == []


def test_links_damage_and_sizes_are_left_out_of_the_list_and_stop_nothing(kept, tmp_path):
    good = kept.create(conversation())
    outside = tmp_path.parent / "outside.json"
    outside.write_text(json.dumps(conversation("secret")))
    (tmp_path / f"{'1' * 16}.json").symlink_to(outside)
    (tmp_path / f"{'2' * 16}.json").write_text("{")
    (tmp_path / f"{'3' * 16}.json").write_text('{"threads": {"n": 1}}')
    (tmp_path / f"{'4' * 16}.json").write_bytes(b"[" * 100_000)
    (tmp_path / f"{'5' * 16}.json").write_text(json.dumps({"threads": [1, {"nodes": [2]}, {"nodes": {"a": 3}}], "title": 4}))
    os.mkfifo(tmp_path / f"{'6' * 16}.json")
    assert {each["id"] for each in kept.list()} == {good, "5" * 16}
    with pytest.raises(Refused):
        kept.read("1" * 16)


def test_what_is_no_conversation_or_too_large_is_refused(kept, tmp_path):
    with pytest.raises(Refused, match="threads"):
        kept.create({"title": "x"})
    with pytest.raises(Refused, match="longer than 16 MB"):
        kept.create(conversation(text="x" * MOST_BYTES))
    assert list(tmp_path.iterdir()) == []
