"""Data sets and crawls over their routes: what the real commands left, and what may have become of it."""

import os
import shutil
import sqlite3

import pytest

from cllm.app.readers.library import Library
from cllm.data.preparation.manifest import open_prepared
from cllm.data.preparation.rows import read_rows
from cllm.data.sources.settings import CrawlLock
from cllm.serve.errors import Refused

# -- data sets -------------------------------------------------------------------------------------------------------------


def documents(made):
    return [row for place in open_prepared(made / "sets/books").paths() for row in read_rows(place)]


def test_data_sets_are_listed(reader, made):
    (found,) = reader.get("/api/datasets").json
    rows = documents(made)
    assert (found["path"], found["documents"], found["kept"]) == ("sets/books", len(rows), sum(not each["dropped_because"] for each in rows))
    assert found["dropped"] == found["documents"] - found["kept"] and found["bytes"] > 1_000 and found["following"] is None


def test_a_data_set_in_detail(reader, made):
    found = reader.get("/api/datasets/detail", path="sets/books").json
    rows = documents(made)
    assert sum(each["count"] for each in found["reasons"]) == sum(bool(each["dropped_because"]) for each in rows)
    assert found["duplicates"]["exact"] == sum("exact duplicate" in each["dropped_because"] for each in rows) >= 1
    assert [each["language"] for each in found["languages"]] == ["en"] and found["sources"][0]["name"] == "books"
    assert found["kept_chars"] == sum(len(each["text"]) for each in rows if not each["dropped_because"])


@pytest.mark.parametrize("kind", ["kept", "dropped"])
def test_documents_are_shown_page_by_page_and_none_is_lost(reader, made, monkeypatch, kind):
    monkeypatch.setattr("cllm.app.readers.datasets.SHOWN", 2)
    expected = [each for each in documents(made) if bool(each["dropped_because"]) == (kind == "dropped")]
    found = []
    while page := reader.get("/api/datasets/samples", path="sets/books", kind=kind, offset=len(found)).json:
        assert len(page) <= 2
        found += page
    assert [(each["name"], each["text"], each["reason"]) for each in found] == [
        (each["path"], each["text"], each["dropped_because"]) for each in expected
    ]


def test_documents_of_a_reason(reader):
    (reason,) = {each["reason"] for each in reader.get("/api/datasets/detail", path="sets/books").json["reasons"] if "duplicate" in each["reason"]}
    found = reader.get("/api/datasets/samples", path="sets/books", kind="dropped", reason=reason).json
    assert found and all(each["reason"].startswith(reason) for each in found)
    assert reader.get("/api/datasets/samples", path="sets/books", kind="dropped", reason="no such reason").json == []
    assert reader.get("/api/datasets/samples", path="sets/books", offset=10_000).json == []


DAMAGE = {
    "mark": lambda folder: (folder / "prepared.json").write_text("{"),
    "mark of other types": lambda folder: (folder / "prepared.json").write_text('{"format": "cllm-prepared", "tally": 5}'),
    "tally of other types": lambda folder: (folder / "prepared.json").write_text('{"format": "cllm-prepared", "tally": {"sources": {"a": 1}}}'),
    "no manifest": lambda folder: (folder / "manifest.jsonl").unlink(),
    "manifest": lambda folder: (folder / "manifest.jsonl").write_text('{"name": 1}\n{"run": 1}\n'),
    "manifest that leads out": lambda folder: (folder / "manifest.jsonl").write_text(
        '{"name": "kept/../../../../secret.parquet", "rows": 1, "bytes": 1, "blake2b": "", "content": ""}\n{"run": 1}\n'
    ),
    "shards": lambda folder: [each.write_bytes(b"PAR1" + bytes(50)) for each in folder.glob("*/*.parquet")],
    "no shards": lambda folder: [each.unlink() for each in folder.glob("*/*.parquet")],
    "ledger": lambda folder: [each.write_text("[]") for each in folder.glob(".ledger/clean/*.json")],
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_data_set_is_told_of(client, workspace, damage):
    shutil.copytree(workspace / "sets/books", workspace / "sets/good")
    damage(workspace / "sets/books")
    listed = {each["path"]: each for each in client.get("/api/datasets").json}
    assert listed["sets/good"]["damaged"] is None and "sets/books" in listed
    for route in ("detail", "samples"):
        found = client.get(f"/api/datasets/{route}", path="sets/books")
        assert found.status in (200, 400), found.content
    assert client.get("/api/datasets/detail", path="books").status == 400


def test_files_of_a_data_set_that_are_links_out_are_not_read(client, workspace, tmp_path):
    for name in ("prepared.json", "kept/000000.parquet"):
        place = workspace / "sets/books" / name
        shutil.move(place, tmp_path / place.name)
        place.symlink_to(tmp_path / place.name)
        found = client.get("/api/datasets/samples", path="sets/books")
        assert found.status == 400 and "out of the workspace" in found.message
        place.unlink()
        shutil.move(tmp_path / place.name, place)


# -- crawls ----------------------------------------------------------------------------------------------------------------


def test_crawls_are_listed(reader):
    (found,) = reader.get("/api/crawls").json
    assert (found["path"], found["state"], found["pages"], found["queued"], found["errors"]) == ("pages", "done", 4, 0, 0) and found["bytes"] > 1_000


def test_a_crawl_in_detail(reader):
    found = reader.get("/api/crawls/detail", path="pages").json
    (host,) = found["hosts"]
    assert host["host"].startswith("http://127.0.0.1:") and host["pages"] == 4 and host["queued"] == 0 and found["settings"]["delay"] == 0
    assert len(found["newest"]) == 4 and all(each["status"] == 200 and each["fetched"] > 0 for each in found["newest"])
    article = next(each for each in found["newest"] if each["url"].endswith("/article/0"))
    assert (
        article["title"] == "Article 0"
        and article["text"].startswith("Home\nArticle 0\n")
        and "<p>" not in article["text"]
        and article["bytes"] > 500
    )
    assert found["robots_forbidden"] == {"count": 0, "urls": []} and found["queue"] == [] and "failed" in found["by_reason"]


def test_a_crawl_that_goes_on_says_so(client, workspace):
    with CrawlLock(workspace / "pages"):
        assert client.get("/api/crawls").json[0]["state"] == "running" and client.get("/api/crawls/detail", path="pages").json["state"] == "running"
    assert client.get("/api/crawls").json[0]["state"] == "done"


def test_pages_hear_of_a_crawl_that_goes_on(client, workspace, monkeypatch):
    monkeypatch.setattr("cllm.app.readers.library._CRAWL_SECONDS", 0.0)
    monkeypatch.setattr("cllm.app.readers.crawls._PAUSE", 0.0)
    source = client.app.part(Library).crawl_source("pages")
    list(source())
    executed(workspace / "pages", "UPDATE urls SET state = 1 WHERE url LIKE '%/article/1'")
    (event,) = source()
    assert (event["kind"], event["queued"], event["pages"], event["failed"], event["pages_per_second"]) == ("crawl", 1, 4, 0, 0)
    with pytest.raises(Refused):
        client.app.part(Library).crawl_source("../x")


def test_a_crawl_that_has_just_been_asked_for_is_shown_by_its_job(client, monkeypatch):
    """Its page is opened before its folder stands there; when its job has failed by then, the page can say so."""
    job = {"id": "j1", "command": "crawl", "out": "crawls/a,b", "state": "running"}
    source = client.app.part(Library).crawl_source("crawls/a,b")
    assert list(source()) == []
    assert client.get("/api/crawls/detail", path="crawls/a,b").status == 404
    monkeypatch.setattr(client.app.jobs, "listed", lambda: [job])
    found = client.get("/api/crawls/detail", path="crawls/a,b").json
    assert (found["name"], found["state"], found["job"], found["pages"], found["newest"], found["hosts"]) == ("a,b", "running", "j1", 0, [], [])
    assert found.keys() == client.get("/api/crawls/detail", path="pages").json.keys()
    job["state"] = "failed"
    assert client.get("/api/crawls/detail", path="crawls/a,b").json["state"] == "failed"
    assert client.get("/api/crawls/detail", path="../x").status == 400


def test_what_robots_forbade_and_what_is_queued(client, workspace):
    with sqlite3.connect(workspace / "pages/crawl.sqlite") as sql:
        columns = "key, url, site, prefix, kind, depth, hops, rank, state, reason"
        for number, (state, reason) in enumerate([(6, "robots.txt forbids it"), (1, ""), (5, "refused: 10.0.0.1")]):
            sql.execute(
                f"INSERT INTO urls({columns}) VALUES(?, ?, 1, 1, 0, 1, 0, 8, ?, ?)", (bytes([number] * 16), f"http://x/{number}", state, reason)
            )
    sql.close()
    found = client.get("/api/crawls/detail", path="pages").json
    assert found["robots_forbidden"] == {"count": 1, "urls": ["http://x/0"]} and found["queue"] == [{"url": "http://x/1", "depth": 1}]
    assert found["errors"] == 1 and found["by_reason"]["failed"] == {"refused": 1} and found["failures"][0]["url"] == "http://x/2"
    assert found["state"] == "paused" and found["hosts"][0]["errors"] == 1


def executed(folder, script):
    with sqlite3.connect(folder / "crawl.sqlite") as sql:
        sql.executescript(script)
    sql.close()


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT"
CRAWL_DAMAGE = {
    "no database": lambda folder: (folder / "crawl.sqlite").write_bytes(b""),
    "a database of another kind": lambda folder: (folder / "crawl.sqlite").write_bytes(os.urandom(10_000)),
    "settings": lambda folder: (folder / "crawl.json").write_text("[]"),
    "no tables": lambda folder: executed(folder, "DROP TABLE urls"),
    "an endless view": lambda folder: executed(folder, f"DROP TABLE urls; CREATE VIEW urls AS {ENDLESS} i AS state FROM n"),
    "other types": lambda folder: executed(
        folder, "DROP TABLE sites; CREATE TABLE sites(id, name, ready_at, failures, pages, found, closed);"
        "INSERT INTO sites VALUES(1, x'ff', 'a', NULL, 'x', 1.5, 7)"
    ),
    "pages": lambda folder: [each.write_bytes(b"\x1f\x8b\x08" * 50_000) for each in folder.glob("pages/*")],
    "torn pages": lambda folder: [os.truncate(each, each.stat().st_size // 2) for each in folder.glob("pages/*")],
}  # fmt: skip


@pytest.mark.parametrize("damage", CRAWL_DAMAGE.values(), ids=CRAWL_DAMAGE)
def test_a_damaged_crawl_is_told_of(client, workspace, monkeypatch, damage):
    monkeypatch.setattr("cllm.app.readers.crawls._SECONDS", 0.5)
    damage(workspace / "pages")
    (found,) = client.get("/api/crawls").json
    detail = client.get("/api/crawls/detail", path="pages")
    assert found["path"] == "pages" and detail.status in (200, 400), detail.content
    assert detail.status == 200 or detail.message.endswith(".")
    assert client.get("/api/crawls/detail", path="books").status == 400


def test_hostile_pages_are_text(client, workspace):
    from cllm.app.readers.pages import newest_pages
    from cllm.data.sources.store import response_record

    bodies = [
        b"<title>" + b"<" * 100_000, b"<script>" * 30_000, b"<p" * 100_000, "<title>\u0130</title><script>x</script>text".encode() * 100,
        b"<meta charset=nonsense>\xff\xfe<title>a &lt;b&gt; &#0;</title>&lt;script&gt;", b"\xff" * 1000, b"",
    ]  # fmt: skip
    records = [response_record(f"http://x/{n}", 1.0, 200, [(b"Content-Type", b"text/html; charset=\xff")], each) for n, each in enumerate(bodies)]
    (workspace / "pages/pages/000009.warc.gz").write_bytes(b"".join(records))
    found = newest_pages(workspace / "pages/pages", workspace, 20)
    assert [each.url for each in found[:7]] == [f"http://x/{number}" for number in range(6, -1, -1)]
    assert all(len(each.text) <= 4_000 and len(each.title) <= 300 for each in found)
    assert found[3].text.split() == ["text"] * 100
