"""Fill in the middle: a text in another order is still that text, in as many tokens, and the same for everyone who asks."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm import load, save
from cllm.config.model import ModelConfig
from cllm.data import TokenSplit
from cllm.data.pipeline import prepare
from cllm.data.tokens.fim import FillInTheMiddle, check_fim, fim_prompt
from cllm.data.tokens.shards import ShardWriter
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.files import DATA, new_folder
from cllm.model.model import Model
from cllm.runtime.errors import UserError

SOURCE = "def area(width, height):\n    return width * height  # caf\u00e9 \u2603\n\n\nprint(area(3, 4), '\u4f60\u597d')\n"
WORDS = [*SOURCE.split(" "), "\n", "\u4f60\u597d", "\U0001f642", "  ", "caf\u00e9", "<|fim_middle|>"]
BYTES = Tokenizer.train(["x"], 320)  # each byte is a token
NUMBERS = st.integers(0, 2**64 - 1)


@pytest.fixture(scope="module", params=["bpe", "wordpiece", "unigram", "char"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(3):
        (folder / f"{number}.txt").write_text("".join(WORDS) + SOURCE * (5 + number))
    return prepare(folder, folder / "out", request.param, 640 if request.param == "wordpiece" else 320, val_fraction=0.4, fim=True).tokenizer


def parts(tokenizer, tokens):
    """(prefix, middle, suffix) of a piece in the order of training, as bytes; None for one in the usual order."""
    prefix, suffix, middle = tokenizer.fim_tokens
    if tokens[0] != prefix:
        assert not {prefix, suffix, middle} & set(tokens)
        return None
    assert [tokens.count(token) for token in (prefix, suffix, middle)] == [1, 1, 1] and tokens.count(tokenizer.eot_id) in (1, 2)
    tokens = tokens[: tokens.index(tokenizer.eot_id) + 1]  # what follows is the rest of the piece
    second, third = tokens.index(suffix), tokens.index(middle)
    assert 0 < second < third
    found = tokens[1:second], tokens[third + 1 : -1], tokens[second + 1 : third]
    return tuple(tokenizer.decode_bytes(each) for each in found)


@given(st.lists(st.sampled_from(WORDS), max_size=40), st.booleans(), NUMBERS, NUMBERS)
@settings(max_examples=80)
def test_the_parts_of_a_piece_are_the_text_in_as_many_tokens(tokenizer, words, is_whole, one, other):
    text = "".join(words)
    piece = np.array([*tokenizer.encode(text), *([tokenizer.eot_id] if is_whole else [])], dtype=np.int64)
    found = FillInTheMiddle(tokenizer, 1.0).rearranged(piece, np.array([], dtype=np.int64), np.array([[0, len(piece), one, other]], dtype=np.uint64))
    assert found.shape == piece.shape and found.dtype == np.int64
    cut = parts(tokenizer, found.tolist()) if len(found) else None
    if cut is None:
        assert found.tolist() == piece.tolist()
        return
    prefix, middle, suffix = cut
    first, last = sorted((one % (len(text) + 1), other % (len(text) + 1)))
    before, between, behind = (each.encode() for each in (text[:first], text[first:last], text[last:]))
    assert middle == between
    # To make room for the special tokens, the suffix has lost its end or, where it is too short, the prefix its beginning.
    assert (prefix == before and behind.startswith(suffix)) or (suffix == behind and before.endswith(prefix))


@given(st.integers(0, 3), NUMBERS, NUMBERS)
@settings(max_examples=40)
def test_characters_that_a_window_cuts_in_two_are_left_out(lost, one, other):
    ids = BYTES.encode("\U0001f642\u4f60" + "a b c d " * 3 + "\u4f60\U0001f642")
    piece = np.array(ids[lost : len(ids) - lost], dtype=np.int64)
    found = FillInTheMiddle(BYTES, 1.0).rearranged(piece, np.array([], dtype=np.int64), np.array([[0, len(piece), one, other]], dtype=np.uint64))
    assert len(found) == len(piece)
    cut = parts(BYTES, found.tolist())
    assert cut is None or b"".join(cut) in BYTES.decode_bytes(ids)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    """Documents of many lengths, some shorter than the special tokens."""
    tokenizer = BYTES
    folder = tmp_path_factory.mktemp("packed") / "tokens"
    with new_folder(folder, DATA) as temporary:
        (temporary / "train").mkdir()
        writer = ShardWriter(temporary / "train", tokenizer.vocab_size, tokenizer.hash, tokenizer.eot_id)
        for number in range(30):
            text = "".join(WORDS[(7 * number + place) % len(WORDS)] for place in range((0, 1, 5, 30)[number % 4]))
            writer.append(np.array([*tokenizer.encode(text), tokenizer.eot_id], dtype=np.int64))
            writer.end_document(str(number), len(text), len(text.encode()))
        writer.close()
        tokenizer.save(temporary / "tokenizer.json")
    return TokenSplit(folder / "train")


def same(one, other):
    return all(torch.equal(*each) for each in zip(one[:2], other[:2])) and (one[2] is None) == (other[2] is None)


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("shuffle", ["epoch", "random"])
def test_a_batch_is_the_same_however_it_is_asked_for_and_keeps_its_documents(split, shuffle, mask):
    options = {"seed": 7, "shuffle": shuffle, "document_mask": mask}
    plain = split.batches(48, 6, **options)
    middles, again, alone = (split.batches(48, size, **options, fim_rate=0.6) for size in (6, 6, 1))
    changed = pieces = 0
    for index in (5, 0, *range(20, 30)):
        before, batch = plain.batch(index), middles.batch(index)
        assert same(batch, again.batch(index)), "what was asked for before makes no difference"
        for row in range(6):
            single = alone.batch(6 * index + row)
            assert torch.equal(single.tokens[0], batch.tokens[row]) and torch.equal(single.targets[0], batch.targets[row])
        assert batch.documents == before.documents and batch.first_row == before.first_row and batch.tokens.shape == before.tokens.shape
        assert torch.equal(batch.targets == -100, before.targets == -100)
        follows = batch.targets[:, :-1] != -100
        assert torch.equal(batch.targets[:, :-1][follows], batch.tokens[:, 1:][follows])
        if not mask:
            continue
        assert torch.equal(batch.cu_seqlens, before.cu_seqlens)
        bounds = batch.cu_seqlens.tolist()
        for start, end in pairwise(bounds):
            piece, last = batch.tokens.flatten()[start:end].tolist(), int(batch.targets.flatten()[end - 1])
            is_changed = parts(BYTES, piece if last == -100 else [*piece, last]) is not None
            if len(piece) >= 24:  # of others, the places may leave no room for the special tokens
                pieces += 1
                changed += is_changed
    assert not mask or (pieces > 50 and 0.3 < changed / pieces < 0.6)


def test_a_middle_ends_anywhere_in_a_window_and_not_with_it(split):
    ends = []
    for row in split.batches(48, 100, 1, shuffle="random", fim_rate=1.0).batch(0).tokens.tolist():
        behind = row[row.index(BYTES.fim_tokens.middle) :] if BYTES.fim_tokens.middle in row else []
        if BYTES.eot_id in behind:
            ends.append(len(row) - len(behind) + behind.index(BYTES.eot_id))
    assert len(ends) > 50 and len(set(ends)) > 25 and max(ends.count(place) for place in ends) < 10


def test_a_rate_of_nothing_changes_nothing_and_evaluation_reads_the_text_as_it_is(split):
    usual, none = split.batches(48, 6, 3), split.batches(48, 6, 3, fim_rate=0.0)
    assert all(same(usual.batch(index), none.batch(index)) for index in range(4)) and none.fim is None
    assert not any((batch.tokens == BYTES.fim_tokens.prefix).any() for batch in split.windows(48, 6))


def test_batches_are_the_same_on_every_machine(split):
    batch = split.batches(24, 2, 1337, document_mask=True, fim_rate=1.0).batch(1)
    assert [BYTES.decode(row, skip_special=False) for row in batch.tokens.tolist()] == [
        "<|fim_prefix|><|fim_suffix|>|>de<|fim_middle|>e<|endoftext|>a(width,height)",
        "<|fim_prefix|><|fim_suffix|><|fim_middle|>tur<|endoftext|>th*height#caf\u00e9\ufffd",
    ]


@given(st.lists(st.integers(20, 30), max_size=30), st.lists(st.integers(20, 30), max_size=30), st.integers(4, 40))
def test_a_prompt_keeps_what_is_next_to_the_middle(prefix, suffix, most):
    tokenizer = BYTES.with_fim()
    whole = fim_prompt(tokenizer, prefix, suffix)
    first, second, third = tokenizer.fim
    assert whole == [first, *prefix, second, *suffix, third]
    cut = fim_prompt(tokenizer, prefix, suffix, most)
    assert len(cut) == min(len(whole), most)
    place = cut.index(second)
    before, behind = cut[1:place], cut[place + 1 : -1]
    assert cut[0] == first and cut[-1] == third and prefix[len(prefix) - len(before) :] == before and suffix[: len(behind)] == behind
    assert len(behind) >= min(len(suffix), (most - 3) // 4) and len(before) >= min(len(prefix), (most - 3) - (most - 3) // 4 - len(suffix))


def test_whether_a_model_has_learnt_it_travels_with_its_tokenizer(tmp_path):
    plain = Tokenizer.train([SOURCE], 320)
    taught = plain.with_fim()
    assert plain.fim is None and plain.fim_tokens is not None and taught.fim == plain.fim_tokens and taught == plain
    names = {"fim_prefix_token": "<|fim_prefix|>", "fim_suffix_token": "<|fim_suffix|>", "fim_middle_token": "<|fim_middle|>"}
    assert taught.settings == {"extra_special_tokens": names} and plain.settings == {}
    assert taught.with_chat_template("{{ x }}").with_end("<|end|>").fim == taught.fim
    model = Model(ModelConfig(vocab_size=plain.vocab_size, embed_dim=16, num_layers=1, num_heads=2, max_seq_len=16))
    for number, tokenizer in enumerate((plain, taught)):
        (tmp_path / str(number)).mkdir()
        tokenizer.save(tmp_path / str(number))
        save(model, tmp_path / f"{number}.cllm", tokenizer=tokenizer)
        assert Tokenizer.load(tmp_path / str(number)).fim == load(tmp_path / f"{number}.cllm")[1].fim == tokenizer.fim
    (tmp_path / "1" / "tokenizer_config.json").write_text(json.dumps(names))  # as transformers 5 writes it
    assert Tokenizer.load(tmp_path / "1").fim == taught.fim
    with pytest.raises(UserError, match=r"has not learnt to fill in the middle.*--fim-rate"):
        fim_prompt(plain, [1], [2])


def test_a_tokenizer_from_elsewhere_with_such_tokens_comes_with_a_model_that_knows_them():
    theirs = Tokenizer.train([SOURCE], kind="char", specials=("<|endoftext|>", "<fim_prefix>", "<fim_middle>", "<fim_suffix>"))
    names = [theirs.token_bytes(token).decode() for token in theirs.fim]
    assert names == ["<fim_prefix>", "<fim_suffix>", "<fim_middle>"]


def test_text_that_names_the_tokens_is_text(tokenizer):
    assert not set(check_fim(tokenizer)) & set(tokenizer.encode("<|fim_middle|>"))


def test_a_tokenizer_without_the_tokens_is_refused_before_anything_is_packed(tmp_path):
    (tmp_path / "text.txt").write_text(SOURCE * 9)
    bare = Tokenizer.train([SOURCE], kind="char", specials=("<|endoftext|>",))
    with pytest.raises(UserError, match=r"fim_rate needs a tokenizer with the special tokens.*Let cllm train make one"):
        prepare(tmp_path / "text.txt", tmp_path / "out", bare, fim=True)
    assert not (tmp_path / "out").exists()
    packed = prepare(tmp_path / "text.txt", tmp_path / "out", bare)
    for again in (lambda: prepare(packed.folder, tmp_path / "other", fim=True), lambda: packed.train.batches(8, 2, fim_rate=0.5)):
        with pytest.raises(UserError, match="fim_rate needs a tokenizer"):
            again()


def test_what_is_packed_for_a_usual_run_serves_this_one_too(tmp_path):
    (tmp_path / "text.txt").write_text(SOURCE * 9)
    plain, taught = (prepare(tmp_path / "text.txt", tmp_path / "out", "bpe", 320, fim=fim) for fim in (False, True))
    assert taught.info["key"] == plain.info["key"] and {state for _, state, _ in taught.steps} == {"cached"}


def test_a_character_tokenizer_gets_the_tokens_only_where_they_are_needed(tmp_path):
    (tmp_path / "text.txt").write_text(SOURCE * 9)
    plain = prepare(tmp_path / "text.txt", tmp_path / "out", "char", keep_others=True).tokenizer
    taught = prepare(tmp_path / "text.txt", tmp_path / "out", "char", keep_others=True, fim=True).tokenizer
    assert plain.fim_tokens is None and plain.vocab_size == len(set(SOURCE)) and taught.vocab_size == plain.vocab_size + 4
    assert prepare(tmp_path / "text.txt", tmp_path / "out", "char", keep_others=True).tokenizer == plain
