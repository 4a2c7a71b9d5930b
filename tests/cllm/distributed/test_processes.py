"""Several processes train one model: with the same bits in deterministic mode, sharded or not, and from each other's checkpoints."""

import json
import re
import shutil

import process_jobs as jobs
import pytest
from processes import Pool

from cllm.checkpoint.model_file import load
from cllm.checkpoint.store import CheckpointStore
from cllm.data.pipeline import prepare
from cllm.monitor.metrics import TIME_FIELDS, read_metrics
from cllm.runtime.errors import CheckpointError

GPT2 = {"norm": "layer", "position": "learned", "activation": "gelu", "bias": True, "tie_embeddings": True, "num_kv_heads": 2}
NGRAMS = {"bigram_rows": 25, "trigram_rows": 31}


@pytest.fixture(scope="module")
def pool():
    with Pool(4) as processes:
        yield processes


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "text.txt").write_text("one two three many " * 150, encoding="utf-8")
    prepare(folder / "text.txt", folder / "tokens", tokenizer="char", val_fraction=0.05)
    return str(folder / "tokens")


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory):
    """The deterministic run of one process: (hash of the weights, step, loss, validation loss)."""
    return jobs.train(None, data, tmp_path_factory.mktemp("alone") / "run", {"deterministic": True})


def rows(out):
    return [{key: value for key, value in row.items() if key not in TIME_FIELDS} for row in read_metrics(out / "metrics.jsonl")]


@pytest.mark.parametrize("split", [{"batch_size": 12, "grad_accum": 1}, {"batch_size": 1, "grad_accum": 12}, {"batch_size": 4, "grad_accum": 3}])
def test_the_cut_into_microbatches_never_changes_a_bit(data, tmp_path, alone, split):
    assert jobs.train(None, data, tmp_path / "run", {"deterministic": True, **split})[:3] == alone[:3]


def test_the_deterministic_mode_computes_what_the_usual_one_does(data, tmp_path, alone):
    usual = jobs.train(None, data, tmp_path / "run")
    assert usual[0] != alone[0]  # another order of additions
    assert usual[2:] == pytest.approx(alone[2:], rel=1e-5)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_any_number_of_processes_gives_the_same_bits(pool, data, tmp_path, alone, processes, parallel):
    answers = pool.run(processes, jobs.train, data, str(tmp_path / "run"), {"deterministic": True, "parallel": parallel})
    assert answers[0] == alone
    assert all(answer == (None, *alone[1:]) for answer in answers[1:])  # all know the loss, the first alone has the whole model


def test_hybrid_sharding_gives_the_same_bits(pool, data, tmp_path, alone):
    settings = {"deterministic": True, "parallel": "hybrid", "shard_size": 2}
    assert pool.run(4, jobs.train, data, str(tmp_path / "run"), settings)[0] == alone


@pytest.mark.parametrize("options", [({"unit": 5, "document_mask": False}, {}), ({"precision": "bf16", "weight_decay": 0.3, "dropout": 0.2}, NGRAMS),
                                     ({}, GPT2)], ids=["units-that-leave-a-rest", "bf16", "gpt2-tied"])  # fmt: skip
def test_other_settings_and_families_give_the_same_bits_too(pool, data, tmp_path, options):
    settings, sizes = {"deterministic": True, "steps": 3, **options[0]}, options[1]
    expected = jobs.train(None, data, tmp_path / "alone", settings, sizes)
    for parallel in ("ddp", "fsdp"):
        found = pool.run(3, jobs.train, data, str(tmp_path / parallel), {**settings, "parallel": parallel}, sizes)
        assert found[0] == expected


@pytest.mark.parametrize("parallel", ["ddp", "fsdp", "hybrid"])
def test_without_the_deterministic_mode_only_rounding_differs(pool, data, tmp_path, parallel):
    usual = jobs.train(None, data, tmp_path / "alone", {"dropout": 0.1})
    settings = {"parallel": parallel, "shard_size": 2 if parallel == "hybrid" else None, "dropout": 0.1}
    found = pool.run(4, jobs.train, data, str(tmp_path / "run"), settings)
    assert found[0][1:] == pytest.approx(usual[1:], rel=1e-5)


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_resumed_twice_on_other_numbers_of_processes_nothing_changes(pool, data, tmp_path, alone, parallel):
    """4 processes until step 3, 2 from the checkpoint of step 2 until step 5, 3 to the end; the rows of metrics.jsonl are the same as well."""
    settings = {"deterministic": True, "parallel": parallel}
    pool.run(4, jobs.train, data, str(tmp_path / "run"), settings, None, 0, 3)
    pool.run(2, jobs.train, data, str(tmp_path / "run"), settings, None, 7, 5)  # another seed of the weights: they come from the checkpoint
    assert pool.run(3, jobs.train, data, str(tmp_path / "run"), settings, None, 9)[0] == alone
    jobs.train(None, data, tmp_path / "straight", settings)
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_a_signal_to_one_process_stops_the_evaluation_of_all_with_a_checkpoint(pool, data, tmp_path, alone, parallel):
    said = pool.run(3, jobs.stopped_while_evaluating, data, str(tmp_path / "run"), parallel)
    assert all(each is not None and each.startswith("stopped by SIGTERM after step 6 of 6") for each in said)
    weights, step, _, validation = pool.run(2, jobs.train, data, str(tmp_path / "run"), {"deterministic": True, "parallel": parallel}, None, 9)[0]
    assert (weights, step, validation) == (alone[0], alone[1], alone[3])
    jobs.train(None, data, tmp_path / "straight", {"deterministic": True, "parallel": parallel})
    assert rows(tmp_path / "run") == rows(tmp_path / "straight")


def test_whole_and_sharded_runs_go_on_from_each_others_checkpoints(pool, data, tmp_path, alone):
    pool.run(3, jobs.train, data, str(tmp_path / "run"), {"deterministic": True, "parallel": "fsdp"}, None, 0, 3)
    jobs.train(None, data, tmp_path / "run", {"deterministic": True}, None, 5, 5)  # one process reads the parts of three
    assert pool.run(2, jobs.train, data, str(tmp_path / "run"), {"deterministic": True, "parallel": "fsdp"}, None, 9)[0] == alone


def test_a_checkpoint_in_parts_loads_as_any_other_and_its_damage_is_found(pool, data, tmp_path):
    out = tmp_path / "run"
    found = pool.run(3, jobs.train, data, str(out), {"parallel": "fsdp"})[0]
    model, tokenizer = load(out)
    assert jobs.weights_hash(model) == found[0] and tokenizer is not None
    newest = out / "checkpoints" / "step-00000006"
    index = json.loads((newest / "index.json").read_text())
    parts = index["model"]["model.embed_tokens.weight"]["parts"]
    assert [part["row"] for part in parts] == [0, parts[0]["rows"], 2 * parts[0]["rows"]]
    assert not list(newest.glob("*.pt")) and not list(newest.glob(".metadata"))  # nothing is pickled
    store = CheckpointStore(out / "checkpoints")
    part = newest / "optimizer-00001.safetensors"
    content = bytearray(part.read_bytes())
    content[-3] ^= 1
    part.write_bytes(content)
    told = []
    assert store.newest_good(told.append).step == 4 and "optimizer-00001.safetensors is damaged" in told[0]
    part.unlink()
    assert store.newest_good(told.append).step == 4
    shutil.rmtree(out / "checkpoints" / "step-00000004")
    with pytest.raises(CheckpointError, match="no good checkpoint"):
        store.newest_good()


def test_each_process_holds_its_share_of_the_state(pool, data):
    """Weights and two moments of float32: 12 bytes a parameter, shared out over the processes; rows that do not divide evenly cost one more."""
    whole = pool.run(1, jobs.state_bytes, data, "ddp")[0]
    for processes in (2, 3, 4):
        shares = pool.run(processes, jobs.state_bytes, data, "fsdp")
        assert sum(shares) == whole
        assert max(shares) <= whole / processes * 1.15


def test_a_process_that_hangs_up_wakes_the_others_though_something_still_refers_to_their_group(pool, tmp_path):
    heard, refers = pool.run(2, jobs.hang_up, tmp_path / "woken")
    assert refers and heard is not None
    assert heard[0] and re.match("Connection (closed|reset) by peer", heard[1]), heard


def test_a_process_that_does_not_answer_is_known_from_what_the_library_raises(pool):
    of_a_peer, words = pool.run(2, jobs.not_answered)[0]
    assert of_a_peer and re.fullmatch("Timed out waiting 500ms for (send|recv) operation to complete", words), words
