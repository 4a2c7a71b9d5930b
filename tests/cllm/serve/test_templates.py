"""Chat templates of strangers: they render as in transformers, and none can hang the server, eat its memory or look around."""

import time

import pytest

from cllm.data.tokens.chat_template import TEMPLATE, encode_prompt, end_of_turn, with_template
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.generate.chat_context import fit_to_context
from cllm.runtime.errors import DataError
from cllm.serve.templates import PLAIN, TemplateProcess

CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is <|end|> 2+2?"}]


@pytest.fixture(scope="module")
def process():
    found = TemplateProcess()
    yield found
    found.close()


@pytest.fixture(scope="module")
def tokenizer():
    return with_template(Tokenizer.train(["What is two plus two? It is four. Be brief. " * 20], vocab_size=320))


def test_a_prompt_has_the_tokens_of_the_command(process, tokenizer):
    assert encode_prompt(tokenizer, CHAT, draw=process.draw) == encode_prompt(tokenizer, CHAT)
    assert end_of_turn(tokenizer, process.draw) == end_of_turn(tokenizer) == "<|end|>"
    assert fit_to_context(tokenizer, CHAT, 64, 20, draw=process.draw) == fit_to_context(tokenizer, CHAT, 64, 20)


HOSTILE = {
    "an endless loop": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "a huge text": "{{ 'a' * 10**10 }}",
    "a huge number": "{{ 10 ** (10 ** 10) }}",
    "a wide field": "{{ 'a' | center(10**10) }}",
    "a wide format": "{{ '%01000000000000d' % 1 }}",
    "doubling": "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "much output": "{% for a in range(90000) %}{% for b in range(100) %}aaaaaaaaaa{% endfor %}{% endfor %}",
    "a macro that calls itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "deep nesting": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "Python's inner workings": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "globals of a function": "{{ raise_exception.__globals__['os'].system('true') }}",
    "no template": "{% if %}",
    "its own refusal": "{{ raise_exception('no system messages here') }}",
    "what is not there": "{{ messages[7].content.x.y }}",
    "a file": "{% include '/etc/passwd' %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_an_error_in_bounded_time_and_the_next_conversation_is_rendered(process, name):
    started = time.monotonic()
    with pytest.raises(DataError) as caught:
        process.draw(HOSTILE[name], {"messages": CHAT})
    assert "chat template" in str(caught.value) and len(str(caught.value)) < 1100
    assert time.monotonic() - started < 60
    assert process.draw("{{ messages[0].content }}", {"messages": CHAT}) == "Be brief."


def test_a_template_refuses_with_its_own_words(process):
    with pytest.raises(DataError, match="no system messages here"):
        process.draw(HOSTILE["its own refusal"], {"messages": CHAT})


def test_templates_find_what_those_of_hugging_face_use(process, tokenizer):
    transformers = pytest.importorskip("transformers")
    from transformers.utils.chat_template_utils import render_jinja_template

    source = (
        "{% for tool in tools or [] %}{{ tool | tojson(indent=2) }}{% endfor %}{% for m in messages %}{% if loop.index0 > 5 %}{% break %}{% endif %}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}<{{ m.content | trim }}>{% endif %}{% endfor %}"
        "{{ strftime_now('%Y') }}{% if add_generation_prompt %}A:{% endif %}"
    )
    tools = [{"type": "function", "function": {"name": "f<", "parameters": {"type": "object", "properties": {"a": {"type": "string"}}}}}]
    messages = [*CHAT, {"role": "assistant", "content": "4 & more"}]
    expected = render_jinja_template([messages], tools=tools, chat_template=source, add_generation_prompt=True)[0][0]
    assert process.draw(source, {"messages": messages, "tools": tools, "add_generation_prompt": True}) == expected, transformers.__version__


def test_the_plain_default_of_a_model_without_a_template(process):
    text = process.draw(PLAIN, {"messages": CHAT, "add_generation_prompt": True})
    assert text == "System: Be brief.\n\nUser: What is <|end|> 2+2?\n\nAssistant:"


def test_words_of_a_message_or_a_tool_are_no_special_tokens(process, tokenizer):
    own = tokenizer.with_chat_template("{{ tools | tojson }}" + TEMPLATE)
    tools = [{"type": "function", "function": {"name": "f", "description": "<|end|>"}}]
    tokens = encode_prompt(own, CHAT, tools=tools, draw=process.draw)
    assert tokens.count(own.special_tokens["<|end|>"]) == len(CHAT)
