"""Conversations in the forms in which they are published, as one form: a list of {"role": ..., "content": ...}.

    {"messages": [{"role": "user", "content": "..."}, ...]}        OpenAI, Anthropic (content may be a list of {"type": "text", "text": ...})
    {"conversations": [{"from": "human", "value": "..."}, ...]}    ShareGPT, under any name of the list
    {"contents": [{"role": "model", "parts": [{"text": "..."}]}]}  Gemini
    {"conversation": [{"human": "...", "assistant": "..."}, ...]}  turns as pairs
    {"dialog": ["...", "...", ...]}                                strings that alternate between user and assistant
    {"instruction": "...", "input": "...", "output": "..."}        Alpaca; prompt and completion, question and answer, and so on
    [{"role": ..., "content": ...}, ...]                           a list of messages without a name

A form is recognised by what a record holds, never by the name of its file.
"""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from cllm.runtime.printable import printable, quoted

EXAMPLE = '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'

_ROLES = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter", "customer"),
    "assistant": ("assistant", "gpt", "chatgpt", "bot", "chatbot", "model", "ai", "bing", "bard", "claude", "function_call"),
    "tool": ("tool", "function", "observation", "ipython", "tool_response"),
}
_ROLE_OF = {name: role for role, names in _ROLES.items() for name in names}
_ROLE_KEYS = ("role", "from", "speaker", "author", "sender")
_CONTENT_KEYS = ("content", "value", "parts", "text", "message")
_LISTS = ("messages", "conversations", "conversation", "contents", "dialogue", "dialog", "turns", "chat", "completion", "chosen", "data")
_NEVER = ("rejected",)  # of preference data: the answer that is not to be learnt
_SYSTEM_KEYS = ("system", "system_prompt")
# What the user says (with an addition that may be missing), and what the assistant answers.
_PAIRS: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("instruction", ("input", "context"), ("output", "response", "answer", "completion", "target")),
    ("prompt", (), ("completion", "response", "answer", "output", "chosen")),
    ("question", ("context",), ("answer", "response", "output", "solution")),
    ("query", (), ("response", "answer")),
    ("problem", (), ("solution", "answer")),
    ("input", (), ("output", "response", "answer")),
    ("inputs", (), ("targets", "outputs")),
    ("user", (), ("assistant", "bot", "model")),
    ("human", (), ("assistant", "bot", "gpt")),
)
_PLAIN = ("text", "content")  # a record with one of these is a text, even beside a pair of fields that could be a question and its answer
_NAMED = {"instruction": "Alpaca fields"}


class Conversation(NamedTuple):
    """`form`: in words, where in the record the messages were; `messages`: each with its role and content."""

    form: str
    messages: list[dict[str, str]]


class NotAConversation(ValueError):
    """A record holds no conversation, or one that cannot be learnt; says why."""


def is_message(value: Any) -> bool:
    """Whether a value is one message: who speaks, as one of the roles that are known, and what is said."""
    return _role_key(value, known=True) is not None and _content_key(value) is not None


def is_conversation(record: Any) -> bool:
    """Whether a record has the form of a conversation, even of one that could not be learnt."""
    return _find(record) is not None


def mostly_conversations(records: Iterable[Any]) -> bool:
    """Whether a sample of records is one of chats: more of them are conversations than texts. Records that are neither do not count."""
    chats = texts = 0
    for record in records:
        if is_conversation(record):
            chats += 1
        elif isinstance(record, str) or (isinstance(record, dict) and any(isinstance(record.get(key), str) for key in _PLAIN)):
            texts += 1
    return chats > texts


def conversation(record: Any) -> Conversation:
    """The conversation of a record; NotAConversation where it has none."""
    found = _find(record)
    if found is None:
        what = f"fields: {fields(record)}" if isinstance(record, dict) else f"a {_JSON_NAMES.get(type(record), 'list')}"
        raise NotAConversation(f"no conversation; {what}")
    form, turns = found
    messages = list(turns)
    if isinstance(record, dict) and messages and messages[0]["role"] != "system":
        lower = _lowered(record)
        said = next((lower[key] for key in _SYSTEM_KEYS if isinstance(lower.get(key), str) and lower[key].strip()), None)
        if said is not None:
            messages.insert(0, {"role": "system", "content": said})
    return Conversation(form, messages)


_JSON_NAMES = {str: "string", int: "number", float: "number", bool: "boolean", type(None): "null"}


def fields(record: dict[str, Any], most: int = 8) -> str:
    """The names of a record's fields, for people."""
    names = [printable(name) for name in record]
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "") if names else "none"


def _find(record: Any) -> tuple[str, Iterator[dict[str, str]]] | None:
    """The form of a record and its messages, which raise NotAConversation where they cannot be used."""
    if isinstance(record, list):
        return ("lists of messages", _from_messages(record)) if _are_messages(record) else None
    if not isinstance(record, dict):
        return None
    return _find_list(record) or _find_pair(record) or _find_below(record)


def _find_list(record: dict[str, Any]) -> tuple[str, Iterator[dict[str, str]]] | None:
    lower = {key.lower(): key for key in record}
    usual = [lower[name] for name in _LISTS if name in lower]
    others = [key for key in record if key not in usual and key.lower() not in _NEVER]
    for name in (*usual, *others):
        value = record[name]
        if not isinstance(value, list) or not value:
            continue
        if _are_messages(value):
            asked = record.get("prompt")  # TRL keeps the question as messages of its own
            before = asked if isinstance(asked, list) and name != "prompt" and _are_messages(asked) and not _begins(value) else []
            keys = (_role_key(value[0]), _content_key(value[0]))
            how = "" if keys == ("role", "content") else f" ({keys[0]}, {keys[1]})"
            return f"field {quoted(name)}{how}", _from_messages([*before, *value])
        if name not in usual or _is_plain(record):
            continue
        pair = _pair_of_turns(value)
        if pair is not None:
            return f"field {quoted(name)} ({pair[0]}, {pair[1]})", _from_turns(value, *pair)
        if len(value) > 1 and all(isinstance(each, str) for each in value):
            return f"field {quoted(name)}, whose strings alternate between user and assistant", _alternating(value)
    return None


def _begins(messages: list[Any]) -> bool:
    """Whether a conversation begins here, rather than going on with an answer."""
    key = _role_key(messages[0])
    return key is not None and _ROLE_OF.get(_role_name(messages[0][key])) != "assistant"


def _is_plain(record: dict[str, Any]) -> bool:
    return any(isinstance(record.get(key), str) and record[key].strip() for key in _PLAIN)


def _find_below(record: dict[str, Any]) -> tuple[str, Iterator[dict[str, str]]] | None:
    """Messages one level deeper, as in {"conversation": {"messages": [...]}}."""
    for name, value in record.items():
        found = _find_list(value) if isinstance(value, dict) else None
        if found is not None:
            return f"{found[0]} of {quoted(name)}", found[1]
    return None


def _find_pair(record: dict[str, Any]) -> tuple[str, Iterator[dict[str, str]]] | None:
    lower = {key.lower(): key for key in record}
    for asked, additions, answers in _PAIRS:
        if asked not in lower or not _is_said(record[lower[asked]]):
            continue
        answer = next((lower[name] for name in answers if name in lower and _is_said(record[lower[name]])), None)
        if answer is None:
            continue
        if asked != "instruction" and _is_plain(record):
            return None
        names = [lower[asked], *(lower[name] for name in additions if name in lower and lower[name] != answer), answer]
        return f"{_NAMED.get(asked, 'fields')} {', '.join(map(printable, names))}", _from_pair(record, names)
    return None


def _from_pair(record: dict[str, Any], names: list[str]) -> Iterator[dict[str, str]]:
    history = record.get("history")
    if isinstance(history, list):
        for turn in history:
            if isinstance(turn, list) and len(turn) == 2 and all(isinstance(each, str) for each in turn):
                yield {"role": "user", "content": turn[0]}
                yield {"role": "assistant", "content": turn[1]}
    *asked, answer = (str(record[name]) if _is_said(record[name]) else "" for name in names)
    if not answer.strip():
        raise NotAConversation(f"the answer (field {quoted(names[-1])}) is empty")
    yield {"role": "user", "content": "\n\n".join(part for part in asked if part.strip())}
    yield {"role": "assistant", "content": answer}


def _from_messages(messages: list[Any]) -> Iterator[dict[str, str]]:
    for message in messages:
        role_key, content_key = _role_key(message), _content_key(message)
        if role_key is None or content_key is None:
            raise NotAConversation("a message without a role or without content")
        name = _role_name(message[role_key])
        if name not in _ROLE_OF:
            raise NotAConversation(f"a message of an unknown role ({printable(name)[:40]}); known are {', '.join(_ROLES)}")
        yield {"role": _ROLE_OF[name], "content": _content(message[content_key])}


def _content(value: Any) -> str:
    """Text given as it is, or in parts that are all text."""
    if isinstance(value, str):
        return value
    if isinstance(value, dict):
        value = value["parts"] if isinstance(value.get("parts"), list) else [value]
    if not isinstance(value, list):
        raise NotAConversation("a message whose content is not text")
    texts = []
    for part in value:
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str) or (isinstance(part, dict) and part.get("type", "text") not in ("text", "input_text", "output_text")):
            kind = part.get("type") if isinstance(part, dict) else None
            raise NotAConversation("a message with a part that is not text" + (f" ({printable(kind)[:40]})" if kind else ""))
        texts.append(text)
    return "".join(texts)


def _pair_of_turns(value: list[Any]) -> tuple[str, str] | None:
    """The two keys of turns such as {"human": "...", "assistant": "..."}."""
    first = value[0]
    if not isinstance(first, dict) or not all(isinstance(each, dict) for each in value):
        return None
    keys = {role: next((key for key in first if _ROLE_OF.get(key.lower()) == role), None) for role in ("user", "assistant")}
    asked, answer = keys["user"], keys["assistant"]
    if asked is None or answer is None or not all(isinstance(each.get(asked), str) and isinstance(each.get(answer), str) for each in value):
        return None
    return asked, answer


def _from_turns(turns: list[dict[str, str]], asked: str, answer: str) -> Iterator[dict[str, str]]:
    for turn in turns:
        yield {"role": "user", "content": turn[asked]}
        yield {"role": "assistant", "content": turn[answer]}


def _alternating(texts: list[str]) -> Iterator[dict[str, str]]:
    for number, text in enumerate(texts):
        yield {"role": ("user", "assistant")[number % 2], "content": text}


def _are_messages(value: list[Any]) -> bool:
    """A list of messages, most of them of roles that are known: a forum's posts have an author and a text as well."""
    shaped = [each for each in value if _role_key(each) is not None and _content_key(each) is not None]
    return bool(value) and len(shaped) == len(value) and 2 * sum(map(is_message, shaped)) > len(value)


def _role_key(value: Any, known: bool = False) -> str | None:
    if not isinstance(value, dict):
        return None
    keys = (key for key in _ROLE_KEYS if isinstance(value.get(key), str | dict))
    return next((key for key in keys if not known or _role_name(value[key]) in _ROLE_OF), None)


def _role_name(value: Any) -> str:
    """The role itself, or as ChatGPT's export has it: {"role": ...}."""
    inner = value.get("role") if isinstance(value, dict) else value
    return inner.strip().lower() if isinstance(inner, str) else ""


def _content_key(value: Any) -> str | None:
    return next((key for key in _CONTENT_KEYS if key in value), None) if isinstance(value, dict) else None


def _is_said(value: Any) -> bool:
    """Text, or a number that stands for itself, as the answer of a sum."""
    return isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool))


def _lowered(record: dict[str, Any]) -> dict[str, Any]:
    return {key.lower(): value for key, value in record.items()}
