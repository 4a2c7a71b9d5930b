"""Requests of other sites, without the key, or with a body that is too long are refused whatever their path."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.runtime.errors import UserError
from cllm.serve.errors import Refused
from cllm.serve.safety import ClientGone, Policy, check, is_loopback, read_body

LOCAL = Policy.of("127.0.0.1", None)
PATHS = ("/v1/models", "/v1/completions", "/metrics", "/", "/docs", "/health", "/no/such/path", "/%2e%2e/x")


def ask(policy=LOCAL, method="GET", path="/v1/models", host="127.0.0.1:8000", **headers):
    given = [] if host is None else [(b"host", host.encode("latin-1"))]
    check(method, path, [*given, *((name.replace("_", "-").encode(), value.encode("latin-1")) for name, value in headers.items())], policy)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.1:8000", "localhost:1", "LOCALHOST", "[::1]:8000", "127.1.2.3"])
def test_names_of_this_machine_are_answered(host):
    ask(host=host)


HOSTS = ["evil.com", "127.0.0.1.evil.com", "localhost.evil.com", "evil.com:8000", "localhost.", "127.0.0.1@evil.com", "192.168.1.5", "", "a b",
         "localhost:x", "[::1", "::1", "0.0.0.0", "[::ffff:8.8.8.8]", "localhost/../x", None]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("host", HOSTS)
def test_a_foreign_host_is_refused_on_every_path(host, path):
    with pytest.raises(Refused) as caught:
        ask(host=host, path=path)
    assert caught.value.status in (400, 403) and caught.value.code == "invalid_host"


def test_two_hosts_are_none():
    with pytest.raises(Refused):
        check("GET", "/health", [(b"host", b"localhost"), (b"Host", b"evil.com")], LOCAL)


@given(st.text(st.characters(max_codepoint=255)))
def test_any_host_is_answered_or_refused(host):
    try:
        ask(host=host)
    except Refused as error:
        assert error.status in (400, 403) and len(error.message) < 300


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.com"}, {"origin": "null"}, {"origin": "http://127.0.0.1:9999"}, {"origin": "http://localhost:8000"}, {"origin": ""},
        {"origin": "file://"}, {"origin": "http://["}, {"sec_fetch_site": "cross-site"}, {"sec_fetch_site": "same-site"}, {"sec_fetch_site": "?"},
        {"origin": "chrome-extension://abc"},
    ],
    ids=str,
)  # fmt: skip
def test_pages_of_other_origins_are_refused_on_every_path(headers, path):
    for method in ("GET", "POST", "OPTIONS"):
        with pytest.raises(Refused) as caught:
            ask(method=method, path=path, content_type="application/json", **headers)
        assert (caught.value.status, caught.value.code) == (403, "invalid_origin")


def test_a_page_of_this_server_is_answered():
    ask(origin="http://127.0.0.1:8000", sec_fetch_site="same-origin")
    ask(sec_fetch_site="none")


def test_with_a_key_everything_but_health_needs_it():
    policy = Policy.of("0.0.0.0", "secret-1")
    ask(policy, path="/health")
    ask(policy, authorization="Bearer secret-1")
    ask(policy, authorization="bearer  secret-1")
    for path in PATHS:
        for wrong in ({}, {"authorization": "Bearer secret-2"}, {"authorization": "secret-1"}, {"authorization": "Basic secret-1"},
                      {"authorization": "Bearer"}, {"authorization": "Bearer \xff"}):  # fmt: skip
            if path != "/health":
                with pytest.raises(Refused) as caught:
                    ask(policy, path=path, **wrong)
                assert caught.value.status == 401 and caught.value.headers["WWW-Authenticate"] == "Bearer"
                assert "secret" not in str(caught.value.body())


def test_without_a_key_any_is_taken():
    ask(authorization="Bearer whatever")


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "8.8.8.8", "example.org", "127.0.0.1.nip.io"])
def test_an_open_address_needs_a_key(host):
    assert not is_loopback(host)
    with pytest.raises(UserError, match="--api-key"):
        Policy.of(host, None)
    Policy.of(host, "key")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "[::1]", "localhost", "127.9.9.9"])
def test_loopback_needs_none(host):
    assert is_loopback(host) and Policy.of(host, None).key is None


@pytest.mark.parametrize("key", ["", " ", "a b", "a\n", "\u00e9", "x" * 2000])
def test_a_key_that_no_header_can_hold_is_refused(key):
    with pytest.raises(UserError, match="ASCII"):
        Policy.of("0.0.0.0", key)


def test_an_open_address_is_asked_for_by_address_or_by_a_name_that_was_allowed():
    policy = Policy.of("0.0.0.0", "k", names=["Models.example.org"])
    for host in ("192.168.1.5:8000", "models.example.org", "[2001:db8::1]", "localhost"):
        ask(policy, host=host, authorization="Bearer k")
    with pytest.raises(Refused):
        ask(policy, host="evil.com", authorization="Bearer k")
    with pytest.raises(Refused):
        ask(Policy.of("192.168.1.5", "k"), host="192.168.1.6", authorization="Bearer k")


FORMS = ("application/x-www-form-urlencoded", "multipart/form-data; boundary=x")


@pytest.mark.parametrize("kind", [None, "", "text/plain", *FORMS, "application/jsonx", "application/json; charset=utf-16"])
def test_a_body_must_say_that_it_is_json(kind):
    with pytest.raises(Refused) as caught:
        ask(method="POST", **({} if kind is None else {"content_type": kind}))
    assert caught.value.status == 415
    for good in ("application/json", "application/json; charset=utf-8", 'Application/JSON;charset="UTF-8"'):
        ask(method="POST", content_type=good)
    with pytest.raises(Refused):
        ask(method="POST", content_type="application/json", content_encoding="gzip")


def body(chunks, most=100, headers=(), seconds=30.0, pause=0.0):
    """What read_body makes of chunks as they arrive, and how many of them it took."""
    left = list(chunks)

    async def receive():
        await asyncio.sleep(pause)
        if not left:
            await asyncio.sleep(1000)
        each = left.pop(0)
        return {"type": "http.disconnect"} if each is None else {"type": "http.request", "body": each, "more_body": bool(left)}

    try:
        return asyncio.run(read_body({"headers": list(headers)}, receive, most, seconds)), len(left)
    except Refused as error:
        return error, len(left)


def test_bodies_are_read_up_to_their_limit():
    assert body([b"a" * 60, b"b" * 40]) == (b"a" * 60 + b"b" * 40, 0)
    error, left = body([b"a" * 60, b"b" * 41])
    assert error.status == 413 and "100 bytes" in error.message and not left


def test_a_body_that_is_announced_as_too_long_is_not_waited_for():
    for headers in ([(b"content-length", b"101"), (b"expect", b"100-continue")], [(b"content-length", b"9" * 19)]):
        error, left = body([b"a"], headers=headers)
        assert error.status == 413 and left == 1
    error, left = body([b"a" * 50, b"b" * 51], headers=[(b"content-length", b"101")])
    assert error.status == 413 and left == 0  # taken and thrown away, so that the client hears the answer


def test_a_body_that_never_ends_is_given_up():
    error, _ = body([b"a", b""] + [b"b"] * 1000, seconds=0.2, pause=0.05)
    assert error.status == 408
    error, left = body([b"a" * (1 << 20)] * 100)
    assert error.status == 413 and left > 0


def test_a_client_that_leaves_is_told_apart_from_a_short_body():
    with pytest.raises(ClientGone):
        body([b"a", None])
