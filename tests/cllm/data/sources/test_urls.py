"""Addresses as they are fetched, and the keys under which their spellings meet."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.data.sources import urls
from cllm.data.sources.urls import BadURL, clean, key

PAGE = "https://example.org/docs/guide/index.html?v=2"

CLEANED = {
    "https://example.org": "https://example.org/",
    "HTTPS://EXAMPLE.org:443/A?b#c": "https://example.org/A?b",
    "http://example.org:80": "http://example.org/",
    "http://example.org:443/": "http://example.org:443/",
    "http://example.org:08080/": "http://example.org:8080/",
    "http://example.org:/x": "http://example.org/x",
    "http://example.org./x": "http://example.org/x",
    "http://localhost./": "http://localhost/",
    " \t\nhttps://exa\nmple.org/a\tb ": "https://example.org/ab",
    "https://example.org/a b": "https://example.org/a%20b",
    "https://example.org/%zz%41": "https://example.org/%25zz%41",
    "https://example.org/ä?ö": "https://example.org/%C3%A4?%C3%B6",
    "https://bücher.example/": "https://xn--bcher-kva.example/",
    "https://\uff45xample.org/": "https://example.org/",
    "https://%65xample.org/": "https://example.org/",
    "https://example.org/a/./b/../c": "https://example.org/a/c",
    "https://example.org/a/%2e%2E/b": "https://example.org/b",
    "https://example.org/../../x": "https://example.org/x",
    "https://example.org/a/..": "https://example.org/",
    "https://example.org/a/.": "https://example.org/a/",
    "https://example.org/.": "https://example.org/",
    "https://example.org/.well-known/x..y/...": "https://example.org/.well-known/x..y/...",
    "https://example.org/?a=../b": "https://example.org/?a=../b",
    "https://example.org//a": "https://example.org//a",
    "https:\\\\example.org\\a?b\\c": "https://example.org/a?b%5Cc",
    "http://0x7f000001:81/": "http://127.0.0.1:81/",
    "http://2130706433/": "http://127.0.0.1/",
    "http://0177.0.0.1/": "http://127.0.0.1/",
    "http://127.1/": "http://127.0.0.1/",
    "http://127.0.0.1:8000": "http://127.0.0.1:8000/",
    "http://[::0001]:80/": "http://[::1]/",
    "http://[::FFFF:127.0.0.1]/": "http://[::ffff:7f00:1]/",
    "../x": "https://example.org/docs/x",
    "/x": "https://example.org/x",
    "//other.example/x": "https://other.example/x",
    "?q=1": "https://example.org/docs/guide/index.html?q=1",
    "#top": "https://example.org/docs/guide/index.html?v=2",
    "": "https://example.org/docs/guide/index.html?v=2",
    "a:b": None,
    "mailto:a@b.example": None,
    "javascript:alert(1)": None,
    "file:///etc/passwd": None,
    "data:text/html,x": None,
    "gopher://example.org/": None,
    "https://user@example.org/": None,
    "https://user:pw@127.0.0.1/": None,
    "https://example.org\\@127.0.0.1/": "https://example.org/@127.0.0.1/",
    "https://example.org:99999/": None,
    "https://example.org:x/": None,
    "https://exa mple.org/": None,
    "https://example..org/": None,
    "https://": None,
    "https:///": None,
    "http://256.1.1.1/": None,
    "http://1.2.3.4.5/": None,
    "http://[::1%25lo]/": None,
    "http://[::1": None,
    "http://a_b.example/": "http://a_b.example/",
    "https://example.org/" + "a" * 2063: "https://example.org/" + "a" * 2063,
    "https://example.org/" + "a" * 2064: None,
    "x" * 10_000_000: None,
}


@pytest.mark.parametrize(("href", "expected"), CLEANED.items(), ids=lambda text: str(text)[:40])
def test_addresses_are_read_as_browsers_do(href, expected):
    if expected is None:
        with pytest.raises(BadURL):
            clean(href, PAGE)
    else:
        assert clean(href, PAGE) == expected
        assert clean(expected) == expected


def test_the_query_is_written_in_the_charset_of_the_page():
    assert clean("/ä?ä", PAGE, "iso-8859-1") == "https://example.org/%C3%A4?%E4"
    assert clean("/?ж", PAGE, "iso-8859-1") == "https://example.org/?%D0%B6"
    assert clean("/?ä", PAGE, "no such charset") == "https://example.org/?%C3%A4"


@settings(max_examples=150, deadline=None)
@given(
    st.text(max_size=60)
    | st.lists(st.sampled_from(["http:", "//", "/", ".", "..", "%2e", "@", ":", "\\", "?", "#", "[", "]", "1", "0x", "a"])).map("".join)
)
def test_what_is_cleaned_is_clean(text):
    try:
        url = clean(text, PAGE)
    except BadURL:
        return
    assert clean(url) == url
    assert url.isascii() and " " not in url and "@" not in urls.authority(url) and len(url) <= urls.MAX_LENGTH
    assert key(key(url)) == key(url)
    scheme, authority, path, query = urls.parts(url)
    assert url == f"{scheme}://{authority}{path}" + ("?" + query if "?" in url else "")


SAME = [
    ("https://example.org/a?b=1&a=2", "https://example.org/a?a=2&b=1"),
    ("https://example.org/a?utm_source=x&utm_campaign=y&fbclid=z", "https://example.org/a"),
    ("https://example.org/a?", "https://example.org/a"),
    ("https://example.org/%7euser/%c3%a4", "https://example.org/~user/%C3%A4"),
    ("https://example.org/a;jsessionid=0123456789ABCDEF?x=1", "https://example.org/a?x=1"),
    ("https://example.org/a?PHPSESSID=aaaabbbbccccdddd1&x=1", "https://example.org/a?x=1"),
    ("https://example.org/a?sid=0f8fad5bd9cb469fa16570867728950e", "https://example.org/a?sid=ffffad5bd9cb469fa16570867728950e"),
    ("https://example.org/(S(4hqa0555fwsecu455xqckv45))/a", "https://example.org/(S(zzza0555fwsecu455xqckv45))/a"),
]
OTHER = [
    ("https://example.org/a?g=1", "https://example.org/a"),
    ("https://example.org/a?s=how-to-train-a-model-in-2026", "https://example.org/a"),
    ("https://example.org/a?sid=12", "https://example.org/a?sid=13"),
    ("https://example.org/a?id=1", "https://example.org/a?id=2"),
    ("https://example.org/a", "https://example.org/a/"),
    ("https://example.org/a", "http://example.org/a"),
    ("https://example.org/a", "https://example.org:8443/a"),
    ("https://example.org/a%2Fb", "https://example.org/a/b"),
    ("https://example.org/A", "https://example.org/a"),
    ("https://example.org/a?ref=menu", "https://example.org/a"),
]


@pytest.mark.parametrize(("one", "other"), SAME)
def test_spellings_of_one_page_have_one_key(one, other):
    assert key(clean(one)) == key(clean(other))


@pytest.mark.parametrize(("one", "other"), OTHER)
def test_different_pages_have_different_keys(one, other):
    assert key(clean(one)) != key(clean(other))
