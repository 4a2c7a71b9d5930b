"""tiktoken's rank files as tokenizer.json: the same ids for the same text.

A rank file has a line for each token, its bytes in base64 and its rank. A word that is a token is taken whole; in any other the neighbours whose
union has the lowest rank are joined first, the leftmost of equal ones (github.com/openai/tiktoken, `byte_pair_merge`). The tokenizers library does
the same with a list of merges. A token that training has made needs one merge: of the two parts that are left where only lower ranks count. It is
joined as soon as they are neighbours, and they become neighbours wherever nothing is joined across its ends, so that no other pair ever makes it.
Every token of r50k, p50k, cl100k and o200k is of this kind. One that is not (put in by hand, to be taken as a whole word) gets a merge for every two
tokens that it consists of.

How text is split into words is not in the file. `PATTERNS` holds what tiktoken uses with its own files (tiktoken_ext/openai_public.py).
"""

import base64
import binascii
from pathlib import Path
from typing import Any, NamedTuple

from cllm.data.tokens.vocabulary import END_OF_TEXT, LLAMA_BPE_PATTERN, added_token, byte_level_name, byte_level_steps
from cllm.files import read_named, reason
from cllm.runtime.errors import DataError, UserError

EXTENSION = ".tiktoken"
_ENDINGS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
O200K_PATTERN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDINGS}|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDINGS}"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class Encoding(NamedTuple):
    """What a rank file does not say: how text is split into words (None: as GPT-2), and the special tokens."""

    pattern: str | None
    specials: dict[str, int]


_FIM = {"<|fim_prefix|>": 100258, "<|fim_middle|>": 100259, "<|fim_suffix|>": 100260, "<|endofprompt|>": 100276}
ENCODINGS = {
    "r50k": Encoding(None, {END_OF_TEXT: 50256}),
    "p50k": Encoding(None, {END_OF_TEXT: 50256}),
    "cl100k": Encoding(LLAMA_BPE_PATTERN, {END_OF_TEXT: 100257, **_FIM}),
    "o200k": Encoding(O200K_PATTERN, {END_OF_TEXT: 199999, "<|endofprompt|>": 200018}),
}


def from_tiktoken(path: Path, encoding: str | None = None) -> dict[str, Any]:
    """The content of a tokenizer.json for a rank file.

    encoding: one of ENCODINGS; None takes the one that the name of the file begins with. A file of another size than that encoding's own gets one
    special token, the end of text, behind its last token.
    Raises UserError where the encoding is not known, DataError for a file that is none or whose tokens do not cover the 256 bytes.
    """
    name = next((each for each in ENCODINGS if path.name.lower().startswith(each)), None) if encoding is None else encoding
    if name not in ENCODINGS:
        known = ", ".join(ENCODINGS)
        how = f"cllm tokenizer import {path} --encoding cl100k --out tokenizer.json"
        raise UserError(f"{path} does not say how text is split into words. Name its encoding ({known}), as in: {how}")
    pattern, specials = ENCODINGS[name]
    ranks = read_ranks(path)
    last = max(ranks.values())
    if set(specials.values()) & set(ranks.values()) or min(specials.values()) > last + 2:  # of a vocabulary of another size
        specials = {END_OF_TEXT: last + 1}
    names = {token: byte_level_name(token) for token in ranks}
    merges = [f"{names[left]} {names[right]}" for token in sorted(ranks, key=ranks.__getitem__) for left, right in pairs(token, ranks)]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(token_id, special) for special, token_id in sorted(specials.items(), key=lambda each: each[1])],
        "normalizer": None,
        "pre_tokenizer": byte_level_steps(pattern),
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
            "byte_fallback": False, "ignore_merges": True, "vocab": {names[token]: rank for token, rank in ranks.items()}, "merges": merges,
        },
    }  # fmt: skip


def read_ranks(path: Path) -> dict[bytes, int]:
    """Token -> rank; DataError for a file that is no list of ranks."""
    try:
        lines = read_named(path).split(b"\n")
    except OSError as error:
        raise DataError(f"{path} cannot be read as ranks of tiktoken: {reason(error)}.") from None
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise DataError(f"{path} is not a file of tiktoken's ranks: line {number} is no token in base64 and a number.") from None
    missing = 256 - sum(bytes([byte]) in ranks for byte in range(256))
    if missing or len(set(ranks.values())) < len(ranks) or min(ranks.values()) < 0 or b"" in ranks:
        what = f"{missing} of the 256 bytes have no rank" if missing else "two tokens have the same rank, or one has none"
        raise DataError(f"{path} is not a whole file of tiktoken's ranks: {what}.")
    return ranks


def pairs(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The neighbours that join to a token: those that joining by lower ranks leaves, or all that there are where it leaves more than two."""
    left = [token[i : i + 1] for i in range(len(token))]
    limit = ranks[token]
    while len(left) > 2:
        best, place = limit, -1
        for i in range(len(left) - 1):
            rank = ranks.get(left[i] + left[i + 1], limit)
            if rank < best:
                best, place = rank, i
        if place < 0:
            cuts = range(len(token) - 1, 0, -1)
            return [(token[:cut], token[cut:]) for cut in cuts if token[:cut] in ranks and token[cut:] in ranks]
        left[place : place + 2] = [left[place] + left[place + 1]]
    return [(left[0], left[1])] if len(left) == 2 else []
