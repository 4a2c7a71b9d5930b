"""What a name may show on a terminal: only itself."""

import unicodedata

from cllm.runtime.printable import printable, printable_text


def test_no_character_that_acts_on_a_terminal_is_left():
    everything = "".join(map(chr, range(0x110000)))
    shown = printable(everything)
    acting = {c for c in shown if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp") or unicodedata.bidirectional(c) in ("RLO", "LRO", "RLI", "PDF")}
    assert not acting
    assert printable_text("two\nlines\tand \x1b[31mred\r") == "two\nlines\tand \\x1b[31mred\\x0d"


def test_names_in_any_script_stay_as_they_are():
    for name in (
        "a b.txt",
        "\u00fcber/\u0436\u0443\u043a.md",
        "\u4e2d\u6587 \U0001f600\u200d\U0001f468.jsonl",
        "\u0627\u0644\u0639\u0631\u0628\u064a\u0629",
    ):
        assert printable(name) == name
    assert printable("a\nb\x9bc\u202e\udc80") == "a\\x0ab\\x9bc\\u202e\\udc80"
