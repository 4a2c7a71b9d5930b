"""Every kind of tokenizer: text comes back, other programs read the same file as the same tokens, and training is reproducible."""

import base64
import json
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.data.tokens.tiktoken import ENCODINGS, from_tiktoken, read_ranks
from cllm.data.tokens.tokenizer import KINDS, Tokenizer
from cllm.data.tokens.vocabulary import PRE_TOKENIZERS
from cllm.runtime.errors import DataError, UserError

TEXT = "".join(
    f"The {a} {b} doesn't know {n * 37} words,\n\tnor what the {b}er {a}s were like.\n\n"
    for n, (a, b) in enumerate((a, b) for a in ("river", "old house", "Straße", "garden", "日本") for b in ("walk", "sing", "wait", "slow", "talk"))
)
LEARNED = [kind for kind in KINDS if kind != "char"]


@pytest.fixture(scope="module", params=[(kind, how) for kind in LEARNED for how in PRE_TOKENIZERS], ids=lambda each: "-".join(each))
def tokenizer(request):
    return Tokenizer.train([TEXT], 704, request.param[0], pre_tokenizer=request.param[1])


def check_exact(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special=False) == text
    decoder = tokenizer.stream_decoder()
    assert "".join(map(decoder.push, ids)) + decoder.finish() == text


@given(st.text() | st.text("#'sa \n日é\u2581\0Ġ<|>"))
@settings(max_examples=80, deadline=None)
@pytest.mark.parametrize("kind", ["wordpiece", "unigram"])
def test_any_text_comes_back_unchanged(kind, text):
    check_exact(trained(kind), text)


TRAINED = {}


def trained(kind):
    if kind not in TRAINED:
        TRAINED[kind] = Tokenizer.train([TEXT], 640, kind)
    return TRAINED[kind]


@pytest.mark.parametrize(
    "text",
    ["<|endoftext|> <|pad|><|user|>", "##ing # ### #" + "#" * 200, "a" * 1000, "\x00\r\n\u2028", "The river ##er's", " ", "\u2581x", "\u017f'S"],
)
def test_hard_texts_come_back_unchanged(tokenizer, text):
    check_exact(tokenizer, text)
    assert not tokenizer.losses and not set(tokenizer.encode(text)) & set(tokenizer.special_tokens.values())


def test_training_again_gives_the_same_bytes_and_other_text_others(tokenizer):
    how = {
        "pre_tokenizer": "llama-bpe"
        if "Sequence" in tokenizer.to_json() and "Split" in tokenizer.to_json() and "(?i:" in tokenizer.to_json()
        else "gpt-2"
    }
    assert Tokenizer.train([TEXT], 704, tokenizer.kind, **how).to_json() == tokenizer.to_json()
    assert Tokenizer.train([TEXT[:900] * 3], 704, tokenizer.kind, **how) != tokenizer


def test_the_vocabulary_has_the_size_that_was_asked_for_and_learns(tokenizer):
    assert 320 < tokenizer.vocab_size <= 704 and tokenizer.vocab_size % 64 == 0 and sorted(tokenizer.special_tokens.values())[:16] == list(range(16))
    assert len(tokenizer.encode(TEXT)) < len(TEXT.encode()) / (1.8 if tokenizer.kind == "wordpiece" else 2)
    assert int(tokenizer.byte_lengths[tokenizer.encode(TEXT)].sum()) == len(TEXT.encode())


def test_transformers_reads_the_same_tokens(tokenizer, tmp_path):
    transformers = pytest.importorskip("transformers", reason="compares with transformers")
    tokenizer.save(tmp_path / "tokenizer.json")
    other = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), clean_up_tokenization_spaces=False)
    for text in (TEXT, "##er ### x", "Ünï 🙂 \n\n"):
        ids = other.encode(text, add_special_tokens=False)
        assert ids == tokenizer.encode(text) and other.decode(ids, clean_up_tokenization_spaces=False) == text
    assert Tokenizer.load(tmp_path).hash == tokenizer.hash


def test_unigram_takes_the_likeliest_way_to_write_each_word():
    tokenizer = trained("unigram")
    entries = dict(json.loads(tokenizer.to_json())["model"]["vocab"])
    from tokenizers import Tokenizer as Backend

    backend = Backend.from_str(tokenizer.to_json())
    for word, _ in backend.pre_tokenizer.pre_tokenize_str(TEXT[:400]):
        best = [0.0] + [-1e9] * len(word)
        for end in range(1, len(word) + 1):
            best[end] = max(best[start] + entries.get(word[start:end], -1e9) for start in range(max(0, end - 16), end))
        tokens = [backend.id_to_token(i) for i in backend.model.tokenize(word) and [each.id for each in backend.model.tokenize(word)]]
        assert "".join(tokens) == word and sum(entries[each] for each in tokens) == pytest.approx(best[-1])


@pytest.mark.parametrize("kind, least", [("bpe", 320), ("unigram", 320), ("wordpiece", 576)])
def test_a_vocabulary_without_room_for_the_bytes_is_refused(kind, least):
    with pytest.raises(UserError, match=f"at least {least} for 256 bytes"):
        Tokenizer.train([TEXT], 260, kind)
    with pytest.raises(UserError, match="pre_tokenizer must be one of"):
        Tokenizer.train([TEXT], 704, kind, pre_tokenizer="other")


def test_what_other_programs_cannot_hold_is_refused_by_name():
    from cllm.interop.gguf import _vocabulary

    for kind in ("wordpiece", "unigram"):
        with pytest.raises(UserError, match="only byte-level BPE and character tokenizers can be put into a GGUF file"):
            _vocabulary(trained(kind), 704)


# -- tiktoken -----------------------------------------------------------------------------------------------------------------------


def ranks_of(tokenizer):
    """The ranks of a trained BPE, as tiktoken lists them: bytes, then merges."""
    tokens = [tokenizer.token_bytes(i) for i in range(16, tokenizer.vocab_size) if i not in tokenizer.special_tokens.values()]
    return {token: rank for rank, token in enumerate(dict.fromkeys(tokens))}


def write_ranks(path, ranks):
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()))
    return path


def joined(word, ranks):
    """tiktoken's rule, written from its description: a known word whole; else the neighbours of lowest rank, the leftmost first."""
    parts = [word] if word in ranks else [word[i : i + 1] for i in range(len(word))]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        _, place = min(pairs)
        parts[place : place + 2] = [parts[place] + parts[place + 1]]


def random_ranks(seed):
    """Ranks that no training made: unions of any earlier tokens, so that some tokens are never reached by joining."""
    rng = random.Random(seed)
    tokens = [bytes([byte]) for byte in range(256)]
    letters = [b"a", b"b", b" ", b"c"]
    while len(tokens) < 330:
        new = rng.choice(letters) + rng.choice(letters)
        if new not in tokens and len(new) <= 7:
            tokens.append(new)
            letters.append(new)
    whole = [bytes(rng.choices(b"abc", k=5)) for _ in range(10)]
    return {token: rank for rank, token in enumerate(dict.fromkeys([*tokens, *whole]))}


@pytest.mark.parametrize("encoding", list(ENCODINGS))
@pytest.mark.parametrize("seed", range(3))
def test_ranks_give_tiktokens_ids(encoding, seed, tmp_path):
    ranks = ranks_of(trained("bpe")) if seed == 0 else random_ranks(seed)
    tokenizer = Tokenizer(from_tiktoken(write_ranks(tmp_path / "some.tiktoken", ranks), encoding))
    from tokenizers import Tokenizer as Backend

    words = Backend.from_str(tokenizer.to_json()).pre_tokenizer
    rng = random.Random(seed)
    texts = [TEXT, *("".join(rng.choices("abc ", k=60)) for _ in range(200))]
    for text in texts:
        spans = [text[start:end] for _, (start, end) in words.pre_tokenize_str(text)] if text.isascii() else None
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        if spans is not None:
            assert "".join(spans) == text
            assert ids == [rank for span in spans for rank in joined(span.encode(), ranks)]
    assert tokenizer.special_tokens == {"<|endoftext|>": len(ranks)} and tokenizer.eot_id == len(ranks)
    assert not tokenizer.losses


def test_the_encoding_is_told_by_the_name_or_asked_for(tmp_path):
    path = write_ranks(tmp_path / "cl100k_base.tiktoken", ranks_of(trained("bpe")))
    assert Tokenizer.load(path) == Tokenizer(from_tiktoken(path, "cl100k"))
    with pytest.raises(UserError, match="Name its encoding"):
        Tokenizer.load(path.rename(tmp_path / "mine.tiktoken"))


def test_of_ranks_only_those_with_a_known_split_go_into_a_gguf_file(tmp_path):
    from cllm.interop.gguf import _vocabulary

    path = write_ranks(tmp_path / "a.tiktoken", ranks_of(trained("bpe")))
    for encoding, known in (("r50k", "gpt-2"), ("p50k", "gpt-2"), ("cl100k", "llama-bpe")):
        assert _vocabulary(Tokenizer(from_tiktoken(path, encoding)), 704)["pre"] == known
    with pytest.raises(UserError, match=r"llama\.cpp does not know this tokenizer's way of splitting text"):
        _vocabulary(Tokenizer(from_tiktoken(path, "o200k")), 704)


@pytest.mark.parametrize(
    "content, problem",
    [
        (b"", "256 of the 256 bytes have no rank"),
        (b"YQ== 1\nYg==\n", "line 2 is no token in base64 and a number"),
        (b"{}\n", "line 1 is no token"),
        (b"".join(base64.b64encode(bytes([b])) + b" %d\n" % min(b, 9) for b in range(256)), "two tokens have the same rank"),
    ],
)
def test_a_file_that_is_no_list_of_ranks_is_refused_with_its_name(content, problem, tmp_path):
    (tmp_path / "a.tiktoken").write_bytes(content)
    with pytest.raises(DataError, match=f"a.tiktoken is not a .*{problem}"):
        read_ranks(tmp_path / "a.tiktoken")


# -- made elsewhere -----------------------------------------------------------------------------------------------------------------


def test_berts_tokenizer_is_read_and_what_it_loses_is_said():
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers, trainers

    backend = Backend(models.WordPiece(unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.train_from_iterator([TEXT], trainers.WordPieceTrainer(vocab_size=300, special_tokens=["[UNK]", "[SEP]"], show_progress=False))
    tokenizer = Tokenizer.from_json(backend.to_str())
    assert tokenizer.kind == "wordpiece" and tokenizer.decode(tokenizer.encode("The garden walks")) == " the garden walks"
    assert tokenizer.losses == [
        "it changes text before it reads it (BertNormalizer)",
        "it leaves out what stands between words (BertPreTokenizer)",
        "what it does not know becomes an unknown token",
    ]
