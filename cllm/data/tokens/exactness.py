"""Whether text comes back from a tokenizer as it was. All that are trained here give it back; one that was made elsewhere may not."""

from collections.abc import Iterator
from typing import Any

_HARMLESS = ("Prepend", "Replace", "Sequence")  # what SentencePiece models converted by transformers do to blanks
_LOSES_BLANKS = ("BertPreTokenizer", "Whitespace", "WhitespaceSplit", "CharDelimiterSplit")


def losses(content: dict[str, Any]) -> list[str]:
    """Why text may not come back from the tokenizer of this tokenizer.json, in words; nothing where it always does."""
    found: list[str] = []
    for step in _steps(content.get("normalizer"), "normalizers"):
        kind = step.get("type")
        if kind not in _HARMLESS:
            found.append(f"it changes text before it reads it ({kind})")
        elif kind == "Prepend":
            found.append("it puts a blank before the text")
    steps = list(_steps(content.get("pre_tokenizer"), "pretokenizers"))
    for step in steps:
        kind = step.get("type")
        if kind in _LOSES_BLANKS or step.get("behavior") == "Removed":
            found.append(f"it leaves out what stands between words ({kind})")
        elif (kind == "ByteLevel" and step.get("add_prefix_space")) or (kind == "Metaspace" and step.get("prepend_scheme", "always") != "never"):
            found.append("it puts a blank before the text")
    model = content["model"]
    is_bytes = any(step.get("type") == "ByteLevel" for step in steps) or model.get("byte_fallback")
    if not is_bytes and model.get("type") in ("WordPiece", "Unigram", "WordLevel", "BPE") and model.get("unk_token", model.get("unk_id")) is not None:
        found.append("what it does not know becomes an unknown token")
    return list(dict.fromkeys(found))


def _steps(step: dict[str, Any] | None, inside: str) -> Iterator[dict[str, Any]]:
    """A step, or those of a sequence."""
    if not step:
        return
    if step.get("type") == "Sequence":
        for each in step.get(inside) or []:
            yield from _steps(each, inside)
    else:
        yield step
