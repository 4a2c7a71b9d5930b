"""Beam search: what looking at every text finds, what transformers finds, and the same texts from pages as from the whole text again."""

import itertools

import pytest
import torch
from command import cllm

from cllm import Model, ModelConfig, save
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.generate.beams import PagedRows, generate_beams, search
from cllm.generate.decoding import generate
from cllm.interop.hf import save_hf
from cllm.runtime.errors import CLLMError, UserError


class Table:
    """Logits that depend on the whole text: random, the same for the same text."""

    def __init__(self, seed, vocab_size, round_to=None):
        self.seed, self.vocab_size, self.round_to = seed, vocab_size, round_to
        self.texts = [()]
        self.first = self.logits(())[None]

    def logits(self, text):
        generator = torch.Generator().manual_seed(hash((self.seed, text)) % 2**60)
        found = 2 * torch.randn(self.vocab_size, generator=generator)
        return found if self.round_to is None else (found / self.round_to).round() * self.round_to

    def advance(self, rows):
        self.texts = [(*self.texts[row], token) for row, token in rows]
        return torch.stack([self.logits(text) for text in self.texts])


def every_text(table, max_tokens, end):
    """(text, log-probability, number of tokens) of all texts that end with `end` or after max_tokens tokens."""
    for length in range(1, max_tokens + 1):
        for text in itertools.product(range(table.vocab_size), repeat=length):
            if end not in text[:-1] and (text[-1] == end or length == max_tokens):
                logits = torch.stack([table.logits(text[:place]) for place in range(length)])
                value = logits.double().log_softmax(-1)[range(length), list(text)].sum().item()
                yield [token for token in text if token != end], value, length


@pytest.mark.parametrize("penalty", [-1.0, 0.0, 0.7, 1.0, 3.0])
@pytest.mark.parametrize("seed", range(4))
def test_a_search_that_is_wide_enough_finds_what_looking_at_every_text_finds(seed, penalty):
    table = Table(seed, 4)
    expected = sorted(((value / length**penalty, text) for text, value, length in every_text(table, 4, end=2)), reverse=True)
    found = search(table, table.first, beams=300, max_tokens=4, end_tokens=frozenset({2}), length_penalty=penalty, early_stopping="never")
    assert [beam.tokens for beam in found] == [text for _, text in expected]
    assert [beam.score for beam in found] == pytest.approx([score for score, _ in expected])
    assert all(beam.finish_reason == ("length" if len(beam.tokens) == 4 else "end") for beam in found)


def test_a_narrow_search_keeps_the_best_of_each_step():
    """Width 1 is greedy; a wider one finds a text at least as likely here, which no greedy choice leads to."""
    better = 0
    for seed in range(20):
        table = Table(seed, 6)
        (greedy,) = search(table, table.first, beams=1, max_tokens=5)
        text = []
        for _ in range(5):
            text.append(int(table.logits(tuple(text)).argmax()))
        assert greedy.tokens == text
        table = Table(seed, 6)
        better += search(table, table.first, beams=4, max_tokens=5)[0].score > greedy.score
    assert better > 5


def test_ties_go_to_the_better_beam_and_the_lower_token():
    class Equal(Table):
        def logits(self, text):
            return torch.tensor([0.0, 0.0, -torch.inf, 0.0])

    table = Equal(0, 4)
    found = search(table, table.first, beams=4, max_tokens=2)
    assert [beam.tokens for beam in found] == [[0, 0], [0, 1], [0, 3], [1, 0]]
    table = Equal(0, 4)
    assert len(search(table, table.first, beams=50, max_tokens=2)) == 9  # a token without any chance is in none


def test_early_stopping_ends_when_it_says():
    """One text ends at once and is likely; later ones become better only with a penalty that prefers long texts."""

    class Once(Table):
        def logits(self, text):
            return torch.tensor([0.3, 0.0, -4.0]) if not text else torch.tensor([-9.0, 9.0, -30.0])

    lengths = {}
    for early in (True, False, "never"):
        table = Once(0, 3)
        (found,) = search(table, table.first, beams=1, max_tokens=30, end_tokens=frozenset({0}), early_stopping=early, length_penalty=1.0)
        lengths[early] = len(table.texts[0]), len(found.tokens)
    assert lengths[True] == lengths[False] == (0, 0)
    assert lengths["never"] == (29, 30)


def test_logits_that_are_not_finite_are_an_error():
    table = Table(0, 4)
    with pytest.raises(CLLMError, match="not finite"):
        search(table, torch.tensor([[0.0, torch.nan]]), beams=2, max_tokens=2)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the quick brown fox jumps over the lazy dog. " * 40], vocab_size=320)


def model_of(**changes):
    shape = {"vocab_size": 320, "embed_dim": 32, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "max_seq_len": 160, **changes}
    model = Model(ModelConfig(**shape), seed=5)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("grams.weight"):
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


@pytest.fixture(scope="module")
def model():
    return model_of()


class Again:
    """Every text from its beginning, each by itself."""

    def __init__(self, model, prompt):
        self.model, self.texts = model, [list(prompt)]
        self.first = self._logits()

    def advance(self, rows):
        self.texts = [[*self.texts[row], token] for row, token in rows]
        return self._logits()

    @torch.no_grad()
    def _logits(self):
        return torch.cat([self.model(torch.tensor([text]), last_only=True)[:, 0] for text in self.texts])


@pytest.mark.parametrize(
    ("prompt_tokens", "changes", "kv_cache"),
    [(1, {}, None), (122, {"bigram_rows": 500, "trigram_rows": 500}, None), (128, {}, None), (122, {}, "int8")],
)
def test_texts_in_pages_are_those_of_the_whole_texts_again(prompt_tokens, changes, kv_cache):
    model = model_of(**changes)
    model.kv_cache = kv_cache
    prompt = torch.randint(320, (prompt_tokens,), generator=torch.Generator().manual_seed(prompt_tokens)).tolist()
    paged, again = PagedRows(model, prompt, 320, beams=3, max_tokens=14), Again(model, prompt)
    found, expected = (search(rows, rows.first, beams=3, max_tokens=14, early_stopping="never") for rows in (paged, again))
    assert found == expected and len({tuple(beam.tokens) for beam in found}) == 3
    pages = {page for pages in paged._pages for page in pages}
    assert paged._pool.num_free == paged._pool.num_pages - len(pages)  # nothing is held that no text needs


CALLS = [(beams, penalty, early) for beams in (2, 5) for penalty, early in ((1.0, False), (1.0, True), (2.0, "never"), (0.0, "never"), (-1.0, False))]


def test_transformers_finds_the_same_texts(tmp_path):
    transformers = pytest.importorskip("transformers")
    ended, ends = 0, [3, 7, 11, 19]
    model = model_of(vocab_size=24, max_seq_len=64)
    with torch.no_grad():
        model.embedding_weight.mul_(0.3)
    save_hf(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    for number, (beams, penalty, early) in enumerate(CALLS):
        prompt = torch.randint(24, (6,), generator=torch.Generator().manual_seed(number))
        rows = PagedRows(model, prompt.tolist(), 24, beams, 12)
        ours = search(rows, rows.first, beams=beams, max_tokens=12, end_tokens=frozenset(ends), length_penalty=penalty, early_stopping=early)
        found = theirs.generate(
            prompt[None], attention_mask=torch.ones(1, 6, dtype=torch.int64), num_beams=beams, num_return_sequences=beams, max_new_tokens=12,
            do_sample=False, length_penalty=penalty, early_stopping=early, eos_token_id=ends, pad_token_id=7, return_dict_in_generate=True,
            output_scores=True,
        )  # fmt: skip
        texts = [row[6:].tolist() for row in found.sequences]
        texts = [list(itertools.takewhile(lambda token: token not in ends, text)) for text in texts]
        assert [beam.tokens for beam in ours] == texts, (beams, penalty, early)
        assert [beam.score for beam in ours] == pytest.approx(found.sequences_scores.tolist(), abs=1e-3)
        ended += sum(beam.finish_reason == "end" for beam in ours)
    assert ended > 3


def test_generate_beams_gives_texts_the_best_first(model, tokenizer):
    results = generate_beams(model, tokenizer, "the quick", beams=4, max_tokens=10)
    assert [each.score for each in results] == sorted((each.score for each in results), reverse=True) and len(results) == 4
    assert all(each.text == tokenizer.decode(each.tokens) and each.prompt_tokens == len(tokenizer.encode("the quick")) for each in results)
    again = generate_beams(model, tokenizer, "the quick", beams=4, max_tokens=10)
    assert [(each.tokens, each.score) for each in results] == [(each.tokens, each.score) for each in again]
    greedy = generate(model, tokenizer, "the quick", max_tokens=10, temperature=0.0)[0]
    assert generate_beams(model, tokenizer, "the quick", beams=1, max_tokens=10)[0].tokens == greedy.tokens


def test_a_stop_string_ends_a_text_and_a_full_context_does(model, tokenizer):
    free = generate_beams(model, tokenizer, "the", beams=2, max_tokens=12)[0]
    stop = free.text[len(free.text) // 2 :][:2]
    stopped = generate_beams(model, tokenizer, "the", beams=2, max_tokens=12, stop=stop)
    assert any(each.finish_reason == "stop" for each in stopped)
    assert all(stop not in each.text and (each.finish_reason == "stop") == (stop in tokenizer.decode(each.tokens)) for each in stopped)
    full = generate_beams(model, tokenizer, [20] * 158, beams=2, max_tokens=12, early_stopping="never")
    assert all(len(each.tokens) <= 3 for each in full) and any(each.finish_reason == "length" for each in full)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"beams": 0}, "beams"), ({"beams": 257}, "beams"), ({"max_tokens": 0}, "max_tokens"), ({"stop": ["a", ""]}, "stop string")],
)
def test_wrong_settings_are_refused(model, tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        generate_beams(model, tokenizer, "a", **{"beams": 2, **options})


def test_the_command_prints_the_best_and_has_all_in_json(model, tokenizer, tmp_path):
    save(model, tmp_path / "model.cllm", tokenizer=tokenizer)
    expected = generate_beams(model, tokenizer, "the ", beams=3, max_tokens=6, length_penalty=0.5)
    ran = cllm("generate", tmp_path / "model.cllm", "--prompt", "the ", "--beams", 3, "--max-tokens", 6, "--length-penalty", 0.5, "--json")
    assert ran.json["texts"] == [each.text for each in expected] and ran.json["scores"] == [each.score for each in expected]
    assert ran.json["tokens"] == [each.tokens for each in expected] and ran.json["finish_reasons"] == [each.finish_reason for each in expected]
    ran = cllm("generate", tmp_path / "model.cllm", "--prompt", "the ", "--beams", 3, "--max-tokens", 6, "--length-penalty", 0.5)
    assert ran.out.startswith("the ") and ran.out.count("the ") == 1 + expected[0].text.count("the ")
