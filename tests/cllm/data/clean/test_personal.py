"""Secrets and personal data are found by their form; ordinary numbers and addresses of documentation are not."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.data.clean.personal import protect
from cllm.data.clean.rules import Rules

OFF, ON = Rules(), Rules(personal_data=True)
# Made for this test, in two parts so that nobody's scanner takes them for real.
SECRETS = [
    "AKIA" + "IOSFODNN7EXAMPLE",
    "ghp_" + "a1B2" * 9,
    "github_pat_" + "11AAAAAAA0" * 3,
    "glpat-" + "abcDEF123_" * 2,
    "xoxb-" + "123456789012-abcdef",
    "sk_live_" + "4eC39HqLyjWDarjtT1zdp7dc",
    "sk-proj-" + "abc123DEF456ghi789jkl",
    "AIza" + "SyA1234567890abcdefghijklmnopqrstuv",
    "hf_" + "abcdefghijKLMNOPQRSTuvwxyz12345678",
    "npm_" + "a1b2c3d4e5f6" * 3,
    "SG." + "abcdefghijklmnopqrstuv." + "x" * 43,
    "eyJ" + "hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.dozjgNryP4J3jVmNHl0w5N_XgL0n3I9P",
]


@pytest.mark.parametrize("secret", SECRETS, ids=lambda secret: secret[:4])
def test_secrets_are_counted_and_masked(secret):
    text = f"key = '{secret}'\nand more"
    assert protect(text, OFF) == ("key = '[secret]'\nand more", {"secrets": 1}, "")
    assert protect(text, OFF.changed({"secrets": "keep"})) == (text, {"secrets": 1}, "")
    assert protect(f"x{secret}", OFF)[1] == {} or secret.startswith("sk_")


def test_a_password_in_an_address_is_a_secret():
    assert protect("postgres://ann:hunter2@db.example.org/x", OFF) == ("postgres://[secret]@db.example.org/x", {"secrets": 1}, "")


def test_a_document_with_a_private_key_is_dropped():
    key = "-----BEGIN RSA PRIVATE KEY-----\nMIIEow\nIBAAK\n-----END RSA PRIVATE KEY-----"
    text, counts, reason = protect(f"a\n{key}\nb", OFF)
    assert (text, counts) == ("a\n[secret]\nb", {"private_keys": 1})
    assert reason.startswith("private_keys: ")
    assert protect(key, OFF.changed({"private_keys": "off"}))[2] == ""
    assert protect("-----BEGIN OPENSSH PRIVATE KEY-----\ncut off", OFF)[2]
    assert protect("The PRIVATE KEY of the matter.", OFF) == ("The PRIVATE KEY of the matter.", {}, "")


@pytest.mark.parametrize(
    "text, kind, done",
    [
        ("write to ann.b+c@mail.example.co.uk, please", "emails", "write to [email], please"),
        ("call +358 40 123 4567 now", "phones", "call [phone] now"),
        ("call (555) 123-4567.", "phones", "call [phone]."),
        ("call 555-123-4567", "phones", "call [phone]"),
        ("puh. 040 123 4567", "phones", "puh. [phone]"),
        ("from 8.8.8.8, port 53", "ip_addresses", "from [ip], port 53"),
        ("from 2606:4700::6810:84e5 today", "ip_addresses", "from [ip] today"),
    ],
)
def test_personal_data_is_replaced_where_that_was_asked_for(text, kind, done):
    assert protect(text, ON) == (done, {kind: 1}, "")
    assert protect(text, OFF) == (text, {}, "")


@pytest.mark.parametrize(
    "text",
    [
        "In 1914-1918 and 1939-1945, 3.141592653589793 and 1,234,567,890 people.",
        "Version 1.2.3.4.5 of 192.168.0.1 and 127.0.0.1 and 203.0.113.7",
        "At 12:30:45 std::vector<int> a::b::c 00:1A:2B",
        "a @ b, @name, x@y, ISBN 978-3-16-148410-0, sk-learn-is-not-a-secret-at-all",
        "0x0800 1000 2000 3000 00 11 22 33 44 55 66 77",
    ],
)
def test_what_only_looks_like_it_stays(text):
    assert protect(text, ON) == (text, {}, "")


@given(
    st.lists(
        st.sampled_from([*SECRETS, "a@b.org", " ", "://", "u:p@", "1.2.3.4", "8.8.8.8", "::", "+1 555 123 4567", "x", "\n", "-"]), max_size=8
    ).map(" ".join)
)
@settings(max_examples=150, deadline=None)
def test_doing_it_twice_finds_nothing_more_in_words_of_their_own(text):
    once = protect(text, ON)[0]
    assert protect(once, ON) == (once, {}, "")


HOSTILE = ["a", "a@", "1.", "+1 ", "://a:", "eyJ", "1 ", "0:", "-----BEGIN PRIVATE KEY-----", "sk-", "a.@b."]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("piece", HOSTILE)
def test_hostile_text_takes_no_more_time_than_its_length_allows(piece):
    """Quadratic patterns would take hours on a megabyte of this, far beyond the limit of the test."""
    text = piece * (500_000 // len(piece)) + "@://PRIVATE KEY"
    assert len(protect(text, ON)[0]) <= len(text)
