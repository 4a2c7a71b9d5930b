"""The whole crawler over every kind of hostile site: nothing forbidden is reached, no URL is asked for twice, and the good pages come home."""

import pytest
from hostile_sites import KINDS, VAULT, faults, handler, nobody
from web_servers import Web

pytest.importorskip("aiohttp", reason="the crawler's library, of the extra [data]")
pytest.importorskip("protego", reason="reads robots.txt, of the extra [data]")

from cllm.data.sources import politeness
from cllm.data.sources.addresses import Guard
from cllm.data.sources.crawl import Crawl
from cllm.data.sources.settings import Settings, write_settings
from cllm.data.sources.summary import read_summary

PAGES = 60


def crawl(folder, name, monkeypatch):
    """What the servers have to complain about, and how many pages were stored."""
    monkeypatch.setattr(politeness, "SHORTEST_BACK_OFF", 0.01)
    with Web() as web:
        vault = web.site(nobody, VAULT)
        site = web.site(handler(KINDS[name], vault))
        timeout = 1.0 if name in ("slow answers", "robots that never comes") else 30.0
        settings = Settings(seeds=(site.url(),), delay=0.0, timeout=timeout, retries=1, max_bytes=1_000_000, max_pages=PAGES)
        write_settings(folder, settings)
        assert Crawl(folder, settings, Guard([f"{site.address}:{site.port}"])).run()
        return faults(KINDS[name], site, vault), read_summary(folder)[1].pages


# Of a server that answers most requests with broken HTTP the crawler has enough before it has seen all of it; test_fetch.py has each of its answers.
@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(KINDS.keys() - {"broken http"}))
def test_nothing_forbidden_is_reached_and_nothing_good_is_missed(name, tmp_path, monkeypatch):
    found, pages = crawl(tmp_path, name, monkeypatch)
    assert not found
    assert pages <= PAGES and (pages > 0) == bool(KINDS[name].good or KINDS[name].most)
    if name == "pages that ask robots":
        assert pages == 2, "two of the four ask not to be kept"


def test_there_are_enough_kinds():
    assert len(KINDS) >= 30
