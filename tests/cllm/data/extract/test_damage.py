"""Damaged files of every kind: the process that asks never dies, and each file ends as text or as one reason in words."""

import random
import re

import pytest
import sample_files

from cllm.data.extract.document import Unreadable
from cllm.data.extract.members import Member, Refused, members
from cllm.data.extract.options import Options
from cllm.data.extract.sandbox import Sandbox

WORDS = re.compile(
    "encrypted|empty|truncated|damaged|unknown type|too large|time limit|out of memory|nested too deeply|no text|no page|link|special file|hidden|"
    "generated|minified"
)


def damaged(content, others, chance):
    """One of the ways in which files break: bits that flip, an end that is missing, a hole, a piece of another file, bytes that repeat."""
    content = bytearray(content)
    way = chance.choice(("flip", "flip", "many", "cut", "hole", "splice", "repeat", "zeros"))
    place = chance.randrange(len(content)) if content else 0
    size = chance.choice((1, 4, 64, 512))
    if way == "flip":
        content[place] ^= 1 << chance.randrange(8)
    elif way == "many":
        for _ in range(max(1, len(content) // 100)):
            content[chance.randrange(len(content))] = chance.randrange(256)
    elif way == "cut":
        del content[place:]
    elif way == "hole":
        del content[place : place + size]
    elif way == "splice":
        other = chance.choice(others)
        start = chance.randrange(len(other))
        content[place : place + size] = other[start : start + size]
    elif way == "repeat":
        content[place:place] = content[place : place + size] * chance.choice((1, 3, 50))
    else:
        content[place : place + size] = bytes(size)
    return bytes(content)


def campaign(tmp_path, seeds):
    """Reads damaged files; returns how many documents they gave and the reasons of what gave none."""
    samples = sorted({**sample_files.samples(tmp_path), **sample_files.office_samples()}.items())
    contents = [content for _, content in samples]
    options = Options(seconds=20, memory_bytes=1 << 30, small_bytes=8 << 20)
    texts, reasons = 0, []
    path = tmp_path / "damaged"
    with Sandbox(options) as sandbox:
        for seed in seeds:
            name, content = samples[seed % len(samples)]
            path.write_bytes(damaged(content, contents, random.Random(seed)))
            for member in members(path, name, options):
                if not isinstance(member, Member):
                    reasons += [(seed, member.reason)] if isinstance(member, Refused) else []
                    continue
                try:
                    for document in sandbox.documents(member.source, member.name, member.kind, member.content_type):
                        document.text.encode("utf-8")
                        texts += 1
                except Unreadable as error:
                    reasons.append((seed, str(error)))
    return texts, reasons


def check(texts, reasons):
    assert texts > len(reasons)  # most damage costs a little of a text
    strange = [(seed, reason) for seed, reason in reasons if not WORDS.match(reason) or "\n" in reason or "Traceback" in reason]
    assert not strange


def test_damaged_files_end_as_text_or_as_a_reason(tmp_path):
    pytest.importorskip("docx", reason="samples are written by the libraries of the extra data")
    check(*campaign(tmp_path, range(300)))


@pytest.mark.slow
def test_ten_thousand_damaged_files(tmp_path):
    pytest.importorskip("docx", reason="samples are written by the libraries of the extra data")
    check(*campaign(tmp_path, range(300, 10_300)))
