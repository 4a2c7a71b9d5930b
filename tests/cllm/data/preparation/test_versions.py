"""Of a page that changed, the newest version is kept: a site that changes, the real crawler, and documents prepared from what it stored."""

import random
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from threading import Thread

import numpy as np
import pytest
from here import Here
from made import edited, prose, recipe

pytest.importorskip("pyarrow", reason="the data extra is not installed")
pytest.importorskip("aiohttp", reason="the crawler's library, of the extra [data]")

from cllm.data.preparation import versions
from cllm.data.preparation.plan import prepare
from cllm.data.preparation.rows import read_rows
from cllm.data.sources.addresses import Guard
from cllm.data.sources.crawl import Crawl
from cllm.data.sources.settings import Settings, write_settings


class ChangingSite:
    """`texts`: by path, the text of the page that is there now. A page that has not changed is told so (304) to those who ask for that."""

    def __init__(self, texts):
        self.texts = texts
        site = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                text = site.texts.get(self.path)
                if self.path == "/":
                    text = "".join(f'<a href="{path}">{path}</a>' for path in site.texts)
                paragraphs = "".join(f"<p>{each}</p>" for each in (text or "").split("\n\n"))
                body = f"<html><body><article>{paragraphs}</article></body></html>".encode()
                tag = f'"{hash(body)}"'
                status = 404 if text is None else 304 if self.headers.get("If-None-Match") == tag else 200
                self.send_response(status)
                self.send_header("Content-Type", "text/html; charset=utf-8")
                self.send_header("ETag", tag)
                self.end_headers()
                self.wfile.write(body if status == 200 else b"")

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()

    def crawl(self, folder):
        folder.mkdir(exist_ok=True)
        settings = Settings(seeds=(f"{self.url}/",), delay=0.0, revisit=0.0)
        write_settings(folder, settings)
        assert Crawl(folder, settings, Guard(["127.0.0.1"])).run()


def documents(crawled, out, **more):
    """The newest text of each kept page by its path, and the reasons of all others by their texts."""
    prepared = prepare([str(crawled)], out, recipe(**more), Here())
    rows = [row for place in prepared.paths() for row in read_rows(place)]
    kept = [row for row in rows if not row["dropped_because"]]
    return sorted(("/" + row["url"].rpartition("/")[2], row["text"].strip()) for row in kept), {row["text"].strip(): row for row in rows}


def text(number):
    return prose(number).strip()


def test_a_site_that_changes_gives_the_newest_version_of_each_page(tmp_path):
    first = {"/changes": text(1), "/stays": text(2), "/copied": text(3), "/copies": text(4), "/goes": text(5)}
    changed, again, at_last = edited(text(1), 1, 0.02), text(6), text(7)
    with ChangingSite(dict(first)) as site:
        site.crawl(tmp_path / "site")
        assert documents(tmp_path / "site", tmp_path / "out")[0] == sorted(first.items())

        # The new version is nearly the same text, so that by the order of documents it would be dropped as a duplicate of the old one.
        site.texts |= {"/changes": changed, "/copies": text(3)}
        del site.texts["/goes"]
        site.crawl(tmp_path / "site")
        kept, rows = documents(tmp_path / "site", tmp_path / "out")
        assert kept == sorted({"/changes": changed, "/stays": text(2), "/copied": text(3), "/goes": text(5)}.items())
        newest = rows[changed]["id"]
        assert rows[text(1)]["dropped_because"].startswith("older version of a page: the newest was fetched at 20")
        assert rows[text(1)]["dropped_because"].endswith(f" UTC, and it is {newest}")
        assert rows[text(4)]["dropped_because"].endswith("and it has the bytes of another page")

        # What /copied had stays, because /copies has it now; until that changes, too.
        site.texts["/copied"] = again
        site.crawl(tmp_path / "site")
        kept, _ = documents(tmp_path / "site", tmp_path / "out")
        assert kept == sorted([("/changes", changed), ("/stays", text(2)), ("/copied", text(3)), ("/copied", again), ("/goes", text(5))])
        site.texts["/copies"] = at_last
        site.crawl(tmp_path / "site")
    newest = sorted({"/changes": changed, "/stays": text(2), "/copied": again, "/copies": at_last, "/goes": text(5)}.items())
    assert documents(tmp_path / "site", tmp_path / "out")[0] == newest
    assert documents(tmp_path / "site", tmp_path / "at once")[0] == newest
    everything, rows = documents(tmp_path / "site", tmp_path / "all", rules={"newest_version": "off", "near_threshold": "off"})
    assert len(everything) == 8 and not any("older" in row["dropped_because"] for row in rows.values())


@pytest.mark.parametrize("parts", [1, 5])
def test_replaced_documents_are_those_that_a_plain_loop_finds(tmp_path, parts):
    draw = random.Random(parts)
    fetched, plain = [versions.Fetched() for _ in range(3)], []
    for number in range(400):
        url, same = f"https://a.example/{draw.randrange(60)}", draw.random() < 0.2 and f"https://a.example/{draw.randrange(60)}"
        second, key = draw.randrange(50), draw.randrange(3) << 32 | number
        same_as = same if same and same != url else ""
        fetched[key >> 32].add(url, f"2026-11-29T10:00:{second:02}Z", key, key, same_as)
        plain.append((url, second, key, same_as))
    inputs = [str(tmp_path / f"{number}.fetched") for number in range(3)]
    for each, place in zip(fetched, inputs):
        each.save(tmp_path / place)
    for part in range(parts):
        versions.outdated(str(tmp_path / f"part{part}"), part, parts, inputs)
    found = versions.replaced(*([str(tmp_path / f"part{part}.{ending}") for part in range(parts)] for ending in ("outdated", "copies")))

    of_page, expected = {}, []
    for each in sorted(plain, key=lambda each: each[1:3]):
        of_page.setdefault(each[0], []).append(each)
    copies = [of_page[url][-1] for url in of_page if of_page[url][-1][3]]
    for fetches in of_page.values():
        for each, following in pairwise(fetches):
            needed = any(copy[3] == each[0] and each[1] <= copy[1] < following[1] for copy in copies)
            if not each[3] and not needed:
                expected.append((each[2], versions.NO_TEXT if fetches[-1][3] else fetches[-1][2]))
    assert found[["key", "winner"]].tolist() == sorted(expected) and len(expected) > 100
    assert np.unique(found["newest"]).size > 5


def test_documents_of_one_fetch_stay_together_and_what_has_no_time_takes_no_part(tmp_path):
    fetched = versions.Fetched()
    for key in (0, 1, 2):
        fetched.add("https://a.example/", "2026-11-29T10:00:00Z", 0, key)
    for key in (3, 4):
        fetched.add("https://a.example/", "2026-11-29T10:00:00.5+00:00", 3, key)
    fetched.add("https://a.example/", "yesterday", 5, 5)
    fetched.add("", "2026-11-29T10:00:01Z", 6, 6)
    fetched.save(tmp_path / "0.fetched")
    versions.outdated(str(tmp_path / "0"), 0, 1, [str(tmp_path / "0.fetched")])
    found = versions.replaced([str(tmp_path / "0.outdated")], [str(tmp_path / "0.copies")])
    assert found[["key", "winner"]].tolist() == [(0, 3), (1, 3), (2, 3)]
