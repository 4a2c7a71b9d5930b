"""Lines that stand on many pages of a site are found by counting, in any order, and taken out of all pages of that site alone."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.data.clean.lines import boilerplate, count, drop_lines, drop_policy_lines, line_keys, merge
from cllm.data.clean.rules import Rules

RULES = Rules(boilerplate_min_pages=3, boilerplate_share=0.5)
LINE = st.sampled_from(["Home", "About us", "A story", "  Home  ", "---", "", "{", "The end.", "```", "x = 1"])
PAGE = st.lists(LINE, max_size=8).map("\n".join)


def slow_lines(page):
    found, inside = set(), False
    for line in page.split("\n"):
        fence = line.lstrip().startswith("```")
        if not fence and not inside and any(c.isalnum() for c in line):
            found.add(line.strip())
        inside ^= fence
    return found


def slow_drop(page, lines):
    kept, inside = [], False
    for line in page.split("\n"):
        fence = line.lstrip().startswith("```")
        if inside or fence or line.strip() not in lines:
            kept.append(line)
        inside ^= fence
    return "\n".join(kept)


@given(st.lists(PAGE, max_size=8), st.integers(0, 8))
@settings(max_examples=100, deadline=None)
def test_pages_lose_what_plain_python_says(pages, cut):
    keys = [line_keys(page, "a.org") for page in pages]
    counts = merge([count(keys[cut:]), count(keys[:cut])])
    assert np.array_equal(counts, count(keys))
    found = boilerplate(counts, len(pages), RULES)
    often = {line for page in pages for line in slow_lines(page) if sum(line in slow_lines(other) for other in pages) >= max(3, len(pages) / 2)}
    assert len(found) == len(often)
    for page in pages:
        done, dropped = drop_lines(page, "a.org", found)
        assert done == slow_drop(page, often)
        assert dropped == len(page.split("\n")) - (len(done.split("\n")) if dropped < len(page.split("\n")) else 0)
        assert drop_lines(page, "b.org", found) == (page, 0)


def test_switched_off_finds_nothing():
    counts = count([line_keys("Home")] * 10)
    assert len(boilerplate(counts, 10, RULES)) == 1
    assert not len(boilerplate(counts, 10, RULES.changed({"boilerplate_share": "off"})))
    assert not len(boilerplate(merge([]), 0, RULES))


def test_notices_of_a_site_go_and_text_about_them_stays():
    page = "We use cookies to make this site better.\nPlease enable JavaScript to view the comments.\nJavaScript is a language of programs.\nThe end."
    assert drop_policy_lines(page) == ("JavaScript is a language of programs.\nThe end.", 2)
    long = "The privacy policy of the bank was the subject of a long debate. " * 8
    assert drop_policy_lines(long) == (long, 0)
