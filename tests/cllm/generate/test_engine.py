"""The engine: whoever else is asking, in whatever pieces and at whatever time, an answer has the tokens that it has alone."""

import threading
import time
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm import Model, ModelConfig, runtime
from cllm.config.sampling import Sampling
from cllm.generate.decoding import generate
from cllm.generate.engine import Engine
from cllm.generate.request import QueueFull, Request
from cllm.model.pages import PAGE, Part, page_bytes, pages_for
from cllm.runtime.errors import UserError

V = 61
LLAMA = dict(vocab_size=V, embed_dim=32, num_layers=2, num_heads=4, num_kv_heads=2, ffn_dim=48, max_seq_len=400, norm="rms")  # noqa: C408
CONFIGS = {
    "llama": LLAMA,
    "ngrams": LLAMA | {"bigram_rows": 200, "trigram_rows": 300},
    "gpt2": LLAMA | dict(num_kv_heads=4, norm="layer", position="learned", activation="gelu_tanh", bias=True, tie_embeddings=True),  # noqa: C408
}


def make(name="llama", dtype=torch.float32, **more):
    """A model whose next tokens are neither all the same nor unpredictable."""
    model = Model(ModelConfig(**CONFIGS[name] | more), seed=3)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("grams.weight"):
                parameter.normal_(0, 0.02, generator=torch.Generator().manual_seed(1))
            if parameter.dim() == 2:
                parameter.mul_(6)
    model.compute_dtype = dtype
    return model


# Guessers: the model itself, whose guesses are right, and a smaller one with a shorter context, whose guesses are mostly wrong.
DRAFTS = {"none": None, "same": make("llama"), "small": make("llama", num_layers=1, max_seq_len=150)}
MODELS = {(name, dtype): make(name, dtype) for name in ("llama", "gpt2") for dtype in (torch.float32, torch.bfloat16)}
MODELS["ngrams", torch.bfloat16] = make("ngrams", torch.bfloat16)
INT8 = {("int8", *key): make(*key) for key in (("llama", torch.float32), ("gpt2", torch.bfloat16))}  # of the cache
for each in INT8.values():
    each.kv_cache = "int8"


class Asked:
    """A request, and what it gets."""

    def __init__(self, prompt, max_tokens=12, *, stop_after=None, **options):
        self.samples = options.get("samples", 1)
        self.tokens = [[] for _ in range(self.samples)]
        self.chosen = [[] for _ in range(self.samples)]
        self.of_prompt = []
        self.reasons = {}
        self.stop_after = stop_after
        self.request = Request(prompt, max_tokens, on_token=self.on_token, on_finish=self.on_finish, on_prompt_token=self.of_prompt.append, **options)

    def on_token(self, sample, chosen):
        self.tokens[sample].append(chosen.token)
        self.chosen[sample].append(chosen)
        return len(self.tokens[sample]) != self.stop_after

    def on_finish(self, sample, reason):
        assert sample not in self.reasons, "a sample ends once"
        self.reasons[sample] = reason


def engine_of(model, pages=40, **options):
    return Engine(model, vocab_size=V, memory=pages * page_bytes(model.config, model.cache_dtype), **options)


def run(engine):
    steps = 0
    while engine.step():
        steps += 1
        assert steps < 20_000
    stats = engine.stats()
    assert stats.running == stats.waiting == 0
    engine.prefixes.clear()
    for pool in (engine.pool, *([engine.draft.pool] if engine.draft else [])):
        assert pool.num_free == pool.num_pages, "every page came back"


def alone(model, request):
    """The tokens of a request that nothing is beside: one sample after the other, the prompt in one part, no guesses."""
    options = {name: getattr(request, name) for name in ("sampling", "seed", "samples", "end_tokens", "slide", "logprobs")}
    asked = Asked(request.prompt, request.max_tokens, **options, speculate=False)
    engine = engine_of(model, most_rows=1, chunk=1000)
    engine.submit(asked.request)
    run(engine)
    return asked


def reference(model, prompt, count):
    """Greedy tokens by computing everything again each time."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens[-model.config.max_seq_len :]]), last_only=True)[0, -1].argmax()))
    return tokens[len(prompt) :]


@pytest.mark.parametrize("model", (MODELS | INT8).values(), ids=map(str, MODELS | INT8))
def test_greedy_tokens_are_those_of_the_model_run_on_the_whole_text(model):
    prompt = torch.randint(V, (150,), generator=torch.Generator().manual_seed(1)).tolist()
    asked = Asked(prompt, 30, sampling=Sampling(temperature=0))
    engine = engine_of(model, chunk=64)
    engine.submit(asked.request)
    run(engine)
    assert asked.tokens[0] == reference(model, prompt, 30) and asked.reasons == {0: "length"}


SYSTEM = torch.randint(V, (300,), generator=torch.Generator().manual_seed(2)).tolist()


@st.composite
def requests(draw):
    begin = SYSTEM[: draw(st.sampled_from([0, 0, 40, PAGE, 140, 2 * PAGE, 290]))]
    own = draw(st.lists(st.integers(0, V - 1), min_size=1, max_size=12))
    sampling = Sampling(
        temperature=draw(st.sampled_from([0.0, 0.7, 1.3])), top_k=draw(st.sampled_from([None, 5])), top_p=draw(st.sampled_from([None, 0.8])),
        repetition_penalty=draw(st.sampled_from([1.0, 1.2])),
    )  # fmt: skip
    return dict(  # noqa: C408
        prompt=begin + own, max_tokens=draw(st.integers(1, 20)), sampling=sampling, seed=draw(st.integers(0, 5)),
        samples=draw(st.sampled_from([1, 1, 1, 3])), end_tokens=frozenset(draw(st.sampled_from([(), (7, 8)]))),
        client=draw(st.sampled_from(["a", "b", "c"])), speculate=draw(st.booleans()),
    )  # fmt: skip


@pytest.mark.parametrize("model", MODELS.values(), ids=map(str, MODELS))
@settings(max_examples=12, deadline=None, derandomize=True)
@given(data=st.data())
def test_an_answer_is_the_same_whoever_else_asks_and_when(model, data):
    ask_beside_others(model, data)


@pytest.mark.parametrize("model", INT8.values(), ids=map(str, INT8))
@settings(max_examples=5, deadline=None, derandomize=True)
@given(data=st.data())
def test_so_it_is_with_keys_and_values_in_int8(model, data):
    ask_beside_others(model, data)


def ask_beside_others(model, data):
    wanted = [Asked(**each) for each in data.draw(st.lists(requests(), min_size=1, max_size=6))]
    arrivals = data.draw(st.lists(st.integers(0, 8), min_size=len(wanted), max_size=len(wanted)))
    draft = DRAFTS[data.draw(st.sampled_from(list(DRAFTS)))]
    engine = engine_of(model, pages=data.draw(st.integers(5, 20)), draft=draft, most_rows=data.draw(st.sampled_from([2, 5, 64])),
                       chunk=data.draw(st.sampled_from([7, 32, 256])))  # fmt: skip
    with runtime.use(threads=data.draw(st.sampled_from([1, 2, 5]))):
        pending = sorted(zip(arrivals, range(len(wanted))))
        for step in range(9):
            for _, number in [each for each in pending if each[0] == step]:
                engine.submit(wanted[number].request)
            engine.step()
        run(engine)
    for asked in wanted:
        expected = alone(model, asked.request)
        assert asked.tokens == expected.tokens
        assert set(asked.reasons) == set(range(asked.samples)) and set(asked.reasons.values()) <= {"length", "end"}


def test_the_logits_with_a_cache_of_int8_are_those_of_the_model_without_one_bit_for_bit_and_near_those_of_its_own_numbers():
    for key, model in INT8.items():
        prompt = SYSTEM[:170]
        pool = model.make_pool(2)
        pages = [pool.take(), pool.take()]
        with torch.no_grad():
            found = torch.cat([model.step(pool, [Part(prompt[a:b], a, pages, b - a)]) for a, b in ((0, 100), (100, 101), (101, 170))])
            whole, plain = model(torch.tensor([prompt]))[0], MODELS[key[1:]](torch.tensor([prompt]))[0]
        assert pool.keys[0].dtype == torch.int8 and torch.equal(found, whole)
        assert 0 < (whole - plain).float().square().mean().sqrt() < 0.05 * plain.float().std()


def test_the_same_memory_holds_more_pages_of_int8():
    config = MODELS["llama", torch.float32].config
    per_token = [page_bytes(config, dtype) / PAGE for dtype in (torch.float32, torch.bfloat16, torch.int8)]
    numbers = 2 * config.num_layers * config.kv_heads
    assert per_token == [numbers * config.head_size * 4, numbers * config.head_size * 2, numbers * (config.head_size + 4)]
    pages = [Engine(model, vocab_size=V, memory=1 << 20).pool for model in (MODELS["llama", torch.float32], INT8["int8", "llama", torch.float32])]
    assert [each.num_pages for each in pages] == [(1 << 20) // page_bytes(config, dtype) for dtype in (torch.float32, torch.int8)]
    held = [(*each.keys, *each.values, *chain.from_iterable(each.scales or ())) for each in pages]
    assert all((1 << 20) * 0.9 < sum(tensor.nbytes for tensor in tensors) <= 1 << 20 for tensors in held)


def test_where_int8_cannot_be_kept_it_is_refused_with_the_reason():
    model = Model(MODELS["llama", torch.float32].config)
    with pytest.raises(UserError, match="kv_cache must be None or 'int8'"):
        model.kv_cache = "int4"
    model.kv_cache = "int8"
    with pytest.raises(UserError, match="no gradients"):
        model(torch.tensor([[1, 2]]))
    with pytest.raises(UserError, match="lies in pages"):
        model.make_cache(1)


def test_log_probabilities_are_the_same_too_and_those_of_the_prompt_are_told():
    model = MODELS["llama", torch.float32]
    prompt = SYSTEM[:170]
    asked = Asked(prompt, 10, logprobs=3, prompt_logprobs=True, sampling=Sampling(temperature=1.0), seed=4)
    engine = engine_of(model, chunk=33)
    others = [Asked(SYSTEM[:n], 20, seed=n) for n in (10, 150, 290)]
    for each in (others[0], others[1], asked, others[2]):
        engine.submit(each.request)
        engine.step()
    run(engine)
    assert asked.chosen == alone(model, asked.request).chosen
    with torch.no_grad():
        expected = torch.log_softmax(model(torch.tensor([prompt]))[0].double(), -1)
    assert len(asked.of_prompt) == len(prompt) - 1
    for place, chosen in enumerate(asked.of_prompt):
        assert chosen.token == prompt[place + 1]
        assert chosen.logprob == pytest.approx(float(expected[place, prompt[place + 1]]), abs=1e-5)
        assert [token for token, _ in chosen.top] == expected[place].sort(descending=True, stable=True).indices[:3].tolist()


def test_what_stands_in_pages_already_is_not_computed_again():
    engine = engine_of(MODELS["llama", torch.float32])
    first, second, third = Asked(SYSTEM[:290] + [1], 5), Asked(SYSTEM[:290] + [2, 3], 5), Asked(SYSTEM[:20], 5)
    engine.submit(first.request)
    while engine.step():
        pass
    assert engine.stats().tokens_in == 291
    for each in (second, third):
        engine.submit(each.request)
    while engine.step():
        pass
    assert engine.stats().tokens_in == 291 + 2 + 1 and engine.stats().prefix_hits == 290 + 19
    run(engine)


def test_several_samples_compute_their_prompt_once():
    engine = engine_of(MODELS["llama", torch.float32])
    asked = Asked(SYSTEM[:200], 6, samples=4, seed=9)
    engine.submit(asked.request)
    while engine.step():
        pass
    assert engine.stats().tokens_in == 200 + 3 * 1
    assert len({tuple(each) for each in asked.tokens}) > 1
    run(engine)


def test_guesses_save_steps_where_a_text_repeats_itself():
    model = MODELS["llama", torch.float32]
    pattern = [3, 14, 15, 9, 2, 6, 5, 35, 8] * 12
    steps = {}
    for speculate in (False, True):
        asked = Asked(pattern, 120, sampling=Sampling(temperature=0), speculate=speculate)
        engine = engine_of(model)
        engine.submit(asked.request)
        run(engine)
        steps[speculate] = engine.stats().steps
        assert asked.tokens[0] == reference(model, pattern, 120)
    assert steps[False] == 120 and steps[True] < 60  # greedy text of a small model falls into a loop


@pytest.mark.parametrize("prompt", [SYSTEM[:20], SYSTEM[:290]], ids=["short", "long"])
def test_a_draft_model_saves_steps_as_long_as_it_guesses_right(prompt):
    model = MODELS["llama", torch.float32]
    steps = {}
    for name, draft in DRAFTS.items():
        asked = [Asked(prompt, 60, sampling=Sampling(temperature=0)), Asked(prompt[1:], 60, seed=4)]
        engine = engine_of(model, draft=draft)
        for each in asked:
            engine.submit(each.request)
        run(engine)
        steps[name] = engine.stats().steps
        assert [each.tokens for each in asked] == [alone(model, each.request).tokens for each in asked]
        # A step reads the text, one chooses its first token, and what follows is guessed, up to seven tokens at a time.
        assert name != "same" or engine.stats().guessed_right > 50
    assert steps["same"] <= steps["none"]


def test_a_draft_model_with_fewer_tokens_than_the_tokenizer_is_refused():
    with pytest.raises(UserError, match="do not belong together"):
        engine_of(MODELS["llama", torch.float32], draft=make("llama", vocab_size=V - 1))


def test_a_text_longer_than_the_context_ends_or_goes_on_with_half_of_it():
    model = MODELS["gpt2", torch.float32]
    limit, prompt = model.config.max_seq_len, SYSTEM[:290]
    ends, slides = Asked(prompt, 300), Asked(prompt, 300, slide=True)
    engine = engine_of(model)
    for each in (ends, slides):
        engine.submit(each.request)
    run(engine)
    assert ends.reasons == {0: "length"} and len(ends.tokens[0]) == limit - len(prompt) + 1
    assert slides.reasons == {0: "length"} and len(slides.tokens[0]) == 300 and slides.tokens[0][: len(ends.tokens[0])] == ends.tokens[0]
    assert slides.tokens == alone(model, slides.request).tokens


def test_who_goes_on_with_half_of_the_context_leaves_pages_to_others_and_waits_for_its_own():
    """The second comes just before the first outgrows the context and holds pages that both began with: the first then has to do without them."""
    model = MODELS["llama", torch.float32]
    engine = engine_of(model, pages=6)
    slides, stays = Asked(SYSTEM[:290], 300, slide=True, speculate=False), Asked(SYSTEM[:290] + [1, 2], 105, speculate=False)
    engine.submit(slides.request)
    while len(slides.tokens[0]) < 105:
        engine.step()
    engine.submit(stays.request)
    run(engine)
    for each in (slides, stays):
        assert each.reasons == {0: "length"} and each.tokens == alone(model, each.request).tokens


def test_rows_and_pages_bound_what_runs_and_nobody_starves():
    model = MODELS["llama", torch.float32]
    engine = engine_of(model, pages=4, most_rows=8)
    asked = [Asked(SYSTEM[n : n + 140], 30, client=f"{n % 3}") for n in range(9)]
    for each in asked:
        engine.submit(each.request)
    most = 0
    while engine.step():
        most = max(most, engine.stats().running)
        assert engine.stats().pages_used <= 4
    assert most == 2, "two answers of two pages each fit into four"
    assert all(each.reasons == {0: "length"} for each in asked)
    run(engine)


def test_clients_take_turns():
    engine = engine_of(MODELS["llama", torch.float32], most_rows=1)
    order = []

    def asking(name):
        return Request([1, 2], 3, client=name, on_finish=lambda _, reason: order.append(name))

    for name in ("many", "many", "many", "few", "other"):
        engine.submit(asking(name))
    run(engine)
    assert order == ["many", "few", "other", "many", "many"]


def test_what_can_never_be_served_is_refused_with_the_reason():
    model = MODELS["llama", torch.float32]
    engine = engine_of(model, pages=2, most_waiting=2)
    for request, words in (
        (Request([], 1), "prompt is empty"),
        (Request([V], 1), r"outside 0 to 60"),
        (Request([1] * 401, 1), "has 401 tokens, the model's context holds 400"),
        (Request([1], 0), "at least 1, got 0 and 1"),
        (Request([1] * 200, 100), "need 3 pages of keys and values, the memory for them holds 2"),
    ):
        with pytest.raises(UserError, match=words):
            engine.submit(request)
    with pytest.raises(UserError, match="do not hold one page of 128 tokens"):
        Engine(model, vocab_size=V, memory=1000)
    asked = [Asked([1], 2) for _ in range(2)]
    for each in asked:
        engine.submit(each.request)
    with pytest.raises(QueueFull, match=r"2 requests are waiting already\. Try again in") as refused:
        engine.submit(Request([1], 2))
    assert 1 <= refused.value.retry_after <= 60
    run(engine)
    assert all(each.reasons == {0: "length"} for each in asked)


@pytest.mark.parametrize("when", ["waiting", "in the prompt", "in the answer"])
def test_who_leaves_frees_the_row_and_its_pages_before_the_next_step(when):
    model = MODELS["llama", torch.float32]
    engine = engine_of(model, most_rows=1, chunk=50)
    leaving, staying = Asked(SYSTEM[:200], 50, samples=2), Asked(SYSTEM[:30], 5)
    if when == "waiting":
        engine.submit(staying.request)
        engine.step()
    ticket = engine.submit(leaving.request)
    for _ in range({"waiting": 1, "in the prompt": 2, "in the answer": 9}[when]):
        engine.step()
    if when != "waiting":
        engine.submit(staying.request)
    engine.cancel(ticket)
    told = len(leaving.tokens[0])
    assert (told > 0) == (when == "in the answer")
    engine.step()
    assert leaving.reasons == {0: "cancelled", 1: "cancelled"} and ticket.finished and len(leaving.tokens[0]) == told
    run(engine)
    assert staying.tokens == alone(model, staying.request).tokens


def test_a_deadline_a_stop_and_a_broken_listener_end_one_answer_and_no_other():
    model = MODELS["llama", torch.float32]
    engine = engine_of(model)
    late = Asked(SYSTEM[:30], 300, deadline=time.monotonic() + 0.05)
    stopped = Asked(SYSTEM[:40], 100, stop_after=4)
    fine = Asked(SYSTEM[:50], 20)
    broken = replace(Asked(SYSTEM[:60], 20).request, on_token=lambda *_: 1 / 0, on_finish=lambda *_: 1 / 0)
    for each in (late.request, stopped.request, broken, fine.request):
        engine.submit(each)
    while late.reasons == {}:
        engine.step()
        time.sleep(0.01)
    run(engine)
    assert late.reasons == {0: "deadline"} and stopped.reasons == {0: "stop"} and len(stopped.tokens[0]) == 4
    assert fine.tokens == alone(model, fine.request).tokens


class Spelled:
    """A constraint that allows one text."""

    def __init__(self, tokens):
        self.left, self.finished = list(tokens), False

    def mask(self):
        return np.arange(V) == self.left[0]

    def advance(self, token):
        assert token == self.left.pop(0)
        self.finished = not self.left


def test_an_answer_ends_where_its_form_allows_no_more():
    """Without an end token too; guesses that the form does not allow are guesses that were wrong."""
    model = MODELS["llama", torch.float32]
    engine, text = engine_of(model), [5, 9, 5, 9, 5, 9, 5, 8, 9]
    asked = Asked([5, 9] * 20, 50, samples=2, constraint=lambda: Spelled(text))
    short = Asked([5, 9] * 20, 4, constraint=lambda: Spelled(text))
    fine = Asked(SYSTEM[:50], 20)
    for each in (asked, short, fine):
        engine.submit(each.request)
    run(engine)
    assert asked.tokens == [text, text] and asked.reasons == {0: "end", 1: "end"}
    assert short.tokens == [text[:4]] and short.reasons == {0: "length"}
    assert fine.tokens == alone(model, fine.request).tokens


def test_damaged_weights_end_with_an_error_that_says_so():
    model = make()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    engine, asked = engine_of(model), Asked([1, 2, 3], 5)
    engine.submit(asked.request)
    run(engine)
    assert "logits are not finite" in asked.reasons[0]


def test_requests_from_many_threads_meet_one_that_steps():
    model = MODELS["llama", torch.float32]
    engine = engine_of(model, pages=60)
    asked = [Asked(SYSTEM[n : n + 20], 10, seed=n, client=str(n % 4)) for n in range(24)]
    threads = [threading.Thread(target=lambda each=each: engine.submit(each.request)) for each in asked]
    for each in threads:
        each.start()
    end = time.monotonic() + 120
    while any(not each.reasons for each in asked) and time.monotonic() < end:
        if not engine.step():
            engine.wait(0.05)
    for each in threads:
        each.join()
    run(engine)
    assert all(each.tokens == alone(model, each.request).tokens for each in asked)


class Letters:
    """A tokenizer of one letter a token."""

    vocab_size, eot_id = V, 0

    def encode(self, text):
        return [ord(each) % V for each in text]

    def stream_decoder(self):
        return LetterDecoder()


class LetterDecoder:
    def push(self, token):
        return chr(65 + token)

    def finish(self):
        return ""


def test_generate_gives_what_computing_everything_again_gives():
    model = MODELS["llama", torch.float32]
    ways = [generate(model, Letters(), "Hello", max_tokens=20, samples=3, seed=5, temperature=1.0, use_cache=each) for each in (True, False)]
    for found, again in zip(*ways, strict=True):
        assert (found.tokens, found.text, found.finish_reason) == (again.tokens, again.text, again.finish_reason)


def test_an_engine_that_is_kept_remembers_a_conversation():
    engine = engine_of(MODELS["llama", torch.float32])
    first = generate(engine.model, Letters(), "a question of some length", max_tokens=10, engine=engine, temperature=0)[0]
    prompt = "a question of some length" + "".join(chr(61 + token) for token in first.tokens)  # the letters of these tokens
    assert Letters().encode(prompt)[-10:] == first.tokens
    before = engine.stats().tokens_in
    again = generate(engine.model, Letters(), prompt + "more", max_tokens=10, engine=engine, temperature=0)[0]
    assert engine.stats().tokens_in - before <= 5, "the last token of the answer and the four that are new"
    assert again.tokens == generate(engine.model, Letters(), prompt + "more", max_tokens=10, temperature=0)[0].tokens


@pytest.mark.parametrize("use_cache", [True, False])
def test_it_is_told_once_when_a_text_outgrows_the_context(use_cache):
    model, told = make(max_seq_len=32), []
    options = {"temperature": 0, "use_cache": use_cache, "on_slide": lambda: told.append(1)}
    generate(model, Letters(), "x" * 20, max_tokens=12, **options)
    assert told == []
    generate(model, Letters(), "x" * 20, max_tokens=60, **options)
    assert told == [1]


def test_pages_for_counts_whole_pages():
    assert [pages_for(n) for n in (1, PAGE, PAGE + 1)] == [1, 1, 2]


def test_torchs_threads_leave_the_cores_to_our_workers_for_the_time_of_a_step():
    before, inside = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        engine = Engine(MODELS["llama", torch.bfloat16], vocab_size=V)
        engine.submit(Request([1, 2, 3], 4, Sampling(temperature=0), on_token=lambda *_: inside.append(torch.get_num_threads()) or True))
        while engine.step():
            assert torch.get_num_threads() == 3
        assert inside == [1] * 4
        with make(dtype=torch.float64).torch_aside():
            assert torch.get_num_threads() == 3, "torch's kernels serve float64"
    finally:
        torch.set_num_threads(before)
