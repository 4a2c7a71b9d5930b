"""Which addresses belong to a crawl, and which look endless."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.data.sources.scope import Patterns, Scope, trap
from cllm.runtime.errors import UserError


@pytest.mark.parametrize(
    ("kind", "seed", "inside", "outside"),
    [
        ("host", "https://example.org/a/b", ["https://example.org/", "http://example.org/x"],
         ["https://www.example.org/", "https://example.org:8443/", "https://example.org.evil.example/", "https://evil.example/example.org/"]),
        ("host", "http://127.0.0.5:8000/", ["http://127.0.0.5:8000/x"], ["http://127.0.0.5:8001/", "http://127.0.0.5/", "http://127.0.0.55:8000/"]),
        ("domain", "https://www.example.co.uk/", ["https://example.co.uk/", "http://a.b.example.co.uk:81/"],
         ["https://other.co.uk/", "https://co.uk/", "https://notexample.co.uk/"]),
        ("domain", "https://me.github.io/", ["https://me.github.io/x"], ["https://you.github.io/", "https://github.io/"]),
        ("domain", "http://127.0.0.5:80/", ["http://127.0.0.5:81/"], ["http://127.0.0.6/", "http://1.127.0.0.5.example/"]),
        ("domain", "http://[2a00::1]/", ["http://[2a00::1]:8/"], ["http://[2a00::2]/"]),
        ("domain", "http://wiki.corp/", ["http://wiki.corp/x"], ["http://mail.corp/", "http://corp/"]),
        ("domain", "http://localhost/", ["http://localhost:8000/"], ["http://a.localhost.example/"]),
        ("prefix", "https://example.org/docs/index.html", ["https://example.org/docs/", "https://example.org/docs/a/b", "http://example.org/docs/x"],
         ["https://example.org/", "https://example.org/docs", "https://example.org/docs2/", "https://a.example/docs/", "https://example.org:8443/docs/"]),
        ("prefix", "https://example.org/docs", ["https://example.org/docs", "https://example.org/docs/a"], ["https://example.org/docs2", "https://example.org/"]),
        ("prefix", "https://example.org/", ["https://example.org/x"], ["https://www.example.org/x"]),
    ],
)  # fmt: skip
def test_scopes(kind, seed, inside, outside):
    scope = Scope(kind, [seed])
    for url in (seed, *inside):
        assert scope.covers(url), url
    for url in outside:
        assert not scope.covers(url), url


def test_every_seed_counts():
    scope = Scope("host", ["https://a.example/", "https://b.example/"])
    scope.add("https://c.example/")
    assert all(scope.covers(f"https://{name}.example/x") for name in "abc") and not scope.covers("https://d.example/")


def test_a_scope_that_is_none():
    with pytest.raises(UserError, match="--scope must be one of host, domain, prefix, got 'world'"):
        Scope("world")


def test_patterns_are_those_of_robots_txt():
    patterns = Patterns(allow=["/docs/", "/*.html$", "https://b.example/"], deny=["/docs/old", "*print=1", "/a*b*c$"])
    for url in ("/docs/x", "/x/y.html"):
        assert not patterns.refusal(f"https://a.example{url}")
    assert not patterns.refusal("https://b.example/any")
    for url in ("/docs/old/x", "/docs/x?print=1", "/axbxc", "/other", "/x.htmlx", "/DOCS/"):
        assert patterns.refusal(f"https://a.example{url}")
    assert not Patterns().refusal("https://a.example/") and not Patterns(deny=["/a"]).refusal("https://a.example/b")
    assert Patterns(deny=["/a$"]).refusal("https://x.example/a") and not Patterns(deny=["/a$"]).refusal("https://x.example/ab")
    with pytest.raises(UserError, match="--deny must begin with /"):
        Patterns(deny=["docs"])


@pytest.mark.timeout(300)
def test_no_address_makes_a_pattern_slow():
    assert not Patterns(deny=["/" + "*a" * 500 + "b$"]).refusal("https://x.example/" + "a" * 2000)


@given(st.text("ab/", max_size=8), st.text("ab/*", max_size=6), st.booleans())
def test_patterns_match_as_the_expression_that_they_stand_for(path, pattern, ends):
    expected = re.match(re.escape("/" + pattern).replace(r"\*", ".*") + ("$" if ends else ""), "/" + path) is not None
    assert bool(Patterns(deny=["/" + pattern + "$" * ends]).refusal(f"https://x.example/{path}")) == expected


@pytest.mark.parametrize(
    "path",
    [
        "/a/a/a/", "/x/a/a/a", "/a/b/a/b/a/b", "/a/b/c/a/b/c/a/b/c/d", "/a/x/a/y/a/z/a/w/a", "/" + "/".join(map(str, range(20))),
        "/calendar/2031/05", "/events?month=2099-01", "/x?year=1825", "/calendar.php?date=2190-12-01", "/archive/3000",
        "/search?" + "&".join(f"{name}=1" for name in "abcdefghi"), "/s?a=1&a=2&a=3&a=4",
    ],
)  # fmt: skip
def test_signs_of_endless_sites(path):
    assert trap(f"https://example.org{path}", this_year=2026)


@pytest.mark.parametrize(
    "path",
    [
        "/", "/a/b/c/d/e/f", "/a/a", "/en/docs/en/docs", "/2020/01/15/title", "/calendar/2026/05", "/calendar/2027/01", "/archive/1999",
        "/book/1825/chapter", "/products?id=30000&page=2", "/year-in-review/1066", "/api/v1/a/v1/b", "/search?q=a&page=2&sort=new", "/m/2077/m",
    ],
)  # fmt: skip
def test_ordinary_addresses_are_no_traps(path):
    assert trap(f"https://example.org{path}", this_year=2026) == ""
