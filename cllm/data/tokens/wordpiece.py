"""WordPiece (Schuster and Nakajima 2012; Devlin et al. 2019) over bytes: a word is taken apart from its beginning, each time by the longest entry.

Entries that go on inside a word begin with ##. Unlike BERT's, nothing is normalised and no blank is lost: words are those of GPT-2's pattern, in its
printable stand-ins for bytes, and each byte is an entry in both forms, so that any text can be encoded and comes back unchanged. The sign # is always
a word of its own, because a word that begins with ## would be taken for the inside of another one. Longer words are cut, because the search for the
longest entry takes the square of a word's length.
"""

import json
from collections.abc import Iterator
from typing import Any

from cllm.data.tokens.vocabulary import (
    BPE_SPECIALS,
    byte_level_alphabet,
    byte_level_steps,
    check_vocab_size,
    fill_up,
    pattern_of,
    round_up,
    without_long_runs,
)

PREFIX = "##"
_WORD = 64  # bytes
_WORDS = rf"#|[^#]{{1,{_WORD}}}"


def learn_wordpiece(stream: Iterator[str], vocab_size: int, pre_tokenizer: str) -> dict[str, Any]:
    """The content of a tokenizer.json, its vocabulary rounded up to a multiple of 64. Raises UserError as `learn_bpe` does."""
    pattern = pattern_of(pre_tokenizer)
    check_vocab_size(vocab_size, 2 * 256)
    from tokenizers import Tokenizer as Backend
    from tokenizers import trainers

    first = byte_level_steps(pattern)
    cut = {"type": "Split", "pattern": {"Regex": _WORDS}, "behavior": "Isolated", "invert": False}
    steps = {"type": "Sequence", "pretokenizers": [*first.get("pretokenizers", [first]), cut]}
    alphabet = sorted(byte_level_alphabet())
    # The library numbers the inner forms of bytes in the order of a hash table, which differs from run to run and decides between pairs that are
    # equally frequent. As special tokens they have their numbers before it looks at the text.
    inner = [PREFIX + character for character in alphabet]
    trainer = trainers.WordPieceTrainer(
        vocab_size=round_up(vocab_size),
        min_frequency=2,
        special_tokens=[*BPE_SPECIALS, *inner],
        initial_alphabet=alphabet,
        continuing_subword_prefix=PREFIX,
        show_progress=False,
    )
    backend = Backend.from_str(json.dumps(_empty(steps)))
    backend.train_from_iterator((part for text in stream for part in without_long_runs(text)), trainer)
    content = json.loads(backend.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith(PREFIX)]
    content["model"] |= {"continuing_subword_prefix": PREFIX, "max_input_chars_per_word": _WORD, "unk_token": "<|unk|>"}
    return fill_up(content)


def _empty(steps: dict[str, Any]) -> dict[str, Any]:
    """A tokenizer without a vocabulary."""
    decoders = [
        {"type": "Replace", "pattern": {"Regex": f"^{PREFIX}"}, "content": ""},
        {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
    ]
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None, "pre_tokenizer": steps, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {"type": "WordPiece", "unk_token": "<|unk|>", "continuing_subword_prefix": PREFIX, "max_input_chars_per_word": _WORD, "vocab": {}},
    }  # fmt: skip
