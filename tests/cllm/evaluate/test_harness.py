"""The adapter for lm-evaluation-harness: the harness's own numbers for the same model through transformers, and a local task end to end."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import cllm.evaluate
from cllm import runtime
from cllm.config.model import ModelConfig
from cllm.data.pipeline import prepare
from cllm.model.model import Model
from cllm.runtime.errors import UserError

TEXT = "".join(f"On day {n} the {('fox', 'owl', 'cat')[n % 3]} saw {n * 7 % 10} birds by the river. " for n in range(300))
WITHOUT = importlib.util.find_spec("lm_eval") is None
needs_harness = pytest.mark.skipif(WITHOUT, reason="lm-evaluation-harness is not installed (make peers)")


@pytest.fixture(autouse=True)
def one_thread_and_no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    with runtime.use(threads=1):
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A model of 24 tokens of context that has learnt a little, so that its likeliest tokens are clear."""
    from cllm import TrainStep

    folder = tmp_path_factory.mktemp("lm-eval")
    (folder / "text.txt").write_text(TEXT)
    dataset = prepare(folder / "text.txt", folder / "data", vocab_size=320)
    model = Model(ModelConfig(vocab_size=320, embed_dim=32, num_layers=2, num_heads=2, max_seq_len=24), seed=1)
    step = TrainStep(model, "fp32", 1e-2, 1.0)
    with runtime.use(threads=1):
        for number in range(40):
            tokens = torch.from_numpy(dataset.train.read(number * 53 % 900, 8 * 25)).view(8, 25)
            step(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous())
    return model, dataset.tokenizer


def requests(kind, arguments):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=each, idx=number) for number, each in enumerate(arguments)]


def test_without_the_harness_the_error_names_the_extra(monkeypatch):
    for name in ("lm_eval", "lm_eval.api.model", "cllm.evaluate.harness"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delattr(cllm.evaluate, "harness", raising=False)  # the package would go on with the module that is imported here
    del sys.modules["cllm.evaluate.harness"]  # imported anew here, and once more by the next test
    from cllm.evaluate.harness import CLLM, run_tasks

    for use in (lambda: CLLM("runs/demo"), lambda: run_tasks(None, None, ["any"])):
        with pytest.raises(UserError, match=r"cllm\[eval\]"):
            use()


@needs_harness
def test_every_number_is_the_one_that_the_harness_gets_through_transformers(trained, tmp_path):
    pytest.importorskip("accelerate", reason="the harness's own model for transformers needs accelerate")
    from lm_eval.models.huggingface import HFLM

    from cllm.evaluate.harness import CLLM
    from cllm.interop.hf import save_hf

    model, tokenizer = trained
    save_hf(model, tmp_path / "hf", tokenizer=tokenizer)
    theirs = HFLM(pretrained=str(tmp_path / "hf"), device="cpu", dtype="float32", batch_size=2)
    ours = CLLM(model=model, tokenizer=tokenizer, batch_size=3)
    pairs = [
        ("On day 7 the", " owl saw"),
        ("", "On day"),
        ("the river. On day 4 ", "the owl"),
        (TEXT[:500], " On day 12"),
        ("x", " zzz"),
        ("a b c", "d"),
        ("On day 1 the owl saw 7 birds by the", " river."),
    ]
    mine, other = (each.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True) for each in (ours, theirs))
    assert [value for value, _ in mine] == pytest.approx([value for value, _ in other], abs=1e-3)
    assert [greedy for _, greedy in mine] == [greedy for _, greedy in other]
    assert len({greedy for _, greedy in mine}) == 2  # both answers occur
    texts = [("On",), (TEXT[:90],), (TEXT[:1000],), (TEXT[100:123],)]
    mine, other = (each.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True) for each in (ours, theirs))
    assert mine == pytest.approx(other, abs=1e-2, rel=1e-5)
    asked = [(text, {"until": [".", "\n"], "max_gen_toks": 8, "do_sample": False}) for text in ("On day 7 the", TEXT[:300], "birds")]
    mine, other = (each.generate_until(requests("generate_until", asked), disable_tqdm=True) for each in (ours, theirs))
    assert mine == other and any(mine)


@needs_harness
@pytest.mark.parametrize(("context", "continuation", "length"), [(1, 1, 4), (1, 4, 4), (1, 5, 4), (3, 9, 4), (10, 2, 4), (2, 30, 7), (1, 3, 1)])
def test_each_token_is_scored_once_with_all_the_context_that_fits(context, continuation, length):
    from lm_eval.utils import get_rolling_token_windows

    from cllm.evaluate.harness import _windows

    tokens = list(range(context + continuation))
    windows = list(_windows(tokens[:context], tokens[context:], length))
    assert [token for _, wanted in windows for token in wanted] == tokens[context:]
    for inputs, wanted in windows:
        assert len(inputs) == min(length, wanted[-1]) and inputs[-1] == wanted[-1] - 1
    if context == 1:
        assert windows == list(get_rolling_token_windows(tokens[1:], tokens[0], length, 1))


@needs_harness
def test_an_option_that_generation_does_not_have_is_refused(trained):
    from cllm.evaluate.harness import CLLM

    ours = CLLM(model=trained[0], tokenizer=trained[1])
    with pytest.raises(UserError, match="num_beams"):
        ours.generate_until(requests("generate_until", [("On day", {"num_beams": 4, "max_gen_toks": 2})]))


@needs_harness
def test_a_local_task_runs_from_a_checkpoint_by_the_registered_name(trained, tmp_path, monkeypatch):
    """The way of the harness's users: model="cllm" with model_args, a task from a file, data from a file."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    import cllm
    import cllm.evaluate.harness

    # To read the harness's thousands of tasks takes ten seconds: those of one of its folders stand for them.
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(Path(lm_eval.tasks.__file__).parent / "arc" / "manager.py"))
    cllm.save(trained[0], tmp_path / "model.cllm", tokenizer=trained[1])
    docs = [{"q": f"On day {n} the", "choices": [" owl saw", " zebra yawned"], "text": TEXT[n : n + 200]} for n in range(4)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "docs.jsonl")}}, "test_split": "test"}
    choose = {
        "task": "local_choose",
        **common,
        "output_type": "multiple_choice",
        "doc_to_text": "{{q}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": 0,
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    roll = {
        "task": "local_roll",
        **common,
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (tmp_path / "tasks").mkdir()
    for task in (choose, roll):  # JSON is YAML
        (tmp_path / "tasks" / f"{task['task']}.yaml").write_text(json.dumps(task))
    found = lm_eval.simple_evaluate(
        model="cllm",
        model_args=f"checkpoint={tmp_path / 'model.cllm'}",
        tasks=["local_choose", "local_roll"],
        batch_size=2,
        device="cpu",
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )
    assert found["results"]["local_choose"]["acc,none"] == 1.0
    scorer = cllm.evaluate.harness.CLLM(model=trained[0], tokenizer=trained[1])
    nats = sum(scorer.loglikelihood_rolling(requests("loglikelihood_rolling", [(doc["text"],) for doc in docs])))
    num_bytes = sum(len(doc["text"].encode()) for doc in docs)
    assert found["results"]["local_roll"]["bits_per_byte,none"] == pytest.approx(-nats / num_bytes / 0.6931471805599453, rel=1e-6)
    again = cllm.evaluate.harness.run_tasks(*trained, ["local_choose"], tmp_path / "tasks")
    assert again["local_choose"]["acc,none"] == 1.0
    with pytest.raises(UserError, match="local_choose"):
        cllm.evaluate.harness.run_tasks(*trained, ["local_chose"], tmp_path / "tasks")
    with pytest.raises(UserError, match="Did you mean arc_easy"):  # the harness's own tasks are there beside them
        cllm.evaluate.harness.run_tasks(*trained, ["arc_eazy"], tmp_path / "tasks")
