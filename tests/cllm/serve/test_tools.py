"""Calls of tools in the ways that models' templates write them: what a template writes is read back as the same calls."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.data.tokens.jinja import render
from cllm.serve.tools import CallForm, call_form, call_schema, read_calls

HERMES = (
    "{% if tools %}<tools>{% for t in tools %}{{ t | tojson }}{% endfor %}</tools>{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    '{{ m.content }}{% for c in m.tool_calls or [] %}\n<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments | tojson }}}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS][{% for c in m.tool_calls %}"
    "{{ {'name': c.function.name, 'arguments': c.function.arguments, 'id': c.id} | tojson }}{% if not loop.last %}, {% endif %}{% endfor %}]</s>"
    "{% elif m.role == 'user' %}[INST]{{ m.content }}[/INST]{% else %}{{ m.content }}</s>{% endif %}{% endfor %}{{ '' if tools else '' }}"
)
LLAMA = (
    "{% for m in messages %}<|start|>{{ m.role }}<|end|>{% if m.tool_calls %}{{ {'name': m.tool_calls[0].function.name, "
    "'parameters': m.tool_calls[0].function.arguments} | tojson }}{% else %}{{ m.content }}{% endif %}<|eot|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|end|>{% endif %}"
)
QUESTION = {"role": "user", "content": "a"}


def writer(template):
    return lambda messages, ask: render(template, {"messages": messages, "add_generation_prompt": ask, "tools": None})


@pytest.mark.parametrize(
    "template, form",
    [
        (HERMES, CallForm("<tool_call>", "</tool_call><tool_call>", "name", "arguments")),
        (MISTRAL, CallForm("[TOOL_CALLS][", ",", "name", "arguments")),
        (LLAMA, CallForm("", None, "name", "parameters")),
    ],
    ids=["hermes", "mistral", "llama"],
)
def test_the_form_of_a_call_is_read_from_the_template(template, form):
    assert call_form(writer(template)) == form


def test_what_stands_before_a_call_is_kept_as_the_template_writes_it():
    assert [call_form(writer(each)).opening for each in (HERMES, MISTRAL, LLAMA)] == ["<tool_call>\n", "[TOOL_CALLS][", ""]


def test_the_schema_of_a_call_holds_the_tools_own_schemas_with_their_references():
    unit = {"$schema": "draft", "properties": {"unit": {"$ref": "#/$defs/Unit"}, "all": {"items": {"$ref": "#"}}}, "$defs": {"Unit": {"enum": ["C"]}}}
    tools = [{"type": "function", "function": {"name": name, "parameters": each}} for name, each in (("f", None), ("g", unit))]
    schema = call_schema(tools, call_form(writer(LLAMA)))
    assert [each["properties"]["name"] for each in schema["anyOf"]] == [{"const": "f"}, {"const": "g"}]
    assert [each["properties"]["parameters"] for each in schema["anyOf"]] == [{"$ref": "#/$defs/tool0"}, {"$ref": "#/$defs/tool1"}]
    assert schema["$defs"]["tool0"] == {"type": "object"} and "$schema" not in schema["$defs"]["tool1"]
    assert schema["$defs"]["tool1"]["properties"] == {"unit": {"$ref": "#/$defs/tool1/$defs/Unit"}, "all": {"items": {"$ref": "#/$defs/tool1"}}}


def test_a_template_without_calls_has_no_form():
    assert call_form(writer("{% for m in messages %}{{ m.content }}{% endfor %}")) is None
    assert call_form(writer("{% for m in messages %}{{ m.content }}{{ m.tool_calls }}{% endfor %}")) is None  # no JSON


ARGUMENTS = st.dictionaries(st.text(max_size=5), st.text(max_size=10) | st.integers() | st.lists(st.booleans(), max_size=2), max_size=3)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.from_regex(r"[a-z_]{1,10}", fullmatch=True), ARGUMENTS), min_size=1, max_size=3), st.sampled_from([HERMES, MISTRAL, LLAMA])
)
def test_what_a_template_writes_is_read_back(calls, template):
    calls = calls[:1] if template is LLAMA else calls
    written = writer(template)
    given = [{"id": "c", "type": "function", "function": {"name": name, "arguments": arguments}} for name, arguments in calls]
    begin = written([QUESTION], True)
    text = written([QUESTION, {"role": "assistant", "content": "", "tool_calls": given}], False)[len(begin) :]
    said, found = read_calls(text, call_form(written))
    assert [(each["function"]["name"], json.loads(each["function"]["arguments"])) for each in found] == calls
    assert not said and len({each["id"] for each in found}) == len(found)


def test_text_beside_a_call_stays_and_what_is_no_call_is_text():
    form = call_form(writer(HERMES))
    said, calls = read_calls('Let me see.\n<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>', form)
    assert said == "Let me see." and calls[0]["function"] == {"name": "f", "arguments": "{}"}
    twice = '<tool_call>{"name": "f", "arguments": {}}</tool_call>\n<tool_call>\n{"name": "g", "arguments": "{}"}\n</tool_call>'
    assert [each["function"]["name"] for each in read_calls(twice, form)[1]] == ["f", "g"]
    for text in ("Just words.", '<tool_call>\n{"name": ', "<tool_call>", '{"name": "f", "arguments": {}}', '<tool_call>{"name": 7}</tool_call>'):
        assert read_calls(text, form) == (text, [])


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet='<tool_cal>{}":,name argumets/[]\n1', max_size=60), st.sampled_from([HERMES, MISTRAL, LLAMA]))
def test_any_text_is_read(text, template):
    said, calls = read_calls(text, call_form(writer(template)))
    assert isinstance(said, str) and (calls or said == text)
