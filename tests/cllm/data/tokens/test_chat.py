"""Chats: templates, what is an answer, batches of whole conversations, and loss on the answers only."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from command import cllm
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm import load, runtime, save
from cllm.config.model import ModelConfig
from cllm.data import Dataset
from cllm.data.documents.chat_forms import NotAConversation, conversation
from cllm.data.tokens.chat import check_fit, is_chat, prepare_chat
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
    assert is_chat(path) and is_chat(path.parent), "a folder of chats as well"
    assert dataset.train.num_documents + dataset.val.num_documents == 60 and dataset.val.num_documents > 2
    assert [line.strip() for line in said[1:]] == [
        "60 conversations from field 'messages'", "left out 3:", "1 record (no conversation; fields: messages): chats.jsonl:62",
        "1 record (no conversation; fields: text): chats.jsonl:63", "1 record that is not valid JSON: chats.jsonl:61",
    ]  # fmt: skip
    heard = []
    again = prepare_chat(path, path.parent / "out", tokenizer, 0.2, heard.append)
    assert heard == [said[0].replace("(done)", "(cached)"), *said[1:]] and again.train.num_tokens == dataset.train.num_tokens
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


@pytest.mark.parametrize("seq_len", [24, 40, 512])
def test_bits_per_byte_count_the_bytes_of_the_tokens_that_were_scored_alone(seq_len, tokenizer, tmp_path):
    chats = [chat(f"What is {n}?", "It is \u00e9 " * (5 * n + 1)) for n in range(6)] + [chat("Too long " * 30, "It.")]
    split = prepare_chat(write(tmp_path / "c.jsonl", chats), tmp_path / "out", tokenizer, 0.0).train
    model = Model(ModelConfig(vocab_size=tokenizer.vocab_size, embed_dim=16, num_layers=1, num_heads=1, max_seq_len=512))
    scored = [ids[1 : seq_len + 1][answers[1 : seq_len + 1] == 1] for ids, answers in map(split.conversation, range(len(chats)))]
    with runtime.use(threads=1):
        result = evaluate(model, split, seq_len, 2)
    assert result.num_targets == sum(map(len, scored))
    by_token = sum(int(tokenizer.byte_lengths[ids].sum()) for ids in scored)
    assert result.bits_per_byte == pytest.approx(result.loss * result.num_targets / math.log(2) / by_token, rel=1e-9)
    if seq_len == 512:
        assert by_token == split.num_bytes == sum(len(messages[1]["content"].encode()) for messages in chats)
    part = split.windows(seq_len, 2).part(2)
    assert part.num_bytes == sum(int(tokenizer.byte_lengths[batch.targets[batch.targets != -100].numpy()].sum()) for batch in part)


def test_packed_chats_are_evaluated_on_what_training_learns_from(tokenizer, tmp_path):
    model = Model(ModelConfig(vocab_size=tokenizer.vocab_size, embed_dim=32, num_layers=1, num_heads=2, max_seq_len=64), seed=1)
    save(model, tmp_path / "m.cllm", tokenizer=tokenizer)
    path = write(tmp_path / "c.jsonl", [chat(f"What is {n}?", "It is " * (n % 9 + 1)) for n in range(30)])
    prepare_chat(path, tmp_path / "all", tokenizer, 0.0)
    parts = prepare_chat(path, tmp_path / "parts", tokenizer, 0.3)
    command = ("evaluate", tmp_path / "m.cllm", "--threads", 1, "--seq-len", 32)
    chats, packed = (cllm(*command, data, "--json").json for data in (path, tmp_path / "all" / "chat"))
    assert chats["scored"] == packed["scored"] == "answers" and chats["num_targets"] == packed["num_targets"] > 0
    assert {**packed, "data": ""} == {**chats, "data": ""}
    ran = cllm(*command, parts.folder)
    targets = evaluate(model, parts.val, 32).num_targets
    assert f"on all {targets:,} tokens" in ran.out and f"the validation part of {parts.folder}" in ran.out
    assert f"Scored are the answers of {parts.val.num_documents} conversations" in ran.out
    assert "None" not in ran.out + ran.err and "val 0" not in ran.out
    ran = cllm(*command, path, "--stride", 8, "--by", "file", "--worst", 5)
    assert ran.status == 2 and f"{path} holds chats, whose answers are scored as one text" in ran.err and "--stride, --by, --worst" in ran.err


FORMS = {  # how a form is called, and a record of it
    "field 'messages'": {"id": 1, "meta": {"a": []}, "messages": chat("Q {}", "A {}")},
    "field 'conversation'": {"source": "x", "conversation": chat("Q {}", "A {}")},
    "field 'talk'": {"talk": chat("Q {}", "A {}")},
    "field 'conversations' (from, value)": {"conversations": [{"from": "human", "value": "Q {}"}, {"from": "gpt", "value": "A {}"}]},
    "field 'contents' (role, parts)": {
        "contents": [{"role": "user", "parts": [{"text": "Q "}, {"text": "{}"}]}, {"role": "model", "parts": [{"text": "A {}"}]}]
    },
    "field 'dialog', whose strings alternate between user and assistant": {"dialog": ["Q {}", "A {}"]},
    "field 'conversation' (human, assistant)": {"conversation": [{"human": "Q {}", "assistant": "A {}"}]},
    "field 'messages' of 'conversation'": {"id": 1, "conversation": {"messages": chat("Q {}", "A {}")}},
    "Alpaca fields instruction, output": {"instruction": "Q {}", "output": "A {}"},
    "Alpaca fields instruction, input, output": {"instruction": "Q {}", "input": "", "output": "A {}", "text": "Below is ..."},
    "Alpaca fields instruction, context, response": {"instruction": "Q {}", "context": "", "response": "A {}", "category": "qa"},
    "fields prompt, completion": {"prompt": "Q {}", "completion": "A {}"},
    "fields question, answer": {"id": 1, "question": "Q {}", "answer": "A {}"},
    "fields Question, Answer": {"Question": "Q {}", "Answer": "A {}"},
    "fields query, response": {"query": "Q {}", "response": "A {}"},
    "lists of messages": chat("Q {}", "A {}"),
}
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Q "}, {"type": "text", "text": "{}"}]}, {"role": "assistant", "content": "A {}"}]
PREFERENCE = {"prompt": chat("Q {}", "A {}")[:1], "chosen": chat("Q {}", "A {}")[1:], "rejected": chat("Q {}", "no")[1:]}


def numbered(record, n):
    return json.loads(json.dumps(record).replace("{}", str(n)))


@pytest.mark.parametrize("layout", ["lines", "indented array", "metadata first", "in an object"])
@pytest.mark.parametrize("form, record", [*FORMS.items(), ("field 'messages'", {"messages": PARTS}), ("field 'chosen'", PREFERENCE)])
def test_chats_in_every_form_become_the_same_conversations(form, record, layout, tokenizer, tmp_path):
    records = [numbered(record, n) for n in range(4)]
    content = {
        "lines": "".join(json.dumps(each) + "\n" for each in records),
        "indented array": json.dumps(records, indent=2),
        "metadata first": json.dumps({"dataset": "x", "version": 1}) + "\n" + "".join(json.dumps(each) + "\n" for each in records),
        "in an object": json.dumps({"version": 1, "data": records}, indent=1),
    }[layout]
    path = tmp_path / ("a.jsonl" if layout in ("lines", "metadata first") else "a.json")
    path.write_text(content)
    said = []
    assert is_chat(path)
    split = prepare_chat(path, tmp_path / "out", tokenizer, 0.0, said.append).train
    texts = [tokenizer.decode(split.conversation(n)[0], skip_special=False) for n in range(split.num_documents)]
    assert texts == [f"<|user|>Q {n}<|end|><|assistant|>A {n}<|end|>" for n in range(4)]
    assert said[1] == f"  4 conversations from {form}"
    assert [line.strip() for line in said[2:]] == (
        ["left out 1:", "1 record (no conversation; fields: dataset, version): a.jsonl:1"] if layout == "metadata first" else []
    )


def test_what_belongs_to_a_conversation_comes_with_it():
    def messages(record):
        return [(each["role"], each["content"]) for each in conversation(record).messages]

    asked = [("user", "Q"), ("assistant", "A")]
    shared = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    assert messages({"system": "Be brief.", "conversations": shared}) == [("system", "Be brief."), *asked]
    assert messages({"system_prompt": " ", "question": "Q", "response": "A"}) == asked
    assert messages({"instruction": "Sum up.", "input": "A text.", "output": "A"}) == [("user", "Sum up.\n\nA text."), ("assistant", "A")]
    assert messages({"instruction": "Q2", "output": "A2", "history": [["Q", "A"]]}) == [*asked, ("user", "Q2"), ("assistant", "A2")]
    assert messages({"question": "2 + 2", "answer": 4}) == [("user", "2 + 2"), ("assistant", "4")]
    assert messages({"messages": [{"role": "developer", "content": "S"}, *chat("Q", "A")]}) == [("system", "S"), *asked]
    for record, reason in (
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, r"not text \(image_url\)"),
        ({"messages": [*chat("Q", "A"), {"role": "assistant", "content": None}]}, "content is not text"),
        ({"messages": [*chat("Q", "A"), {"role": "judge", "content": "10"}]}, r"unknown role \(judge\); known are system"),
        ({"instruction": "Q", "output": " "}, "the answer .* is empty"),
        ({"id": 1, "\x1b[31m": 2}, r"no conversation; fields: id, \\x1b\[31m"),
        ({"prompt": "Q", "rejected": "A"}, "no conversation"),
        (5, "no conversation; a number"),
    ):
        with pytest.raises(NotAConversation, match=reason):
            conversation(record)


@pytest.mark.parametrize(
    "records",
    [
        [{"text": "plain"}],
        [{"text": "a text", "question": "Q", "answer": "A"}],
        [{"content": "a text", "messages": [], "prompt": "p", "completion": "c"}],
        [{"text": "a post", "author": "Ann", "replies": [{"author": "Bob", "text": "another post"}]}],
        [{"messages": "three"}],
        [{"text": "a text"}, {"messages": chat("Q", "A")}],
        ["one", "two"],
        [{"id": 1}],
    ],
)
def test_records_of_text_are_no_chats(records, tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    assert not is_chat(tmp_path / "a.jsonl") and not is_chat(tmp_path)


def test_a_question_that_nobody_answers_is_left_out_and_what_came_before_it_is_learnt(tokenizer, tmp_path):
    unanswered = {"role": "user", "content": "Are you there?"}
    path = write(tmp_path / "a.jsonl", [[*chat("Q", "A"), unanswered], [unanswered]])
    said = []
    split = prepare_chat(path, tmp_path / "out", tokenizer, 0.0, said.append).train
    assert tokenizer.decode(split.conversation(0)[0], skip_special=False) == "<|user|>Q<|end|><|assistant|>A<|end|>" and split.num_documents == 1
    assert [line.strip() for line in said[2:]] == [
        "left out 2:", "1 question without an answer at the end of a conversation: a.jsonl:1",
        "1 record (the last message is not the assistant's, so there is nothing to learn after it): a.jsonl:2",
    ]  # fmt: skip


def test_a_folder_of_chats_in_several_forms_and_charsets(tokenizer, tmp_path):
    data = tmp_path / "chats"
    (data / "more").mkdir(parents=True)
    (data / "README.md").write_text("Chats.\n")
    (data / "a.jsonl").write_text("".join(json.dumps({"messages": chat(f"Q {n}", "A")}) + "\n" for n in range(9)), "utf-16")
    (data / "b.csv").write_text("question;answer\n" + "".join(f'Question {n};"Answer\n{n}"\n' for n in range(9)))
    (data / "more" / "c.json").write_text(json.dumps(chat("Half a face \ud83d", "A"), indent=2))
    (data / "more" / "d.json").write_text('{"messages": "none"}')
    assert is_chat(data)
    said = []
    dataset = prepare_chat(data, tmp_path / "out", tokenizer, 0.0, said.append)
    assert dataset.train.document_names()[::9] == ["a.jsonl:1", "b.csv:2", "more/c.json:1"]
    assert tokenizer.decode(dataset.train.conversation(18)[0]) == "Half a face \ufffdA"
    assert [line.strip() for line in said[1:]] == [
        "9 conversations from field 'messages'", "9 conversations from fields question, answer", "1 conversation from lists of messages",
        "decoded a.jsonl from utf-16", "left out 2:", "1 file without records (no JSON, CSV or Parquet): README.md",
        "1 record (no conversation; fields: messages): more/d.json:1",
    ]  # fmt: skip
    again = []
    prepare_chat(data, tmp_path / "out", tokenizer, 0.0, again.append)
    assert again == [said[0].replace("(done)", "(cached)"), *said[1:]]
    (data / "a.txt").write_text("a book\n" * 1000)
    assert not is_chat(data), "most of it is text"


def test_no_conversation_at_all_is_an_error_with_the_fields_and_an_example(tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"chat_id": 1, "log": "user: Q; bot: A"}\n')
    with pytest.raises(DataError, match=r"holds no conversation to learn from.*fields: chat_id, log.*Expected records like \{\"messages\""):
        prepare_chat(tmp_path / "a.jsonl", tmp_path / "out", tokenizer, 0.0)


@settings(max_examples=20, deadline=None, derandomize=True)
@given(sizes=st.lists(st.lists(st.integers(1, 6), min_size=2, max_size=4), min_size=1, max_size=8), seq_len=st.integers(1, 20))
def test_a_conversation_without_an_answer_in_its_row_takes_no_place(sizes, seq_len, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("fit") / "c.jsonl"
    write(path, [chat("q" * each[0], "a" * each[1]) + chat("q", "a" * sum(each)) for each in sizes])
    split = prepare_chat(path, path.parent / "out", tokenizer, 0.0).train
    whole = [split.conversation(number) for number in range(split.num_documents)]
    targets = [int((answers[1 : seq_len + 1] == 1).sum()) for _, answers in whole]
    fit = split.fit(seq_len)
    assert fit.left_out == targets.count(0) and fit.longest == max(len(ids) for ids, _ in whole) - 1
    assert fit.cut == sum(len(ids) - 1 > seq_len and count > 0 for (ids, _), count in zip(whole, targets))
    assert split.has_targets(seq_len) == any(targets)
    windows = list(ChatWindows(split, seq_len, 2))
    assert sum(int((batch.targets != -100).sum()) for batch in windows) == sum(targets)
    assert {number for batch in windows for number in batch.documents} == {number for number, count in enumerate(targets) if count}
    if not any(targets):
        with pytest.raises(DataError, match="has a part of an answer within"):
            ChatBatches(split, seq_len, 2)


def test_a_long_conversation_loses_its_end(tokenizer, tmp_path):
    path = write(tmp_path / "c.jsonl", [chat("What", "It is " * 50)] * 3)
    split = prepare_chat(path, tmp_path / "out", tokenizer, 0.0).train
    assert isinstance(split, ChatSplit)
    with pytest.raises(UserError, match=r"fim_rate is for text.*this data holds chats"):
        split.batches(16, 2, fim_rate=0.5)
    batch = ChatBatches(split, 16, 2).batch(0)
    assert (batch.targets != -100).sum() == 2 * (17 - split.conversation(0)[1].argmax())


def test_conversations_that_do_not_fit_are_told_with_what_to_do(tokenizer, tmp_path):
    long, short = chat("very long " * 40, "It is."), chat("What is two?", "It is four.")
    cut = chat("What is two?", "It is four. " * 40)
    dataset = prepare_chat(write(tmp_path / "c.jsonl", [long] * 3 + [short, cut]), tmp_path / "out", tokenizer, 0.0)
    said = []
    check_fit([dataset.train, dataset.val], 64, 512, said.append)
    longest = dataset.train.fit(64).longest
    assert 256 < longest <= 512 and said == [
        "1 of 5 conversations is cut at 64 tokens. Use --seq-len 512.",
        "3 of 5 conversations are left out, because no part of an answer lies within the first 64 tokens.",
    ]
    said.clear()
    check_fit([dataset.train, dataset.val], 64, 64, said.append)
    assert said[0].endswith(
        f"The longest has {longest + 1} tokens and the model's context 64: use a model with a longer context, or shorter conversations."
    )
    said.clear()
    check_fit([dataset.train, dataset.val], 512, 512, said.append)
    assert said == []
    nothing = prepare_chat(write(tmp_path / "l.jsonl", [long] * 3), tmp_path / "none", tokenizer, 0.0)
    with pytest.raises(
        DataError, match=r"none of the 3 conversations for training has a part of an answer within its first 64 tokens.*--seq-len 128"
    ):
        check_fit([nothing.train, nothing.val], 64, 128, said.append)
    with pytest.raises(DataError, match=r"none of the 3 conversations has a part of an answer .* nothing can be evaluated"):
        check_fit([nothing.train], 64, 128, said.append)


def test_a_validation_split_without_a_target_is_not_evaluated(tokenizer, tmp_path):
    model = Model(ModelConfig(vocab_size=tokenizer.vocab_size, embed_dim=32, num_layers=1, num_heads=2, max_seq_len=32))
    save(model, tmp_path / "start.cllm", tokenizer=tokenizer)
    long = [chat("very long " * (20 + n), "It is.") for n in range(30)]
    path = write(tmp_path / "c.jsonl", long)
    sides = prepare_chat(path, tmp_path / "sides", tokenizer, 0.3)
    kept = [long[int(name.rpartition(":")[2]) - 1] for name in sides.val.document_names()[:2]]
    short = [chat(f"What is {n}?", "It.") for n in range(30)]
    names = prepare_chat(write(tmp_path / "s.jsonl", short), tmp_path / "short", tokenizer, 0.3).train.document_names()
    write(path, kept + [short[int(name.rpartition(":")[2]) - 1] for name in names])
    flags = ("--steps", 2, "--seq-len", 32, "--batch-size", 2, "--threads", 1, "--set", "data.val_fraction=0.3")
    ran = cllm("train", path, "--from", tmp_path / "start.cllm", "--out", tmp_path / "run", *flags, "--json")
    assert ran.status == 0, ran.err
    assert ran.json["validation"] is None and "none of the conversations for validation is left" in ran.err
    assert "2 of" in ran.err and "left out" in ran.err
    write(path, long)
    ran = cllm("train", path, "--from", tmp_path / "start.cllm", "--out", tmp_path / "none", *flags)
    assert ran.status == 1 and "so that nothing can be learnt" in ran.err


def test_the_command_teaches_a_model_to_answer(tokenizer, tmp_path):
    model = Model(ModelConfig(vocab_size=tokenizer.vocab_size, embed_dim=32, num_layers=1, num_heads=2, max_seq_len=32))
    save(model, tmp_path / "start.cllm", tokenizer=Tokenizer.from_json(tokenizer.to_json()))
    path = write(tmp_path / "c.jsonl", [chat("What is two?", "It is four.")] * 8)
    common = ("--steps", 60, "--batch-size", 2, "--seq-len", 32, "--learning-rate", "1e-2", "--threads", 1, "--set", "data.val_fraction=0.0")
    ran = cllm("train", path, "--out", tmp_path / "nothing", *common)
    assert ran.status == 2 and "--from" in ran.err
    ran = cllm("train", path, "--from", tmp_path / "start.cllm", "--out", tmp_path / "nothing", "--fim-rate", 0.5, *common)
    assert ran.status == 2 and "fim_rate is for text" in ran.err and not (tmp_path / "nothing" / "config.toml").exists()
    ran = cllm("train", path, "--from", tmp_path / "start.cllm", "--out", tmp_path / "run", *common, "--json")
    assert ran.status == 0, ran.err
    assert ran.json["train_loss"] < 0.5
    score = cllm("evaluate", tmp_path / "run", path, "--threads", 1, "--json")
    assert score.status == 0 and score.json["loss"] < 0.5 and score.json["num_targets"] == 8 * len([*tokenizer.encode("It is four."), "the end"])
    said = cllm("chat", tmp_path / "run", "--temperature", 0, "--json", stdin="What is two?\n")
    assert said.status == 0, said.err
    assert said.json["messages"] == chat("What is two?", "It is four.")
