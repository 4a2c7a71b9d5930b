"""Chats: templates, what is an answer, batches of whole conversations, and loss on the answers only."""

import itertools
import json

import numpy as np
import pytest
import torch
from command import cllm
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm import load, runtime, save
from cllm.config.model import ModelConfig
from cllm.data import Dataset
from cllm.data.tokens.chat import is_chat, prepare_chat
from cllm.data.tokens.chat_template import TEMPLATE, check_messages, encode_conversation, encode_prompt, end_of_turn, with_template
from cllm.data.tokens.conversations import ChatBatches, ChatSplit, ChatWindows, fill_rows
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.evaluate.loss import evaluate
from cllm.interop.hf import save_hf
from cllm.model.model import Model
from cllm.runtime.errors import DataError, UserError

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] | trim + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat(question, answer, *more):
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return messages + (chat(*more) if more else [])


@pytest.fixture(scope="module")
def tokenizer():
    return with_template(Tokenizer.train(["What is two plus two? It is four. <|end|>" * 20], vocab_size=320))


def test_answers_and_their_end_are_told_from_the_questions(tokenizer):
    parts = encode_conversation(tokenizer, chat("What is two?", "It is.", "And four?", "So."))
    answers = [tokenizer.decode(part.ids, skip_special=False) for part in parts if part.is_answer]
    assert answers == ["It is.<|end|>", "So.<|end|>"]
    whole = tokenizer.decode([i for part in parts for i in part.ids], skip_special=False)
    assert whole == "<|user|>What is two?<|end|><|assistant|>It is.<|end|><|user|>And four?<|end|><|assistant|>So.<|end|>"
    assert encode_prompt(tokenizer, chat("What is two?", "It is.", "And four?", "So.")[:3]) == [i for part in parts[:3] for i in part.ids]
    assert end_of_turn(tokenizer) == "<|end|>"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(pieces=st.lists(st.sampled_from([*"a <|>", "<|end|>", "<|assistant|>", "\ufdd0", "é"]), max_size=12))
def test_a_message_cannot_forge_a_special_token(tokenizer, pieces):
    text = "".join(pieces)
    parts = encode_conversation(tokenizer, chat(text, "x"))
    special = [i for part in parts for i in part.ids if i in tokenizer.special_tokens.values()]
    assert [tokenizer.decode([i], skip_special=False) for i in special] == ["<|user|>", "<|end|>", "<|assistant|>", "<|end|>"]
    shown = tokenizer.decode([i for part in parts for i in part.ids])
    assert shown == text.replace("\ufdd0", "\ufffd") + "x"


@pytest.mark.parametrize("template", [TEMPLATE, CHATML], ids=["ours", "chatml"])
def test_text_is_what_transformers_makes_of_the_template(tokenizer, template, tmp_path):
    transformers = pytest.importorskip("transformers")
    own = tokenizer.with_chat_template(template)
    model = Model(ModelConfig(vocab_size=own.vocab_size, embed_dim=16, num_layers=1, num_heads=1, max_seq_len=16))
    theirs = transformers.AutoTokenizer.from_pretrained(save_hf(model, tmp_path / "hf", own))
    messages = [{"role": "system", "content": "Be brief."}, *chat(" What is two?", "It is. ")]
    expected = theirs.apply_chat_template(messages, tokenize=False)
    ids = [i for part in encode_conversation(own, messages) for i in part.ids]
    assert own.decode(ids, skip_special=False) == expected
    prompt = theirs.apply_chat_template(messages[:2], tokenize=False, add_generation_prompt=True)
    assert own.decode(encode_prompt(own, messages[:2]), skip_special=False) == prompt


def test_templates_that_cannot_be_used_are_refused(tokenizer):
    with pytest.raises(UserError, match="no chat template"):
        with_template(Tokenizer.train(["abc"], kind="char"))
    for template, message in (
        ("{{ messages", "not valid Jinja"),
        ("{{ raise_exception('no system here') }}", "no system here"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}", "rewrites earlier messages"),
        ("{{ ''.__class__.__mro__ }}", "refuses this conversation"),
    ):
        with pytest.raises(DataError, match=message):
            encode_conversation(tokenizer.with_chat_template(template), chat("a", "b", "c", "d"))
    for bad in (None, [], ["x"], [{"role": "user"}], [{"role": "robot", "content": "x"}], [{"role": "user", "content": "x"}]):
        with pytest.raises(DataError):
            check_messages(bad)


def test_the_template_travels_with_the_tokenizer_and_does_not_change_its_hash(tokenizer, tmp_path):
    plain = Tokenizer.from_json(tokenizer.to_json())
    assert plain.chat_template is None and plain.hash == tokenizer.hash
    model = Model(ModelConfig(vocab_size=tokenizer.vocab_size, embed_dim=16, num_layers=1, num_heads=1, max_seq_len=16))
    save(model, tmp_path / "m.cllm", tokenizer=tokenizer)
    save_hf(model, tmp_path / "hf", tokenizer)
    tokenizer.save(tmp_path / "tokenizer.json")
    for found in (load(tmp_path / "m.cllm")[1], load(tmp_path / "hf")[1], Tokenizer.load(tmp_path)):
        assert found.chat_template == TEMPLATE and found.hash == tokenizer.hash and found.eot_id == tokenizer.eot_id
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text())["eos_token_id"] == [
        tokenizer.eot_id, tokenizer.special_tokens["<|end|>"],
    ]  # fmt: skip


def write(path, conversations, *lines):
    path.write_text("".join(json.dumps({"messages": each}) + "\n" for each in conversations) + "".join(line + "\n" for line in lines))
    return path


@pytest.fixture(scope="module")
def data(tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("chat")
    conversations = [chat(f"What is {n}?", "It is " + "so " * (n % 7) + ".") for n in range(60)]
    said = []
    path = write(folder / "chats.jsonl", conversations, "no json", '{"messages": []}', '{"text": "x"}')
    return path, prepare_chat(path, folder / "out", tokenizer, 0.2, said.append), said


def test_a_file_of_chats_is_packed_once_and_bad_lines_are_named(data, tokenizer):
    path, dataset, said = data
    assert is_chat(path) and not is_chat(path.parent)
    assert dataset.train.num_documents + dataset.val.num_documents == 60 and dataset.val.num_documents > 2
    assert any("(61): not JSON" in line for line in said) and any("(62, 63): messages must be" in line for line in said)
    heard = []
    again = prepare_chat(path, path.parent / "out", tokenizer, 0.2, heard.append)
    assert "cached" in heard[-1] and again.train.num_tokens == dataset.train.num_tokens
    dataset.verify()
    assert isinstance(Dataset.open(dataset.folder).train, ChatSplit)
    with pytest.raises(DataError, match="holds no conversation"):
        prepare_chat(write(path.parent / "bad.jsonl", [[]]), path.parent / "bad", tokenizer)


def test_batches_hold_whole_conversations_and_only_answers_are_targets(data):
    _, dataset, _ = data
    split = dataset.train
    batches = ChatBatches(split, 64, 3, seed=1)
    seen = []
    for index in range(40):
        batch = batches.batch(index)
        bounds = batch.cu_seqlens.tolist()
        tokens, targets = batch.tokens.reshape(-1).numpy(), batch.targets.reshape(-1).numpy()
        wanted = {tuple(split.conversation(number)[0][:-1]): number for number in batch.documents}
        for start, end in itertools.pairwise(bounds):
            number = wanted.get(tuple(tokens[start:end]))
            if number is None:
                assert (targets[start:end] == -100).all()
                continue
            ids, answers = split.conversation(number)
            assert np.array_equal(targets[start:end], np.where(answers[1:] == 1, ids[1:], -100))
            seen.append(number)
    count = split.num_documents
    assert len(seen) >= 2 * count and sorted(seen[:count]) == list(range(count)) == sorted(seen[count : 2 * count])
    assert seen[:count] != seen[count : 2 * count]
    fresh = ChatBatches(split, 64, 3, seed=1).batch(37)
    assert all(torch.equal(a, b) for a, b in zip(fresh[:3], batches.batch(37)[:3]))
    halves = [ChatBatches(split, 64, 1, seed=1).batch(index).tokens for index in range(6)]
    assert torch.equal(torch.cat(halves), torch.cat([batches.batch(0).tokens, batches.batch(1).tokens]))


@settings(max_examples=80, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(0, 10), min_size=1, max_size=40))
def test_rows_are_filled_without_loss_or_overflow(lengths):
    rows = fill_rows(np.arange(len(lengths)), np.array(lengths), 10)
    assert [number for row in rows for number in row] == [number for number, length in enumerate(lengths) if length]
    assert all(0 < sum(lengths[number] for number in row) <= 10 for row in rows)


def test_evaluation_counts_the_answers_alone(data, tokenizer):
    _, dataset, _ = data
    model = Model(ModelConfig(vocab_size=tokenizer.vocab_size, embed_dim=16, num_layers=1, num_heads=1, max_seq_len=64))
    with runtime.use(threads=1):
        result = evaluate(model, dataset.val, 64, 2)
        nats = []
        for number in range(dataset.val.num_documents):
            ids, answers = (torch.from_numpy(each) for each in dataset.val.conversation(number))
            with torch.no_grad():
                logits = model(ids[None, :-1])[0].double()
            nats.append(torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")[answers[1:] == 1])
    assert result.num_targets == sum(map(len, nats)) == int(dataset.val.token_counts().sum())
    assert result.loss == pytest.approx(float(torch.cat(nats).mean()), rel=1e-5)
    assert len(list(ChatWindows(dataset.val, 64, 2))) >= 1


def test_a_long_conversation_loses_its_end(tokenizer, tmp_path):
    path = write(tmp_path / "c.jsonl", [chat("What", "It is " * 50)] * 3)
    split = prepare_chat(path, tmp_path / "out", tokenizer, 0.0).train
    assert isinstance(split, ChatSplit)
    batch = ChatBatches(split, 16, 2).batch(0)
    assert (batch.targets != -100).sum() == 2 * (17 - split.conversation(0)[1].argmax())


def test_the_command_teaches_a_model_to_answer(tokenizer, tmp_path):
    model = Model(ModelConfig(vocab_size=tokenizer.vocab_size, embed_dim=32, num_layers=1, num_heads=2, max_seq_len=32))
    save(model, tmp_path / "start.cllm", tokenizer=Tokenizer.from_json(tokenizer.to_json()))
    path = write(tmp_path / "c.jsonl", [chat("What is two?", "It is four.")] * 8)
    common = ("--steps", 60, "--batch-size", 2, "--seq-len", 32, "--learning-rate", "1e-2", "--threads", 1, "--set", "data.val_fraction=0.0")
    ran = cllm("train", path, "--out", tmp_path / "nothing", *common)
    assert ran.status == 2 and "--from" in ran.err
    ran = cllm("train", path, "--from", tmp_path / "start.cllm", "--out", tmp_path / "run", *common, "--json")
    assert ran.status == 0, ran.err
    assert ran.json["train_loss"] < 0.5
    score = cllm("evaluate", tmp_path / "run", path, "--threads", 1, "--json")
    assert score.status == 0 and score.json["loss"] < 0.5 and score.json["num_targets"] == 8 * len([*tokenizer.encode("It is four."), "the end"])
    said = cllm("chat", tmp_path / "run", "--temperature", 0, "--json", stdin="What is two?\n")
    assert said.status == 0, said.err
    assert said.json["messages"] == chat("What is two?", "It is four.")
