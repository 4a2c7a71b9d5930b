"""Requests of OpenAI's API: from a JSON object to a checked request. Pure functions, which know neither a model nor a server.

    asked = completion_request(parse_object(body))       # raises Refused, an error in OpenAI's form

Beside OpenAI's options there are those of `cllm generate` (min_p, top_k, typical_p, repetition_penalty), min_tokens and stop_token_ids under vLLM's
names, and for constrained output guided_json, guided_regex and guided_grammar. What is not given is as in `cllm generate` and `cllm chat`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from typing import Any

from cllm.config.sampling import SAMPLING
from cllm.config.setting import Setting, shortened
from cllm.serve.errors import Refused
from cllm.serve.fields import Fields

MOST_CHOICES = 128  # answers to one request: n times its prompts
MOST_STOPS = 16
MOST_STOP_CHARACTERS = 1_000
MOST_LOGPROBS = 20
MOST_BIASES = 1_024
MOST_MESSAGES = 2_000
MOST_TOOLS = 128
MOST_FORM_CHARACTERS = 65_536  # of a schema, an expression or a grammar
MOST_TOKENS = 1 << 20  # of max_tokens; the model's context, which is smaller, is checked where the model is known
_SECONDS = 86_400.0
_NAME = 256  # characters of a model's id or a user's name

CHAT_SAMPLING: dict[str, Setting] = SAMPLING | {"temperature": replace(SAMPLING["temperature"], default=0.7)}

# OpenAI's fields that change no token here, and those whose effect is the one that they have when they are left out.
_WITHOUT_EFFECT: dict[str, type] = {
    "metadata": dict, "store": bool, "service_tier": str, "safety_identifier": str, "prompt_cache_key": str, "prompt_cache_retention": str,
    "verbosity": str,
}  # fmt: skip
_WITHOUT_EFFECT_IN_CHATS = _WITHOUT_EFFECT | {"parallel_tool_calls": bool, "reasoning_effort": str}
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclass(frozen=True)
class Form:
    """What an answer has to look like. kind: "json_object", "json_schema", "regex" or "grammar" (llguidance's Lark); text: the schema, ...

    param: the field that asked for it, which an error names.
    """

    kind: str
    text: str = ""
    param: str = field(default="response_format", compare=False)


@dataclass(frozen=True)
class Options:
    """What requests for a text have in common. `max_tokens` None: as the endpoint says. `logprobs` None: none, 0: of the chosen token alone."""

    model: str | None
    sampling: dict[str, Any]
    max_tokens: int | None
    min_tokens: int
    n: int
    seed: int | None
    stop: tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    logprobs: int | None
    form: Form | None
    stream: bool
    include_usage: bool
    user: str
    timeout: float | None


@dataclass(frozen=True)
class CompletionRequest:
    options: Options
    prompts: tuple[str | tuple[int, ...], ...]
    echo: bool
    may_leave_out: bool = False
    """Whether only the end of a prompt is read that is longer than the context (truncation: "auto")."""
    suffix: str = ""
    """What follows: the text between each prompt and it is asked for. Empty: the prompts go on."""


@dataclass(frozen=True)
class ChatRequest:
    options: Options
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    may_leave_out: bool
    """Whether the oldest turns may be left out where the conversation is longer than the context, as `cllm chat` does (truncation: "auto")."""
    must_call: list[dict[str, Any]] = field(default_factory=list)
    """Of the tools those one of which the answer has to call (tool_choice); empty where the model decides."""
    begun: str = ""
    """The beginning of the answer, which goes on behind it (continue_final_message, vLLM's name)."""


@dataclass(frozen=True)
class EmbeddingRequest:
    model: str | None
    inputs: tuple[str | tuple[int, ...], ...]
    as_base64: bool
    user: str


def completion_request(body: dict[str, Any]) -> CompletionRequest:
    """POST /v1/completions. Raises Refused."""
    fields = Fields(body)
    prompts = _prompts(fields, "prompt")
    echo = fields.flag("echo")
    logprobs = fields.whole("logprobs", 0, MOST_LOGPROBS)
    suffix = fields.text("suffix", MOST_TOKENS * 8, "") or ""
    if suffix and echo:
        raise fields.refuse("echo", "and suffix exclude each other: the text between the two is given alone. Leave one of them out.")
    options = _options(fields, SAMPLING, logprobs, least_tokens=0 if echo else 1)
    best_of = fields.whole("best_of", 1, MOST_CHOICES)
    if best_of not in (None, options.n):
        raise fields.refuse("best_of", f"must be n, which is {options.n}, or left out: the best of several answers is not chosen here.")
    if options.n * len(prompts) > MOST_CHOICES:
        raise fields.refuse("n", f"times the number of prompts is {options.n * len(prompts):,}, at most {MOST_CHOICES} answers are given at once.")
    may_leave_out = _truncation(fields)
    fields.leave(_WITHOUT_EFFECT)
    fields.finish()
    return CompletionRequest(options, prompts, echo, may_leave_out, suffix)


def chat_request(body: dict[str, Any]) -> ChatRequest:
    """POST /v1/chat/completions. Raises Refused."""
    fields = Fields(body)
    messages = _messages(fields)
    begun = _begun(fields, messages)
    wanted = fields.flag("logprobs")
    top = fields.whole("top_logprobs", 0, MOST_LOGPROBS)
    if top and not wanted:
        raise fields.refuse("top_logprobs", "needs logprobs: true.")
    tools, must_call = _tools(fields)
    modalities = fields.take("modalities")
    if modalities not in (None, ["text"]):
        raise fields.refuse("modalities", 'must be ["text"]: there is no sound here.')
    for name in ("functions", "function_call", "audio", "web_search_options", "prediction"):
        if fields.take(name) is not None:
            raise fields.refuse(name, "is not supported. " + ("Use tools." if name.startswith("function") else "Leave it out."))
    may_leave_out = _truncation(fields)
    options = _options(fields, CHAT_SAMPLING, (top or 0) if wanted else None)
    fields.leave(_WITHOUT_EFFECT_IN_CHATS)
    fields.finish()
    return ChatRequest(options, messages, tools, may_leave_out, must_call, begun)


def embedding_request(body: dict[str, Any]) -> EmbeddingRequest:
    """POST /v1/embeddings. Raises Refused."""
    fields = Fields(body)
    inputs = _prompts(fields, "input")
    if not all(inputs):
        raise fields.refuse("input", "holds a text without a token, which has no embedding. Leave it out.")
    if len(inputs) > MOST_CHOICES:
        raise fields.refuse("input", f"has {len(inputs):,} texts, at most {MOST_CHOICES} are taken.")
    if fields.take("dimensions") is not None:
        raise fields.refuse("dimensions", "is not supported: an embedding has as many numbers as the model's states. Leave it out.")
    encoding = fields.choice("encoding_format", ("float", "base64"), "float")
    request = EmbeddingRequest(fields.text("model", _NAME), inputs, encoding == "base64", fields.text("user", _NAME, "") or "")
    fields.finish()
    return request


def tokenize_request(body: dict[str, Any]) -> tuple[str | None, str]:
    """POST /tokenize -> (model, prompt). Raises Refused."""
    fields = Fields(body)
    prompt = fields.text("prompt", MOST_TOKENS * 8)
    if prompt is None:
        raise Refused(400, "prompt is missing: the text to cut into tokens.", param="prompt", code="missing_required_parameter")
    model = fields.text("model", _NAME)
    fields.finish()
    return model, prompt


def detokenize_request(body: dict[str, Any]) -> tuple[str | None, tuple[int, ...]]:
    """POST /detokenize -> (model, tokens). Raises Refused."""
    fields = Fields(body)
    tokens = fields.take("tokens")
    if not isinstance(tokens, list) or not all(type(each) is int for each in tokens):
        raise fields.refuse("tokens", f"must be a list of token ids, got {shortened(tokens)}.", "invalid_type")
    model = fields.text("model", _NAME)
    fields.finish()
    return model, tuple(tokens)


def _truncation(fields: Fields) -> bool:
    """Whether the beginning of what is longer than the context may be left out: the name and the values are those of OpenAI's Responses API."""
    return fields.choice("truncation", ("disabled", "auto"), "disabled") == "auto"


def _options(fields: Fields, declared: dict[str, Setting], logprobs: int | None, least_tokens: int = 1) -> Options:
    max_tokens = fields.whole("max_tokens", least_tokens, MOST_TOKENS)
    completion_tokens = fields.whole("max_completion_tokens", least_tokens, MOST_TOKENS)
    if None not in (max_tokens, completion_tokens) and max_tokens != completion_tokens:
        raise fields.refuse("max_completion_tokens", "and max_tokens are the same option and differ. Give one of them.")
    max_tokens = completion_tokens if max_tokens is None else max_tokens
    min_tokens = fields.whole("min_tokens", 0, MOST_TOKENS, 0) or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise fields.refuse("min_tokens", f"must be at most max_tokens, which is {max_tokens:,}, got {min_tokens:,}.")
    stream = fields.flag("stream")
    include_usage = _stream_options(fields, stream)
    return Options(
        model=fields.text("model", _NAME),
        sampling=_sampling(fields, declared),
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        n=fields.whole("n", 1, MOST_CHOICES, 1) or 1,
        seed=fields.whole("seed", -(2**63), 2**63 - 1),
        stop=_stops(fields),
        stop_token_ids=_token_ids(fields, "stop_token_ids", MOST_STOPS),
        logprobs=logprobs,
        form=_form(fields),
        stream=stream,
        include_usage=include_usage,
        user=fields.text("user", _NAME, "") or "",
        timeout=fields.number("timeout", 0.001, _SECONDS),
    )


def _sampling(fields: Fields, declared: dict[str, Setting]) -> dict[str, Any]:
    """The settings by name. Clients of other servers switch top_k off by 0 or -1, and penalties are limited as OpenAI limits them."""
    values: dict[str, Any] = {}
    for name, each in declared.items():
        if name == "top_k":
            value = fields.whole(name, -1, MOST_TOKENS)
            values[name] = None if value is None or value < 1 else value
        else:
            values[name] = fields.setting(each)
    bias = _logit_bias(fields)
    return values | {"logit_bias": bias} if bias else values


def _logit_bias(fields: Fields) -> dict[int, float]:
    given = fields.object("logit_bias") or {}
    if len(given) > MOST_BIASES:
        raise fields.refuse("logit_bias", f"has {len(given):,} tokens, at most {MOST_BIASES:,} are taken.")
    biases = Fields(given, "logit_bias.")
    found = {}
    for key in given:
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise fields.refuse("logit_bias", f"must have token ids as its keys, got {shortened(key)}.")
        value = biases.number(key, -100, 100)
        if value is None:
            raise biases.refuse(key, "must be a number, got null.", "invalid_type")
        found[int(key)] = value
    return found


def _stream_options(fields: Fields, stream: bool) -> bool:
    values = fields.object("stream_options")
    if values is None:
        return False
    if not stream:
        raise fields.refuse("stream_options", "is only for a stream. Leave it out, or say stream: true.")
    inner = Fields(values, "stream_options.")
    include = inner.flag("include_usage")
    inner.leave({"include_obfuscation": bool, "continuous_usage_stats": bool})
    inner.finish()
    return include


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.take("stop")
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or not all(isinstance(each, str) for each in stops):
        raise fields.refuse("stop", f"must be a text or a list of texts, got {shortened(value)}.", "invalid_type")
    if len(stops) > MOST_STOPS:
        raise fields.refuse("stop", f"has {len(stops):,} texts, at most {MOST_STOPS} are taken.")
    if any(not 0 < len(each) <= MOST_STOP_CHARACTERS for each in stops):
        raise fields.refuse("stop", f"must hold texts of 1 to {MOST_STOP_CHARACTERS:,} characters.")
    return tuple(stops)


def _token_ids(fields: Fields, name: str, most: int) -> tuple[int, ...]:
    value = fields.take(name)
    if value is None:
        return ()
    if not isinstance(value, list) or not all(type(each) is int and each >= 0 for each in value):
        raise fields.refuse(name, f"must be a list of token ids, got {shortened(value)}.", "invalid_type")
    if len(value) > most:
        raise fields.refuse(name, f"has {len(value):,} entries, at most {most} are taken.")
    return tuple(value)


def _prompts(fields: Fields, name: str) -> tuple[str | tuple[int, ...], ...]:
    """A text, texts, tokens, or lists of tokens."""
    value = fields.take(name)
    if value is None:
        raise Refused(400, f"{name} is missing: a text, a list of texts, or tokens.", param=name, code="missing_required_parameter")
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and value:
        if all(type(each) is int for each in value):
            return (tuple(value),)
        if all(isinstance(each, str) for each in value):
            return tuple(value)
        if all(isinstance(each, list) and all(type(token) is int for token in each) for each in value):
            return tuple(map(tuple, value))
    raise fields.refuse(name, f"must be a text, a list of texts, a list of tokens or a list of such lists, got {shortened(value)}.", "invalid_type")


def _messages(fields: Fields) -> list[dict[str, Any]]:
    """The conversation with every content as one text, in the form that chat templates read."""
    given = fields.objects("messages", MOST_MESSAGES)
    if not given:
        raise Refused(400, "messages is missing: a list of at least one message with role and content.", param="messages", code="invalid_value")
    return [_message(each, f"messages[{number}].") for number, each in enumerate(given)]


def _begun(fields: Fields, messages: list[dict[str, Any]]) -> str:
    """Takes the last message out of a conversation whose answer has begun already."""
    if not fields.flag("continue_final_message"):
        return ""
    if len(messages) < 2 or messages[-1]["role"] != "assistant" or "tool_calls" in messages[-1]:
        raise fields.refuse("continue_final_message", "needs a last message of the assistant that is a text, with others before it.")
    return str(messages.pop()["content"])


def _message(values: dict[str, Any], where: str) -> dict[str, Any]:
    fields = Fields(values, where)
    role = fields.choice("role", _ROLES, "")
    if not role:
        raise fields.refuse("role", f"is missing: one of {', '.join(_ROLES)}.")
    calls = [_tool_call(each, f"{where}tool_calls[{number}].") for number, each in enumerate(fields.objects("tool_calls", MOST_TOOLS))]
    if calls and role != "assistant":
        raise fields.refuse("tool_calls", "belongs to messages of the assistant.")
    message: dict[str, Any] = {"role": "system" if role == "developer" else role, "content": _content(fields, may_be_absent=bool(calls))}
    if calls:
        message["tool_calls"] = calls
    for name in ("tool_call_id", "name"):
        text = fields.text(name, _NAME)
        if text is not None:
            message[name] = text
    return message  # other fields are what clients keep beside a message, such as annotations


def _content(fields: Fields, may_be_absent: bool) -> str:
    value = fields.take("content")
    if isinstance(value, str):
        return value
    if value is None and may_be_absent:
        return ""
    if isinstance(value, list):
        parts = []
        for part in value:
            if not isinstance(part, dict) or part.get("type") not in ("text", "refusal") or not isinstance(part.get(part["type"]), str):
                raise fields.refuse("content", f"must be a text or parts of type text: this model reads nothing else. Got {shortened(part)}.")
            parts.append(part[part["type"]])
        return "".join(parts)
    raise fields.refuse("content", f"must be a text, got {shortened(value)}.", "invalid_type")


def _tool_call(values: dict[str, Any], where: str) -> dict[str, Any]:
    """A call that the assistant made: its arguments as an object, which is what templates write."""
    fields = Fields(values, where)
    function = Fields(fields.object("function") or {}, f"{where}function.")
    name, text = function.text("name", _NAME), function.text("arguments", MOST_FORM_CHARACTERS, "{}") or "{}"
    if name is None:
        raise function.refuse("name", "is missing.")
    try:
        arguments = json.loads(text)
    except (ValueError, RecursionError):
        arguments = text
    call = {"id": fields.text("id", _NAME, "") or "", "type": fields.choice("type", ("function",), "function")}
    return call | {"function": {"name": name, "arguments": arguments}}


def _tools(fields: Fields) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """(the tools that the model sees, those of them one of which it has to call)"""
    tools = fields.objects("tools", MOST_TOOLS)
    for number, tool in enumerate(tools):
        function = tool.get("function")
        if tool.get("type") != "function" or not isinstance(function, dict) or not _is_function(function):
            raise fields.refuse(
                "tools", f"[{number}] must be {{type: function, function: {{name, description, parameters}}}}, got {shortened(tool)}."
            )
    choice = fields.take("tool_choice")
    must_call = [] if choice in (None, "auto", "none") else _chosen(fields, choice, tools)
    if len(json.dumps(tools)) > MOST_FORM_CHARACTERS * 4:
        raise fields.refuse("tools", f"is longer than {MOST_FORM_CHARACTERS * 4:,} characters.")
    return ([], []) if choice == "none" else (tools, must_call)


def _is_function(values: dict[str, Any]) -> bool:
    kinds = {"name": str, "description": str, "parameters": dict}
    return isinstance(values.get("name"), str) and all(isinstance(values.get(name), kind | None) for name, kind in kinds.items())


def _chosen(fields: Fields, choice: Any, tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tools one of which has to be called."""
    if not tools:
        raise fields.refuse("tool_choice", "needs tools to choose from. Give tools, or leave it out.")
    if choice == "required":
        return tools
    function = choice.get("function") if isinstance(choice, dict) and choice.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    if not isinstance(name, str):
        words = f"must be auto, none, required or {{type: function, function: {{name}}}}, got {shortened(choice)}."
        raise fields.refuse("tool_choice", words)
    found = [tool for tool in tools if tool["function"]["name"] == name]
    if not found:
        raise fields.refuse("tool_choice", f"names {shortened(name)}, which is not among the tools.")
    return found


def _form(fields: Fields) -> Form | None:
    """What the answer has to look like, however it is asked for."""
    forms = [_response_format(fields)]
    schema = fields.take("guided_json")
    if schema is not None:
        forms.append(Form("json_schema", _schema(fields, "guided_json", schema), "guided_json"))
    for name, kind in (("guided_regex", "regex"), ("guided_grammar", "grammar")):
        text = fields.text(name, MOST_FORM_CHARACTERS)
        if text is not None:
            forms.append(Form(kind, text, name))
    found = [each for each in forms if each is not None]
    if len(found) > 1:
        raise fields.refuse("response_format", "and guided_json, guided_regex, guided_grammar exclude each other. Give one of them.")
    return found[0] if found else None


def _response_format(fields: Fields) -> Form | None:
    values = fields.object("response_format")
    if values is None:
        return None
    inner = Fields(values, "response_format.")
    kind = inner.choice("type", ("text", "json_object", "json_schema", "regex", "grammar"), "")
    if not kind:
        raise inner.refuse("type", "is missing: one of text, json_object, json_schema, regex, grammar.", "missing_required_parameter")
    form = None if kind == "text" else Form(kind)
    if kind == "json_schema":
        described = inner.object("json_schema") or {}
        if "schema" not in described:
            raise inner.refuse("json_schema", "must hold the schema: {name, schema}.")
        about = Fields(described, "response_format.json_schema.")
        about.text("name", _NAME)
        about.text("description", MOST_FORM_CHARACTERS)
        about.flag("strict")
        form = Form(kind, _schema(inner, "json_schema", described["schema"]))
    elif kind in ("regex", "grammar"):
        text = inner.text(kind, MOST_FORM_CHARACTERS)
        if text is None:
            raise inner.refuse(kind, "is missing.")
        form = Form(kind, text)
    inner.finish()
    return form


def _schema(fields: Fields, name: str, schema: Any) -> str:
    if isinstance(schema, str):  # guided_json may be the text of a schema
        try:
            schema = json.loads(schema) if len(schema) <= MOST_FORM_CHARACTERS else {"": schema}
        except (ValueError, RecursionError):
            raise fields.refuse(name, "is no valid JSON.") from None
    if not isinstance(schema, dict | bool):
        raise fields.refuse(name, f"must be a JSON schema, which is an object, got {shortened(schema)}.", "invalid_type")
    pieces, count = [], 0
    for piece in json.JSONEncoder(ensure_ascii=False).iterencode(schema):  # of a schema of megabytes no more is written than is needed to refuse it
        pieces.append(piece)
        count += len(piece)
        if count > MOST_FORM_CHARACTERS:
            raise fields.refuse(name, f"has more than {MOST_FORM_CHARACTERS:,} characters, which is the most that is taken. Use a smaller schema.")
    return "".join(pieces)
