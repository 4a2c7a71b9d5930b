"""The tokenizer's contract: what goes in comes out, ids are stable, and text is never taken for a special token."""

import json
import re
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.data.documents.corpus import pieces
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.data.tokens.vocabulary import BPE_SPECIALS, END_OF_TEXT, default_vocab_size, without_long_runs
from cllm.runtime.errors import DataError, UserError

SOURCE = "def area(width, height):\n    return width * height  # caf\u00e9 \u2603\n\n\nprint(area(3, 4), 'it''s 2026')\n"
TEXT = st.text(alphabet=st.characters(exclude_categories=("Cs",)), max_size=200)


@pytest.fixture(scope="module", params=["gpt-2", "llama-bpe"])
def bpe(request):
    return Tokenizer.train([SOURCE * 20, "The quick brown fox. " * 30], 384, pre_tokenizer=request.param)


@pytest.fixture(scope="module")
def char():
    return Tokenizer.train([SOURCE], kind="char")


@given(TEXT)
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back_from_bpe_unchanged(bpe, text):
    ids = bpe.encode(text)
    assert bpe.decode(ids) == text
    assert bpe.decode_bytes(ids) == text.encode("utf-8")
    decoder = bpe.stream_decoder()
    assert "".join(map(decoder.push, ids)) + decoder.finish() == text


@given(st.text(alphabet=sorted(set(SOURCE)), max_size=200))
@settings(max_examples=50, deadline=None)
def test_text_of_known_characters_comes_back_from_char_unchanged(char, text):
    ids = char.encode(text)
    assert len(ids) == len(text) and char.decode(ids) == text


@given(st.lists(st.sampled_from(["word", " ", "  ", "\n", "\n\n", "1234", "!?", "\u4f60\u597d", "'s", "\t"]), max_size=120))
@settings(max_examples=60, deadline=None)
def test_pieces_join_to_the_text_and_give_the_tokens_of_the_whole(bpe, words):
    text = "".join(words)
    cut = list(pieces([text[:7], text[7:90], text[90:]], size=16))
    assert "".join(cut) == text and all(len(piece) <= 32 for piece in cut)
    assert cut == list(pieces(iter(text), size=16)), "the cuts depend on how the text arrives"
    if all(before[-1].isalnum() and piece[0] in " \n" for before, piece in pairwise(cut)):  # each was cut where words end
        assert [i for piece in cut for i in bpe.encode(piece)] == bpe.encode(text)


@given(st.lists(st.tuples(st.sampled_from(["\u4e2d", "ab", " ", "-", "7", "\n", "\u0e01\u0e33", "_"]), st.integers(0, 700)), max_size=6))
@settings(max_examples=60, deadline=None)
def test_no_word_is_learned_from_that_is_thousands_of_letters_long(runs):
    text = "".join(character * count for character, count in runs)
    parts = list(without_long_runs(text))
    assert "".join(parts) == text and all(parts)
    for part in parts:
        assert max((len(run) for run in re.findall(r"\w+|\s+|[^\w\s]+", part)), default=0) <= 256
    if not re.search(r"\w{257}|\s{257}|[^\w\s]{257}", text):
        assert parts == [text][: len(text)], "ordinary text must be learned from as before"


def test_words_without_end_still_teach_their_pairs_and_leave_the_pattern_alone():
    clauses = ["\u4eba\u4e4b\u521d\u6027\u672c\u5584", "\u6027\u76f8\u8fd1\u4e60\u76f8\u8fdc"] * 400
    endless, ordinary = Tokenizer.train(["".join(clauses)], 384), Tokenizer.train([", ".join(clauses)], 384)
    assert json.loads(endless.to_json())["pre_tokenizer"] == json.loads(ordinary.to_json())["pre_tokenizer"]
    assert len(endless.encode("".join(clauses))) < 1.2 * len(ordinary.encode("".join(clauses)))


def test_ids_match_the_tokenizers_library_and_transformers_reads_the_file(bpe, char, tmp_path):
    from tokenizers import Tokenizer as Library
    from transformers import PreTrainedTokenizerFast

    for tokenizer in (bpe, char):
        assert Library.from_str(tokenizer.to_json()).encode(SOURCE).ids == tokenizer.encode(SOURCE)
        tokenizer.save(tmp_path / "tokenizer.json")
        fast = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
        assert fast.encode(SOURCE, add_special_tokens=False) == tokenizer.encode(SOURCE)
        assert fast.decode(tokenizer.encode(SOURCE), clean_up_tokenization_spaces=False) == SOURCE


def test_the_gpt2_pattern_is_used_exactly():
    tokenizer = Tokenizer.train([SOURCE], 320)
    split = json.loads(tokenizer.to_json())["pre_tokenizer"]
    assert split == {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def test_special_tokens_have_fixed_ids_and_the_vocabulary_is_a_multiple_of_64(bpe):
    assert [bpe.special_tokens[name] for name in BPE_SPECIALS] == list(range(16))
    assert bpe.eot_id == 0 and bpe.eot_token == END_OF_TEXT
    assert bpe.vocab_size % 64 == 0
    assert Tokenizer.train(["ab"], 1000).vocab_size == 320, "text with nothing to merge needs the bytes only"
    assert Tokenizer.train([SOURCE * 3], 330).vocab_size == 384


def test_names_of_special_tokens_in_a_text_stay_text(bpe):
    text = f"before{END_OF_TEXT}after"
    assert bpe.eot_id not in bpe.encode(text) and bpe.decode(bpe.encode(text)) == text
    marked = bpe.encode(text, allow_special=True)
    assert marked.count(bpe.eot_id) == 1
    assert bpe.decode(marked) == "beforeafter" and bpe.decode(marked, skip_special=False) == text


def test_characters_are_sorted_and_special_tokens_come_after_them():
    plain = Tokenizer.train(["banana\n"], kind="char")
    assert plain.vocab_size == 4 and plain.encode("\nabn") == [0, 1, 2, 3] and plain.eot_id is None
    ended = Tokenizer.train(["banana\n"], kind="char", specials=(END_OF_TEXT,))
    assert ended.vocab_size == 5 and ended.eot_id == 4 and ended.encode("nab") == [3, 1, 2]


def test_an_unknown_character_is_named(char):
    with pytest.raises(UserError, match=r"'\u20ac' \(U\+20AC\)"):
        char.encode("10 \u20ac")
    with pytest.raises(UserError, match="U\\+10FFFF"):
        char.encode("\U0010ffff")


def test_training_twice_gives_the_same_hash_and_other_text_another():
    first, again, other = (Tokenizer.train([text], 400) for text in (SOURCE * 9, SOURCE * 9, SOURCE * 9 + "extra words, extra words"))
    assert first.hash == again.hash == Tokenizer.from_json(first.to_json()).hash
    assert first == again and first != other and len(first.hash) == 64


def test_saving_and_loading_keeps_everything(bpe, tmp_path):
    bpe.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.hash == bpe.hash and loaded.encode(SOURCE) == bpe.encode(SOURCE)
    assert (tmp_path / "tokenizer.json").read_text("utf-8") == bpe.to_json()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "{}", '{"model": {"type": "BPE"}}', '{"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [["a", "b"]]}}']
)
def test_a_damaged_file_is_refused_with_its_name(content, tmp_path):
    (tmp_path / "broken.json").write_text(content)
    with pytest.raises(DataError, match=r"tokenizer|broken\.json is empty"):
        Tokenizer.load(tmp_path / "broken.json")


def test_wrong_input_is_explained(bpe, tmp_path):
    with pytest.raises(DataError, match="cllm tokenizer train"):
        Tokenizer.load(tmp_path / "missing.json")
    with pytest.raises(UserError, match="at least 320"):
        Tokenizer.train(["text"], 100)
    with pytest.raises(UserError, match="bpe, wordpiece, unigram, char"):
        Tokenizer.train(["text"], kind="word")
    with pytest.raises(UserError, match="outside the vocabulary"):
        bpe.decode([bpe.vocab_size])
    with pytest.raises(UserError, match="surrogate"):
        bpe.encode("half \ud800")
    with pytest.raises(UserError, match="list"):
        Tokenizer.train("text\nitself")
    with pytest.raises(DataError, match="no text"):
        Tokenizer.train([], kind="char")


def test_invalid_bytes_become_replacement_characters_and_wait_for_the_rest(bpe):
    ids = bpe.encode("\u2603")
    partial = [i for i in range(bpe.vocab_size) if bpe.token_bytes(i) == b"\xe2"][:1]
    assert partial and bpe.decode(partial) == "\ufffd"
    decoder = bpe.stream_decoder()
    assert decoder.push(partial[0]) == "" and decoder.finish() == "\ufffd"
    assert bpe.decode(ids) == "\u2603"


def test_byte_lengths_add_up_to_the_text_and_are_zero_for_special_tokens(bpe):
    ids = np.array(bpe.encode(SOURCE))
    assert bpe.byte_lengths[ids].sum() == len(SOURCE.encode("utf-8"))
    assert not bpe.byte_lengths[:16].any()


def test_statistics_count_bytes_characters_and_what_cannot_be_expressed(bpe, char, tmp_path):
    stats = bpe.stats([SOURCE, SOURCE])
    assert stats["num_chars"] == 2 * len(SOURCE) and stats["num_bytes"] == 2 * len(SOURCE.encode("utf-8"))
    assert stats["num_tokens"] == 2 * len(bpe.encode(SOURCE)) and stats["coverage"] == 1.0
    assert stats["bytes_per_token"] == stats["num_bytes"] / stats["num_tokens"] > 1
    assert char.stats(["def\u20ac"])["coverage"] == 0.75
    (tmp_path / "a.txt").write_text(SOURCE, "utf-8")
    assert bpe.stats(tmp_path)["num_chars"] == len(SOURCE)


def test_a_tokenizer_of_another_program_can_be_read():
    content = {
        "version": "1.0",
        "added_tokens": [{"id": 0, "content": "</s>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "never", "split": False},
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "vocab": {"</s>": 0, "<0x0A>": 1, "\u2581": 2, "h": 3, "i": 4, "hi": 5},
            "merges": [["h", "i"]],
            "byte_fallback": True,
        },
    }
    tokenizer = Tokenizer.from_json(json.dumps(content))
    assert tokenizer.eot_id == 0 and tokenizer.encode("hi hi\n") == [5, 2, 5, 1]
    assert tokenizer.decode([5, 2, 5, 1, 0]) == "hi hi\n"


def test_the_default_vocabulary_grows_with_the_text():
    assert [default_vocab_size(n) for n in (0, 10**6, 10**8, 10**12)] == [512, 1024, 16384, 32768]


def test_a_folder_and_files_can_be_learned_from(tmp_path):
    (tmp_path / "a.py").write_text(SOURCE, "utf-8")
    (tmp_path / "b.txt").write_text("Gr\u00fc\u00dfe", "cp1252")
    whole = Tokenizer.train(tmp_path, kind="char")
    assert whole.vocab_size == len(set(SOURCE + "Gr\u00fc\u00dfe")) + 1 and whole.eot_id is not None, "several documents have ends"
    assert Tokenizer.train([Path(tmp_path / "a.py")], kind="char").vocab_size == len(set(SOURCE))


def test_settings_beside_the_tokenizer_are_read_and_a_damaged_file_is_named(tmp_path):
    tokenizer = Tokenizer.train(["some text " * 50], vocab_size=320)
    tokenizer.save(tmp_path / "tokenizer.json")
    assert not (tmp_path / "tokenizer_config.json").exists() and tokenizer.settings == {}
    settings = {"eos_token": {"content": "<|end|>"}, "chat_template": [{"name": "tools", "template": "x"}, {"name": "default", "template": "y"}]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    found = Tokenizer.load(tmp_path)
    assert (found.eot_token, found.chat_template, found.hash) == ("<|end|>", "y", tokenizer.hash)
    found.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path).settings == found.settings == {"eos_token": "<|end|>", "chat_template": "y"}
    (tmp_path / "chat_template.jinja").write_text("z")
    assert Tokenizer.load(tmp_path).chat_template == "z"
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(DataError, match=r"tokenizer_config\.json cannot be read"):
        Tokenizer.load(tmp_path)
