"""`cllm evaluate` and `cllm report` as a user types them: evaluation of a small model, the report of a run that was really trained."""

import json
import math

import pytest
from command import cllm


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    files = {"good/a.py": "def add(a, b):\n    return a + b\n", "good/b.py": "import os\nimport sys\n", "odd/c.txt": "qzx jvk wqp! "}
    for name, body in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(body * 30)
    (folder / "good" / "d.jsonl").write_text("".join(json.dumps({"text": f"for i in range({n}):\n    print(i)\n" * 5}) + "\n" for n in range(20)))
    return folder


@pytest.fixture(scope="module")
def model(documents, tmp_path_factory):
    """An untrained model of 32 tokens of context with a tokenizer of its own."""
    import cllm as library

    tokenizer = library.Tokenizer.train(documents, vocab_size=320)
    config = library.ModelConfig(vocab_size=tokenizer.vocab_size, embed_dim=32, num_layers=1, num_heads=2, max_seq_len=32)
    place = tmp_path_factory.mktemp("model") / "model.cllm"
    library.save(library.Model(config), place, tokenizer=tokenizer)
    return place


def test_evaluate_gives_intervals_sources_and_the_worst_documents(model, documents):
    ran = cllm("evaluate", model, "--threads", 1, documents, "--worst", 2, "--json")
    result = ran.json
    assert ran.status == 0 and result["num_documents"] == 23 and result["stride"] == result["seq_len"] == 32
    for name in ("loss", "perplexity", "bits_per_byte", "accuracy"):
        low, high = result["interval"][name]
        assert low <= result[name] <= high
    assert {source["name"]: source["documents"] for source in result["sources"]} == {"good/": 22, "odd/": 1}
    assert sum(source["num_targets"] for source in result["sources"]) == result["num_targets"]
    losses = [document["loss"] for document in result["worst_documents"]]
    assert len(losses) == 2 and losses == sorted(losses, reverse=True) and losses[0] > result["loss"]
    assert result["bits_per_byte"] == pytest.approx(result["loss"] * result["num_targets"] / math.log(2) / result["num_bytes"])
    ran = cllm("evaluate", model, "--threads", 1, documents, "--by", "file", "--confidence", 0.5)
    reading, _, after = ran.out.partition("50 % confidence over 23 documents")
    sources = after.partition("documents with")[0]
    assert "good/d.jsonl: 20 records" in reading and "good/d.jsonl" in sources and "good/d.jsonl:" not in sources
    assert cllm("evaluate", model, "--threads", 1, documents, "--json").json["interval"] == result["interval"]  # the same seed


def test_a_shorter_stride_scores_the_same_tokens_with_more_context(model, documents):
    whole, slid = (cllm("evaluate", model, "--threads", 1, documents, "--stride", stride, "--json").json for stride in (32, 8))
    assert whole["num_targets"] == slid["num_targets"] and whole["num_bytes"] == slid["num_bytes"] and whole["loss"] != slid["loss"]


def test_one_document_is_said_to_have_no_interval(model, documents):
    ran = cllm("evaluate", model, "--threads", 1, documents / "odd" / "c.txt")
    assert ran.status == 0 and "single document" in ran.out and "by source" not in ran.out


MISTAKES = {
    "nothing to evaluate": ([], 2, "--tasks"),
    "both": (["{documents}", "--tasks", "x"], 2, "either"),
    "stride": (["{documents}", "--stride", "33"], 2, "stride must be within 1 and seq_len (32)"),
    "confidence": (["{documents}", "--confidence", "95"], 2, "0.95"),
    "grouping": (["{documents}", "--by", "author"], 2, "folder"),
    "worst": (["{documents}", "--worst", "-1"], 2, "--worst"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_clear_line(model, documents, mistake):
    arguments, status, words = MISTAKES[mistake]
    ran = cllm("evaluate", model, "--threads", 1, *(argument.format(documents=documents) for argument in arguments))
    assert ran.status == status and words in ran.err, ran.err


def test_report_writes_a_page_about_a_trained_run(run, tmp_path):
    ran = cllm("report", run, "--out", tmp_path / "page.html", "--json")
    assert ran.status == 0 and ran.json["out"] == str(tmp_path / "page.html") and ran.json["runs"][0]["step"] == 12
    page = (tmp_path / "page.html").read_text("utf-8")
    assert "12 of 12" in page and "--learning-rate" in page and "torch" in page and "<script" not in page
    ran = cllm("report", run, tmp_path)
    assert ran.status == 2 and "holds no run" in ran.err
    assert cllm("report", run).status == 0 and (run / "report.html").exists()
    (run / "report.html").unlink()


@pytest.mark.parametrize("command", ["report", "evaluate"])
def test_both_explain_themselves_with_examples(command):
    ran = cllm(command, "--help")
    assert ran.status == 0 and f"cllm {command}" in ran.out.split("Examples:")[1] and "--json" in ran.out


@pytest.fixture(scope="module")
def stored(model, documents):
    """The figures of the model as it is stored."""
    return cllm("evaluate", model, "--threads", 1, documents, "--json").json


@pytest.mark.parametrize(
    ("options", "key", "what"),
    [
        (("--weights", "bf16"), "stored_weights", "these change"),
        (("--weights", "int4", "--kv-cache", "int8"), "stored_weights", "these and a KV cache of int8 change"),
        (("--kv-cache", "int8"), "computed_kv", "int8 changes"),
    ],
    ids=str,
)
def test_evaluate_tells_what_fewer_bits_change(model, documents, stored, options, key, what):
    ran = cllm("evaluate", model, "--threads", 1, documents, *options, "--json")
    result = ran.json
    assert result[key]["loss"] == stored["loss"] != result["loss"] and key not in stored
    assert f"loss {stored['loss']:.4f}" in ran.err and f"{what} the loss by {result['loss'] - stored['loss']:+.4f}" in ran.err
