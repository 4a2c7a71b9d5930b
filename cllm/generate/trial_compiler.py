"""A program of its own: compiles what it reads on stdin with llguidance and says whether it can be, so that whoever asks may end it when it is slow.

In: 8 bytes with the length of a grammar, then the grammar, again and again. Out: a line when it is ready, then a
line of JSON for each, "" or what is wrong. The grammar is
compiled for single bytes instead of a model's tokens, which takes about as long.
"""

import contextlib
import json
import sys

MOST_MEMORY = 2 << 30


class Bytes:
    """The smallest vocabulary."""

    eos_token_id, bos_token_id, tokens, special_token_ids = 256, None, [bytes([each]) for each in range(256)] + [b"<end>"], [256]

    def __call__(self, text: bytes | str) -> list[int]:
        return list(text.encode() if isinstance(text, str) else text)


def main(seconds: float) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # absent on some systems; a lower limit is in force
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MOST_MEMORY, MOST_MEMORY))
    import llguidance

    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Bytes()))
    limits = llguidance.LLParserLimits(precompute_large_lexemes=False, verbose_errors=False)
    print(flush=True)
    while header := sys.stdin.buffer.read(8):
        grammar = sys.stdin.buffer.read(int.from_bytes(header, "little")).decode()
        with contextlib.suppress(ImportError, AttributeError):
            import signal

            signal.setitimer(signal.ITIMER_REAL, seconds)  # ends this process, also when nobody is left who could
        matcher = llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        with contextlib.suppress(ImportError, AttributeError):
            signal.setitimer(signal.ITIMER_REAL, 0)
        print(json.dumps(matcher.get_error()), flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]))
