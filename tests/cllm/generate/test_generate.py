"""Generation: cache or not, seeds, samples, streaming, stop strings, context limits."""

import codecs

import pytest
import torch

from cllm.config.model import ModelConfig
from cllm.generate.continuation import StopFilter
from cllm.generate.decoding import generate, stream
from cllm.model.model import Model
from cllm.runtime.errors import CLLMError, UserError


class ByteTokenizer:
    """One token per byte, 256 is the end of text: every character outside ASCII spans tokens."""

    vocab_size = 257
    eot_id: int | None = 256

    def encode(self, text):
        return list(text.encode())

    def stream_decoder(self):
        return ByteDecoder()


class ByteDecoder:
    def __init__(self):
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token):
        return self.decoder.decode(bytes([token]))

    def finish(self):
        return self.decoder.decode(b"", final=True)


class Parrot(torch.nn.Module):
    """Says a fixed text after the prompt, whatever the settings: logits of a model without one."""

    def __init__(self, text, prompt_tokens, end=True):
        super().__init__()
        self.script = list(text.encode()) + ([256] if end else [])
        self.prompt_tokens = prompt_tokens
        self.config = ModelConfig(vocab_size=300, embed_dim=8, num_layers=1, num_heads=1, max_seq_len=10_000)
        self.embedding_weight = torch.zeros(1)

    def forward(self, tokens, last_only):
        logits = torch.full((len(tokens), 1, 300), -50.0)
        logits[:, 0, self.script[(tokens.shape[1] - self.prompt_tokens) % len(self.script)]] = 50.0
        logits[:, 0, 299] = 60.0  # a padding row of the embedding: no token of the tokenizer
        return logits


def make_model(**changes):
    shape = {
        "vocab_size": 264,
        "embed_dim": 32,
        "num_layers": 2,
        "num_heads": 4,
        "max_seq_len": 32,
        "tie_embeddings": False,
        **changes,
    }
    model = Model(ModelConfig(**shape), seed=5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


def parrot(text, end=True, **settings):
    return generate(Parrot(text, 2, end), ByteTokenizer(), ">>", use_cache=False, **settings)[0]


@pytest.mark.parametrize("changes", [{"num_kv_heads": 2, "qk_norm": True}, {"norm": "layer"}])
def test_greedy_text_is_the_same_with_and_without_the_cache_beyond_the_context_too(changes):
    model = make_model(**changes)
    settings = {"max_tokens": 45, "temperature": 0.0}
    cached, plain = (generate(model, ByteTokenizer(), "hello world", use_cache=use, **settings)[0] for use in (True, False))
    assert cached.tokens == plain.tokens and cached.text == plain.text
    assert len(cached.tokens) == 45 or cached.finish_reason == "end"
    assert len(set(cached.tokens)) > 3
    assert cached.prompt_tokens == 11 and cached.seconds > 0
    assert cached.tokens_per_second == pytest.approx(len(cached.tokens) / cached.seconds)


def test_same_seed_same_text_and_samples_do_not_depend_on_their_number():
    model = make_model()
    settings = {"max_tokens": 12, "temperature": 1.0, "seed": 3}
    three = generate(model, ByteTokenizer(), "ab", samples=3, **settings)
    again = generate(model, ByteTokenizer(), "ab", samples=3, **settings)
    one = generate(model, ByteTokenizer(), "ab", samples=1, **settings)
    assert [g.tokens for g in three] == [g.tokens for g in again]
    assert one[0].tokens == three[0].tokens
    assert len({tuple(g.tokens) for g in three}) == 3
    other = generate(model, ByteTokenizer(), "ab", samples=1, **{**settings, "seed": 4})
    assert other[0].tokens != one[0].tokens
    uncached = generate(model, ByteTokenizer(), "ab", samples=3, use_cache=False, **settings)
    assert [g.tokens for g in uncached] == [g.tokens for g in three]


def test_samples_that_end_early_leave_the_others_alone():
    model = make_model()
    settings = {"max_tokens": 30, "temperature": 1.0, "seed": 1}
    free = generate(model, ByteTokenizer(), "ab", samples=4, **settings)
    stop = chr(next(token for token in free[1].tokens[3:] if 32 < token < 127))
    stopped = generate(model, ByteTokenizer(), "ab", samples=4, stop=stop, **settings)
    assert stopped[1].finish_reason == "stop"
    for before, after in zip(free, stopped):
        assert before.tokens[: len(after.tokens)] == after.tokens
        assert after.text == before.text.split(stop)[0]


def test_streamed_pieces_are_the_generated_text():
    model = make_model()
    settings = {"max_tokens": 40, "temperature": 1.0, "seed": 2}
    pieces = list(stream(model, ByteTokenizer(), "x", **settings))
    assert "".join(pieces) == generate(model, ByteTokenizer(), "x", **settings)[0].text
    seen = []
    generate(model, ByteTokenizer(), "x", on_piece=lambda index, piece: seen.append((index, piece)), **settings)
    assert seen == [(0, piece) for piece in pieces]


def test_characters_are_streamed_whole():
    text = "naïve 😀 ü"
    pieces = list(stream(Parrot(text, 2), ByteTokenizer(), ">>", use_cache=False, temperature=0.0))
    assert pieces == list(text)
    assert parrot("😀", max_tokens=3).text == "\ufffd"  # cut inside a character


def test_finish_reasons():
    assert (parrot("abc").text, parrot("abc").finish_reason, parrot("abc").tokens) == ("abc", "end", [97, 98, 99])
    assert (parrot("abc", max_tokens=2).text, parrot("abc", max_tokens=2).finish_reason) == ("ab", "length")
    assert (parrot("abc", stop="c").text, parrot("abc", stop="c").finish_reason) == ("ab", "stop")


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("END", "say the wENord "),
        (("zzz", "\n\n"), "say the wENord END now"),
        ("wENx", "say the wENord END now"),
        ("say", ""),
        ("wEN", "say the "),
    ],
)
def test_a_stop_string_over_several_tokens_never_shows(stop, expected):
    text = "say the wENord END now"
    model = Parrot(text, 2)
    pieces = list(stream(model, ByteTokenizer(), ">>", use_cache=False, stop=stop))
    assert "".join(pieces) == expected
    shown = ""
    for piece in pieces:
        shown += piece
        assert expected.startswith(shown)


def test_held_back_text_appears_when_it_was_no_stop_string():
    stops = StopFilter(["abab", "bc"])
    assert [stops.push(piece) for piece in ("x", "a", "b", "a", "x", "b")] == ["x", "", "", "", "abax", ""]
    assert stops.flush() == "b" and not stops.stopped
    assert stops.push("zabaab") == "zaba" and stops.push("ab!") == "" and stops.stopped
    overlapping = StopFilter(["aab"])
    assert "".join(overlapping.push(c) for c in "aaab") == "a" and overlapping.stopped
    assert StopFilter([]).push("anything") == "anything"
    assert parrot("wait EN", stop="END").text == "wait EN"


def test_a_longer_stop_string_that_starts_earlier_wins():
    stops = StopFilter(["cd", "bcde"])
    assert stops.push("abcdef") == "a" and stops.stopped


def test_prompts_that_do_not_fit_are_refused_or_cut():
    model = make_model()
    prompt = "0123456789" * 4
    with pytest.raises(UserError, match="the prompt has 40 tokens, the model's context holds 32"):
        generate(model, ByteTokenizer(), prompt)
    with pytest.raises(UserError, match="truncate_prompt"):
        stream(model, ByteTokenizer(), prompt)  # at the call, not at the first piece
    settings = {"max_tokens": 5, "temperature": 0.0}
    cut = generate(model, ByteTokenizer(), prompt, truncate_prompt=True, **settings)[0]
    assert cut.prompt_tokens == 32
    assert cut.tokens == generate(model, ByteTokenizer(), prompt[-32:], **settings)[0].tokens


def test_wrong_settings_are_refused_by_name():
    model, tokenizer = make_model(), ByteTokenizer()
    for setting, message in (
        ({"max_tokens": 0}, "max_tokens"),
        ({"samples": 0}, "samples"),
        ({"stop": ["a", ""]}, "stop string"),
        ({"top_p": 2.0}, "top_p"),
    ):
        with pytest.raises(UserError, match=message):
            generate(model, tokenizer, "a", **setting)
    with pytest.raises(UserError, match="outside 0 to 256"):
        generate(model, tokenizer, [1, 260])
    small = make_model(vocab_size=100)
    with pytest.raises(UserError, match="do not belong together"):
        generate(small, tokenizer, "a")


def test_an_empty_prompt_starts_a_document():
    model, tokenizer = make_model(), ByteTokenizer()
    settings = {"max_tokens": 3, "temperature": 0.0}
    assert generate(model, tokenizer, "", **settings)[0].tokens == generate(model, tokenizer, [256], **settings)[0].tokens
    tokenizer.eot_id = None
    with pytest.raises(UserError, match="the prompt is empty"):
        generate(model, tokenizer, "")


def test_a_damaged_model_is_an_error_not_a_text():
    model = make_model()
    with torch.no_grad():
        model.embedding_weight[:] = torch.nan
    with pytest.raises(CLLMError, match="not finite"):
        generate(model, ByteTokenizer(), "a")


def test_the_projects_own_tokenizer_works():
    tokenizer_module = pytest.importorskip("cllm.data.tokens.tokenizer")
    tokenizer = tokenizer_module.Tokenizer.train(["abcd bcda cdab dabc\n"], vocab_size=16, kind="char")
    model = make_model(vocab_size=tokenizer.vocab_size + 3)
    result = generate(model, tokenizer, "abc", max_tokens=20, seed=9)[0]
    assert result.text == tokenizer.decode(result.tokens)
