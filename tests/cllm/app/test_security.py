"""Nothing of the app is reached without the cookie or the key, from another site, or by a request that only reads."""

import gzip
import json
import os
import time

import pytest
from app_client import KEY, Client
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.app.security import Access, read_secret
from cllm.runtime.errors import UserError
from cllm.serve.safety import Policy

ORIGIN = "http://127.0.0.1:8421"


@pytest.fixture(scope="module")
def client(tmp_path_factory):
    with Client(tmp_path_factory.mktemp("workspace")) as found:
        yield found


def routes(client):
    """(method, path) of everything that the app answers."""
    found = set()

    def walk(scope_routes):
        for each in scope_routes:
            inside = getattr(getattr(each, "original_router", None), "routes", None)
            if inside is not None:
                walk(inside)
            else:
                found.update((method, each.path) for method in each.methods or ())

    walk(client.gate.app.routes)
    return sorted(found)


def cookie_of(client, query=None, **headers):
    answer = client.ask("GET", "/", query, known=False, headers=list(headers.items()))
    return answer, answer.headers.get("set-cookie", "").partition(";")[0]


def test_the_token_becomes_a_cookie_and_leaves_the_address(client):
    answer, cookie = cookie_of(client, {"token": client.access.token})
    assert (answer.status, answer.headers["location"], answer.content) == (303, "/", b"")
    assert answer.headers["set-cookie"].partition(";")[2] == " Max-Age=7776000; Path=/; HttpOnly; SameSite=Strict"
    assert cookie.startswith("cllm_app_8421=") and client.access.token not in answer.headers["set-cookie"]
    page = client.ask("GET", "/", known=False, headers=[("cookie", cookie)])
    assert page.status == 200 and b"js/main.js" in page.content
    assert client.ask("GET", "/api/jobs", known=False, headers=[("cookie", f"a=b; {cookie}; c=d")]).status == 200


def test_without_it_the_first_page_says_where_the_address_is_and_tells_nothing_else(client):
    for query in (None, {"token": "wrong"}, {"token": ""}, {"other": "x"}, {"token": ["a", "b"]}, {"token": "a" * 5000}):
        answer, cookie = cookie_of(client, query)
        assert answer.status == (401 if query and "token" in query else 200) and not cookie
        text = answer.content.decode()
        assert "cllm app" in text and "<script" not in text and "style" not in text and client.app.workspace.name not in text
    twice, cookie = cookie_of(client, {"token": [client.access.token, client.access.token]})
    assert twice.status == 401 and not cookie


def test_every_path_is_closed_without_the_cookie_or_the_key(client):
    paths = {path for _, path in routes(client)} | {
        "/app.css",
        "/js/main.js",
        "/index.html",
        "//",
        "/%2e%2e/x",
        "/favicon.ico",
        "/docs",
        "/openapi.json",
    }
    assert len(paths) > 40
    for path in paths - {"/", "/{path:path}"}:
        for method in ("GET", "HEAD", "POST", "PUT", "DELETE"):
            answer = client.ask(method, path, known=False)
            assert answer.status == 401, (method, path)
            assert method == "HEAD" or answer.json["error"]["code"] == "unauthorized"


@settings(deadline=None, max_examples=60)
@given(st.text(st.characters(codec="ascii", categories=["L", "N", "P", "S"]), max_size=30), st.sampled_from(["GET", "POST", "PUT", "DELETE"]))
def test_no_way_of_writing_a_path_opens_it(client, path, method):
    answer = client.ask(method, f"/{path}", known=False)
    assert answer.status == 401 or (path == "" and method == "GET" and answer.status == 200)


def test_cookies_that_were_not_given_here_open_nothing(client):
    name, now = client.access.cookie_name, int(time.time()) + 1000
    own = client.access.cookie().partition(";")[0]
    other_secret, other_port = Access(b"o" * 32, 8421), Access(b"s" * 32, 9000)
    forged = [
        f"{name}=", f"{name}=1", f"{name}={now}.", f"{name}={now}.{'0' * 64}", own[:-1] + ("0" if own[-1] != "0" else "1"), own.replace("=", "=9"),
        other_secret.cookie().partition(";")[0], other_port.cookie().partition(";")[0].replace("9000", "8421"),
        client.access.cookie(seconds=-5).partition(";")[0], f"{name}={client.access.token}", own.replace(name, "cllm_app_1"), f"{name}=\u00b2.{own}",
    ]  # fmt: skip
    for each in forged:
        assert client.ask("GET", "/api/jobs", known=False, headers=[("cookie", each)]).status == 401, each
    assert client.ask("GET", "/api/jobs", known=False, headers=[("cookie", own)]).status == 200
    assert client.ask("GET", "/api/jobs", known=False, headers=[("cookie", f"{name}=tossed; {own}")]).status == 200


def test_only_the_key_itself_is_the_key(client):
    for given_key, status in [(KEY, 200), (f"{KEY}x", 401), (KEY[:-1], 401), ("", 401), (client.access.token, 401)]:
        assert client.ask("GET", "/api/jobs", known=False, headers=[("authorization", f"Bearer {given_key}")]).status == status
    assert client.ask("GET", "/api/jobs", known=False, headers=[("authorization", f"Basic {KEY}")]).status == 401
    assert client.ask("GET", "/api/jobs", {"token": client.access.token}, known=False).status == 401


@pytest.mark.parametrize("host", ["evil.com", "127.0.0.1.evil.com", "localhost.evil.com:8421", "127.0.0.1@evil.com", "", "0.0.0.0", "10.0.0.7"])
def test_a_foreign_host_is_refused_on_every_path(client, host):
    for path in ("/", "/api/jobs", "/app.css", "/no/such"):
        answer = client.ask("GET", path, {"token": client.access.token} if path == "/" else None, headers=[("host", host)])
        assert answer.status in (400, 403) and "set-cookie" not in answer.headers


@pytest.mark.parametrize(
    "headers",
    [
        [("origin", "http://evil.com")], [("origin", "null")], [("origin", "http://127.0.0.1:9999")], [("origin", "file://")],
        [("sec-fetch-site", "cross-site")], [("sec-fetch-site", "same-site")],
    ],
)  # fmt: skip
def test_a_page_of_another_site_changes_and_reads_nothing(client, headers):
    for method, path in [
        ("POST", "/api/jobs"),
        ("GET", "/api/jobs"),
        ("DELETE", "/api/conversations/x"),
        ("OPTIONS", "/api/jobs"),
        ("GET", "/app.css"),
    ]:
        answer = client.ask(method, path, headers=[*headers, ("sec-fetch-mode", "navigate"), ("sec-fetch-dest", "document")], body={})
        assert answer.status == 403, (method, path)
        assert not [name for name in answer.headers if name.startswith("access-control")]


def test_a_link_to_the_printed_address_may_stand_on_any_page(client):
    click = {"sec-fetch-site": "cross-site", "sec-fetch-mode": "navigate", "sec-fetch-dest": "document"}
    assert cookie_of(client, {"token": client.access.token}, **click)[0].status == 303
    assert b'http-equiv="refresh"' in cookie_of(client, **click)[0].content  # where the browser then shows its cookie
    assert b"refresh" not in cookie_of(client)[0].content
    framed = click | {"sec-fetch-dest": "iframe"}
    assert cookie_of(client, {"token": client.access.token}, **framed)[0].status == 403
    assert client.ask("POST", "/", known=True, headers=list(click.items()), body={}).status == 403


@pytest.mark.parametrize(
    "kind", [None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "application/octet-stream"]
)
def test_what_a_form_can_send_changes_nothing(client, kind):
    for method, path in routes(client):
        if method in ("POST", "PUT", "DELETE") and not (path in ("/api/uploads", "/api/models/import") and kind == "application/octet-stream"):
            assert client.ask(method, path, body={}, headers=[("content-type", kind)]).status == 415, path


def test_what_has_no_body_needs_no_kind_and_what_has_one_does(client):
    bare = [("content-type", None), ("content-length", None)]
    assert client.ask("POST", "/api/jobs/j99/stop", headers=bare, pieces=[{"type": "http.request"}]).status == 404
    assert client.ask("POST", "/api/jobs", headers=bare, pieces=[{"type": "http.request"}]).status == 400
    assert client.ask("POST", "/api/jobs/j99/stop", headers=[*bare, ("transfer-encoding", "chunked")]).status == 415
    assert client.ask("POST", "/api/jobs/j99/stop", headers=[*bare, ("origin", "http://evil.com")]).status == 403


def test_reading_changes_nothing(client):
    """Every route by GET, the changing ones too: not one byte of the workspace is another one."""

    def snapshot():
        root = client.app.workspace.root
        return {
            path: path.read_bytes()
            for path in root.rglob("*")
            if path.is_file() and path.name != "app.log" and not path.name.startswith("jobs.sqlite-")
        }

    before = snapshot()
    for _, path in routes(client):
        if path not in ("/api/events", "/api/doctor"):  # a stream, and a process that looks at the machine
            client.ask("GET", path.replace("{identity}", "j1"), {"path": "x", "run": "x", "command": "doctor", "name": "x", "into": "x"})
    assert snapshot() == before and client.get("/api/jobs").json == []


def test_other_methods_are_refused(client):
    for method in ("OPTIONS", "PATCH", "TRACE", "CONNECT", "PROPFIND", "x" * 100):
        assert client.ask(method, "/api/jobs", known=False).status == 401
        answer = client.ask(method, "/api/jobs")
        assert answer.status == 405 and not [name for name in answer.headers if name.startswith("access-control")]


def test_every_answer_has_the_headers_of_the_policy(client):
    for path in ("/", "/api/jobs", "/app.css", "/no/such", "/api/jobs/j99", "/api/events"):
        for known in (True, False):
            if path == "/api/events" and known:
                continue
            headers = client.ask("GET", path, known=known).headers
            policy = headers["content-security-policy"]
            assert "unsafe" not in policy and "*" not in policy and policy.startswith("default-src 'none'; script-src 'self'")
            assert (headers["cache-control"], headers["x-content-type-options"], headers["referrer-policy"]) == ("no-store", "nosniff", "no-referrer")
            assert headers["x-frame-options"] == "DENY" and "server" not in headers


def test_static_files_are_those_of_the_package_alone(client):
    for path in ("/app.css", "/js/main.js", "/index.html"):
        assert client.get(path).status == 200
    for path in (
        "/../state.py",
        "/js/../../security.py",
        "/..%2fstate.py",
        "/%2e%2e/state.py",
        "/js/",
        "/js",
        "/.cllm/secret",
        "//etc/passwd",
        "/a\0b",
    ):
        assert client.get(path).status == 404, path


@pytest.mark.parametrize(
    "accepted, is_compressed",
    [("gzip, deflate, br", True), ("br;q=1.0, gzip;q=0.5", True), ("br", False), ("gzip;q=0, br", False), ("x-gzip", False), ("", False)],
)
def test_static_files_are_compressed_for_browsers_that_take_it(client, accepted, is_compressed):
    plain = client.get("/app.css")
    answer = client.ask("GET", "/app.css", headers=[("accept-encoding", accepted)])
    assert answer.headers["vary"] == "Accept-Encoding" and answer.headers["content-type"] == plain.headers["content-type"]
    assert ("content-encoding" in answer.headers) == is_compressed
    assert (gzip.decompress(answer.content) if is_compressed else answer.content) == plain.content
    assert int(answer.headers["content-length"]) == len(answer.content)


def test_a_topic_may_have_a_comma_in_its_name(client):
    """Each name of `topic` is taken as it is; `topics` holds several with commas in between."""
    assert "'no:a,b'" in client.get("/api/events", topic=["jobs", "no:a,b"]).message
    assert "'no:a'" in client.get("/api/events", topics="jobs,no:a,b").message


def test_neither_token_nor_key_nor_query_stands_in_the_log(client):
    cookie_of(client, {"token": client.access.token})
    client.ask("GET", "/api/jobs", {"secret": "in-the-query"}, known=False)
    client.post("/api/jobs", {"command": "no such", "options": {"text": "in-the-body"}})
    text = (client.app.workspace.state / "logs" / "app.log").read_text()
    assert "/api/jobs" in text and json.dumps(client.app.log.lines())
    for each in (client.access.token, KEY, "in-the-query", "in-the-body"):
        assert each not in text and each not in json.dumps(client.app.log.lines())


def test_a_line_of_the_log_cannot_be_forged(client):
    client.ask("GET", '/x\n{"level": "error"}', known=False)
    lines = (client.app.workspace.state / "logs" / "app.log").read_text().splitlines()
    assert all(json.loads(each)["event"] in ("request", "job", "jobs", "live") for each in lines)


def test_an_open_address_needs_a_key():
    with pytest.raises(UserError, match="--api-key"):
        Policy.of("0.0.0.0", None)


def test_the_secret_is_the_users_alone_and_no_link(tmp_path):
    place = tmp_path / "secret"
    found = read_secret(place)
    assert len(found) == 32 and read_secret(place) == found and place.stat().st_mode & 0o777 == 0o600
    place.write_bytes(b"short")
    with pytest.raises(UserError, match="damaged"):
        read_secret(place)
    place.unlink()
    place.symlink_to(os.devnull)
    with pytest.raises(UserError, match="Remove that file"):
        read_secret(place)
