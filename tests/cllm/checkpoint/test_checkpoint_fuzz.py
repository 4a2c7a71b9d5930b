"""Whatever bytes lie where a checkpoint should be: it loads, or one clear line says why not. No crash, no hang, no code run, nothing written.

The first tests damage files; the others are hostile: their digests are right and what they say is not. Cases that once failed stay as examples.
"""

import copy
import hashlib
import json
import os
import shutil
import struct

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from cllm.checkpoint.folder import _manifest_digest, read_checkpoint
from cllm.checkpoint.model_file import _content_digest, load, save
from cllm.checkpoint.place import MANIFEST
from cllm.checkpoint.safetensors import sha256_of, write_safetensors
from cllm.checkpoint.store import CheckpointStore
from cllm.checkpoint.tools import inspect, verify_all
from cllm.checkpoint.weights import weights_of
from cllm.config.model import ModelConfig
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.model.model import Model
from cllm.runtime.errors import CheckpointError, CLLMError

FUZZ = settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
TOKENIZER = Tokenizer.train(["one two three"], vocab_size=300, kind="char")
CONFIG = ModelConfig(vocab_size=TOKENIZER.vocab_size, embed_dim=16, num_layers=1, num_heads=2, max_seq_len=8)
FILES = ("model.safetensors", "optimizer.safetensors", "state.json", MANIFEST)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
damages = st.tuples(st.sampled_from(["flip", "cut", "insert", "zero", "move"]), st.floats(0, 1, exclude_max=True), st.binary(min_size=1, max_size=9))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A whole run with its tokenizer, and the same model as one file."""
    folder = tmp_path_factory.mktemp("good")
    model = Model(CONFIG, seed=1)
    moments = {f"exp_avg.{name}": torch.zeros_like(each) for name, each in weights_of(model).items()}
    state = {"model": CONFIG.to_dict(), "tokenizer_hash": TOKENIZER.hash}
    CheckpointStore(folder / "run" / "checkpoints").save(5, weights_of(model), moments, state)
    TOKENIZER.save(folder / "run" / "tokenizer.json")
    save(model, folder / "model.cllm", TOKENIZER)
    return folder


def damaged(content, damage):
    kind, where, filling = damage
    place = int(where * max(1, len(content)))
    if kind == "flip":
        return content[:place] + bytes([content[place] ^ (filling[0] or 1)]) + content[place + 1 :]
    if kind == "cut":
        return content[:place]
    if kind == "insert":
        return content[:place] + filling + content[place:]
    if kind == "zero":
        return content[:place] + bytes(len(content) - place)
    return content[place:] + content[:place]


def outcome(call, *arguments):
    """What a call returns, or the one line that it was refused with."""
    try:
        return call(*arguments)
    except CLLMError as error:
        assert "\n" not in str(error) and 10 < len(str(error)) < 1500, str(error)
        return None


def says_the_same(after, before):
    """The manifest's own digest is of what it says: a blank more or less changes nothing."""
    try:
        return json.loads(after) == json.loads(before)
    except ValueError:
        return False


def is_the_model(loaded, folder):
    expected = weights_of(load(folder / "model.cllm")[0])
    return all(torch.equal(each, expected[name]) for name, each in weights_of(loaded[0]).items())


@FUZZ
@given(name=st.sampled_from(FILES), damage=damages)
@example(name=MANIFEST, damage=("insert", 0.0, b" "))
def test_a_damaged_checkpoint_is_refused_or_was_not_touched_where_it_matters(good, tmp_path_factory, name, damage):
    folder = tmp_path_factory.mktemp("damaged")
    shutil.copytree(good / "run", folder, dirs_exist_ok=True)
    path = folder / "checkpoints" / "step-00000005"
    before = (path / name).read_bytes()
    after = damaged(before, damage)
    (path / name).write_bytes(after)
    same = after == before or (name == MANIFEST and says_the_same(after, before))
    assert (outcome(read_checkpoint, path) is not None) == same
    loaded = outcome(load, folder)  # reads no optimizer
    assert loaded is None or is_the_model(loaded, good)
    assert outcome(inspect, path) is None or same
    assert [problem is None for _, problem in verify_all(path)] == [same]
    shutil.rmtree(folder)


@FUZZ
@given(damage=damages)
def test_a_damaged_file_is_refused(good, tmp_path_factory, damage):
    path = tmp_path_factory.mktemp("damaged") / "model.cllm"
    before = (good / "model.cllm").read_bytes()
    after = damaged(before, damage)
    path.write_bytes(after)
    assert (outcome(load, path) is not None) == (after == before)


@FUZZ
@given(content=st.binary(max_size=200))
@example(content=struct.pack("<Q", 2**63) + b"{}")
@example(content=struct.pack("<Q", 2) + b"{}")
@example(content=struct.pack("<Q", 100_000_001) + b"{}")
@example(content=b"\x80\x04\x95")
def test_arbitrary_bytes_are_no_model(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("foreign") / "model.cllm"
    path.write_bytes(content)
    assert outcome(load, path) is None


@FUZZ
@given(header=st.dictionaries(st.text(max_size=8), json_values | st.fixed_dictionaries({
    "dtype": st.sampled_from(["F32", "BF16", "I64", "F4", "?"]), "shape": st.lists(st.integers(-1, 2**64), max_size=3),
    "data_offsets": st.lists(st.integers(-1, 2**64), max_size=3)}), max_size=3))  # fmt: skip
def test_headers_with_wrong_sizes_are_refused(tmp_path_factory, header):
    path = tmp_path_factory.mktemp("header") / "model.cllm"
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(64))
    assert outcome(load, path) is None


def resealed(path, manifest):
    """Gives a changed checkpoint digests that are right."""
    for name in FILES[:3]:
        if isinstance(manifest.get("files"), dict) and isinstance(manifest["files"].get(name), dict):
            manifest["files"][name].update(bytes=(path / name).stat().st_size, sha256=sha256_of(path / name))
    (path / MANIFEST).write_text(json.dumps({**manifest, "sha256": _manifest_digest(manifest)}))


def replaced(content, steps, value):
    """`value` somewhere inside `content`: `steps` choose among keys on the way down."""
    content = copy.deepcopy(content)
    here = content
    for step in steps:
        keys = sorted(here) if isinstance(here, dict) else list(range(len(here)))
        key = keys[step % len(keys)]
        if step == steps[-1] or not isinstance(here[key], dict | list) or not here[key]:
            here[key] = value
            break
        here = here[key]
    return content


@FUZZ
@given(steps=st.lists(st.integers(0, 50), min_size=1, max_size=4), value=json_values)
@example(steps=[0, 0], value={"bytes": 1})
@example(steps=[14], value={"": {}})  # tensors of other files
@example(steps=[1], value={"../../../etc/passwd": {"bytes": 1, "sha256": "0"}})
@example(steps=[1], value={"state.json": []})
def test_a_hostile_manifest_is_refused(good, tmp_path_factory, steps, value):
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copytree(good / "run", folder, dirs_exist_ok=True)
    path = folder / "checkpoints" / "step-00000005"
    resealed(path, replaced(json.loads((path / MANIFEST).read_text()), steps, value))
    loaded = outcome(load, folder)
    assert loaded is None or is_the_model(loaded, good)
    outcome(inspect, folder)
    assert len(outcome(verify_all, folder)) == 1
    shutil.rmtree(folder)


@FUZZ
@given(steps=st.lists(st.integers(0, 50), min_size=1, max_size=4), value=json_values)
@example(steps=[0, 11], value=10**12)  # num_layers
@example(steps=[0, 3], value=10**15)  # embed_dim
@example(steps=[0, 10], value=10**18)  # max_seq_len
def test_a_hostile_state_is_refused(good, tmp_path_factory, steps, value):
    folder = tmp_path_factory.mktemp("hostile")
    shutil.copytree(good / "run", folder, dirs_exist_ok=True)
    path = folder / "checkpoints" / "step-00000005"
    (path / "state.json").write_text(json.dumps(replaced(json.loads((path / "state.json").read_text()), steps, value)))
    resealed(path, json.loads((path / MANIFEST).read_text()))
    loaded = outcome(load, folder)
    assert loaded is None or is_the_model(loaded, good)
    outcome(inspect, folder)
    shutil.rmtree(folder)


@FUZZ
@given(
    key=st.sampled_from(["config", "tokenizer", "tokenizer_hash", "cllm_format"]), value=json_values, steps=st.lists(st.integers(0, 50), max_size=3)
)
@example(key="config", value="[" * 100_000, steps=[])
@example(key="tokenizer", value="[" * 100_000, steps=[])
@example(key="config", value=[], steps=[])
def test_a_hostile_file_is_refused(good, tmp_path_factory, key, value, steps):
    path = tmp_path_factory.mktemp("hostile") / "model.cllm"
    metadata = {
        "format": "pt", "cllm_format": "1", "config": json.dumps(CONFIG.to_dict()),
        "tokenizer": TOKENIZER.to_json(), "tokenizer_hash": TOKENIZER.hash,
    }  # fmt: skip
    whole = json.loads(metadata[key]) if key in ("config", "tokenizer") else metadata[key]
    new = replaced(whole, steps, value) if steps and isinstance(whole, dict) else value
    metadata[key] = new if isinstance(new, str) else json.dumps(new)
    if key == "tokenizer":  # the hash of what it would be read as
        metadata["tokenizer_hash"] = hashlib.sha256(metadata[key].encode("utf-8", "replace")).hexdigest()
        try:
            metadata["tokenizer_hash"] = Tokenizer.from_json(metadata[key]).hash
        except CLLMError:
            metadata.pop("tokenizer_hash")
    weights = weights_of(Model(CONFIG, seed=1))
    metadata["sha256"] = _content_digest(weights, metadata)
    try:
        write_safetensors(path, weights, metadata)
    except UnicodeEncodeError:  # half of a surrogate pair cannot be in a file
        return
    loaded = outcome(load, path)
    assert loaded is None or is_the_model(loaded, good)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "loop", "dangling"])
def test_what_is_no_regular_file_is_refused_without_waiting(good, tmp_path, name, kind):
    shutil.copytree(good / "run", tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-00000005" / name
    path.unlink()
    {"pipe": lambda: os.mkfifo(path), "device": lambda: path.symlink_to("/dev/zero"), "folder": path.mkdir, "loop": lambda: path.symlink_to(path),
     "dangling": lambda: path.symlink_to("nowhere")}[kind]()  # fmt: skip
    with pytest.raises(CheckpointError):
        read_checkpoint(path.parent)
    outcome(load, tmp_path / "run")
    assert verify_all(tmp_path / "run")[0][1] is not None


def test_a_pipe_in_place_of_a_model_is_refused(tmp_path):
    os.mkfifo(tmp_path / "model.cllm")
    with pytest.raises(CheckpointError):
        load(tmp_path / "model.cllm")


def test_a_manifest_deeper_than_pythons_stack_or_larger_than_any_is_refused(good, tmp_path):
    shutil.copytree(good / "run", tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-00000005"
    (path / MANIFEST).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(path)
    with open(path / MANIFEST, "wb") as file:
        file.truncate(65 << 20)
    with pytest.raises(CheckpointError, match="too many"):
        read_checkpoint(path)
