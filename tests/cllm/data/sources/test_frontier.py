"""The frontier: breadth first, the same order whatever arrives when, and after a kill as it was at the last commit."""

import hashlib
import os
import random
import subprocess
import sys
import time

import pytest

from cllm.data.sources import frontier as states
from cllm.data.sources.frontier import AGAIN, DAY, DONE, FAILED, LEFT_OUT, NEW, PAGE, open_frontier
from cllm.data.sources.politeness import Schedule, back_off, pause_of
from cllm.data.sources.traps import FREE, Novelty, prefix_name, surplus
from cllm.runtime.errors import DataError

HOST = "http://a.example"


def key(url):
    return hashlib.blake2b(url.encode(), digest_size=16).digest()


def add(frontier, url, depth=0, rank=None, site=HOST, prefix="/"):
    place = frontier.site(site)
    frontier.add(url, key(url), place, frontier.prefix(place, prefix), kind=PAGE, depth=depth, hops=0, rank=depth if rank is None else rank)


def drain(frontier, site=HOST):
    taken = []
    while entry := frontier.take(frontier.site(site)):
        taken.append(entry.url)
    return taken


def store(frontier, entry, now=1000.0, digest=None):
    digest = digest or key(entry.url)
    frontier.stored(entry, now, status=200, etag='"1"', last_modified=None, digest=digest, reason="")


@pytest.fixture
def frontier(tmp_path):
    opened = open_frontier(tmp_path / "crawl.sqlite")
    yield opened
    opened.close()


def test_pages_come_breadth_first_and_in_the_same_order_however_they_arrive(tmp_path):
    pages = [(f"{HOST}/{i}", i % 4) for i in range(40)]
    orders = []
    for seed in range(3):
        random.Random(seed).shuffle(pages)
        frontier = open_frontier(tmp_path / f"{seed}.sqlite")
        for url, depth in pages:
            add(frontier, url, depth)
        orders.append(drain(frontier))
    depths = dict(pages)
    assert orders[0] == orders[1] == orders[2] and len(orders[0]) == 40
    assert [depths[url] for url in orders[0]] == sorted(depths.values())


def test_a_url_is_known_once_found_also_after_the_memory_of_recent_ones_is_full(frontier, monkeypatch):
    monkeypatch.setattr(states, "_REMEMBERED", 3)
    for i in range(20):
        assert not frontier.is_known(key(f"{HOST}/{i}"))
        add(frontier, f"{HOST}/{i}")
        frontier.commit()
    assert all(frontier.is_known(key(f"{HOST}/{i}")) for i in range(20))
    assert frontier.counts[NEW] == frontier.site(HOST).new == 20


def test_what_was_in_flight_and_what_waited_is_there_after_a_kill(tmp_path):
    path = tmp_path / "crawl.sqlite"
    script = f"""
import os, signal, sys
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_frontier import *
frontier = open_frontier({str(path)!r} and __import__("pathlib").Path({str(path)!r}))
for i in range(10): add(frontier, f"{{HOST}}/{{i}}")
site = frontier.site(HOST)
done, wait, flight = (frontier.take(site) for _ in range(3))
store(frontier, done)
frontier.retry(wait, 50.0, "timeout")
frontier.commit()
lost = frontier.take(site)
store(frontier, lost)
os.kill(os.getpid(), signal.SIGKILL)
"""
    assert subprocess.run([sys.executable, "-c", script]).returncode == -9
    frontier = open_frontier(path, pause_until=77.0)
    assert frontier.pages == 1 and frontier.site(HOST).new == 8 and len(frontier.waiting) == 1
    assert frontier.site(HOST).ready_at == 77.0
    frontier.wake(49.0)
    assert frontier.site(HOST).new == 8
    frontier.wake(50.0)
    assert len(drain(frontier)) == 9
    assert frontier.sql.execute("PRAGMA integrity_check").fetchone() == ("ok",)


def test_a_page_is_due_the_earlier_the_more_often_it_changes(frontier):
    for name in ("changes", "stays", "gone"):
        add(frontier, f"{HOST}/{name}")
    site = frontier.site(HOST)
    for entry in [frontier.take(site) for _ in range(3)]:
        if entry.url.endswith("gone"):
            frontier.finish(entry, FAILED, "404", 0.5, status=404)
        else:
            store(frontier, entry, now=0.5)
    assert frontier.next_due(DAY) == DAY + 0.5
    assert frontier.due_again(DAY, DAY) == 0 and frontier.due_again(DAY + 1, DAY) == 3
    assert (site.again, site.new) == (2, 1)
    for _ in range(2):
        entry = frontier.take(site, new=False)
        assert entry.etag == '"1"' and entry.stored == 1 and entry.state == AGAIN
        if entry.url.endswith("changes"):
            store(frontier, entry, now=DAY, digest=b"another" + bytes(9))
        else:
            frontier.finish(entry, DONE, "", DAY, status=304, pace=entry.pace + 1)
    assert frontier.take(site, new=False) is None
    assert frontier.due_again(1.5 * DAY, DAY) == 1 and frontier.take(site).url.endswith("changes")
    assert frontier.pages == 2


def test_a_closed_prefix_leaves_out_its_queue_and_nothing_else(frontier):
    for i in range(5):
        add(frontier, f"{HOST}/trap/{i}", prefix="/trap")
        add(frontier, f"{HOST}/good/{i}", prefix="/good")
    site = frontier.site(HOST)
    assert frontier.close_prefix(frontier.prefix(site, "/trap"), "nothing new") == 5
    assert frontier.counts[LEFT_OUT] == 5 and site.new == frontier.counts[NEW] == 5
    assert all("/good/" in url for url in drain(frontier))


def test_the_same_bytes_are_found_under_their_first_url(frontier):
    add(frontier, f"{HOST}/1")
    entry = frontier.take(frontier.site(HOST))
    assert frontier.with_digest(b"d" * 16) is None
    store(frontier, entry, digest=b"d" * 16)
    assert frontier.with_digest(b"d" * 16) == f"{HOST}/1"


@pytest.mark.parametrize("content", [b"no database, but long enough to be one" * 40, b"SQLite format 3\0" + bytes(4000)])
def test_a_damaged_database_is_one_line_that_says_what_is_whole(tmp_path, content):
    (tmp_path / "crawl.sqlite").write_bytes(content)
    with pytest.raises(DataError, match=r"segments in pages/ are whole"):
        open_frontier(tmp_path / "crawl.sqlite")


def test_a_database_of_a_later_version_is_refused(tmp_path):
    frontier = open_frontier(tmp_path / "crawl.sqlite")
    frontier.sql.execute("COMMIT")
    frontier.sql.execute("PRAGMA user_version = 9")
    frontier.close()
    with pytest.raises(DataError, match="version 9"):
        open_frontier(tmp_path / "crawl.sqlite")


# -- politeness ----------------------------------------------------------------------------------------------------------------


def sites(frontier, addresses):
    made = []
    for i, address in enumerate(addresses):
        site = frontier.site(f"http://{i}.example")
        site.address = address
        made.append(site)
    return made


def test_one_request_in_flight_for_each_address_and_a_pause_after_it(frontier):
    a, b, c = sites(frontier, ["1.1.1.1", "1.1.1.1", "2.2.2.2"])
    schedule = Schedule()
    for site in (a, b, c):
        schedule.push(site)
    first, second = schedule.pop(0.0), schedule.pop(0.0)
    assert {first.address, second.address} == {"1.1.1.1", "2.2.2.2"} and schedule.pop(0.0) is None
    shared = first if first.address == "1.1.1.1" else second
    schedule.done(shared, 10.0)
    assert schedule.pop(9.9) is None and schedule.next_time() == 10.0
    assert schedule.pop(10.0) is ({a.id: b, b.id: a}[shared.id])


def test_a_site_that_backs_off_does_not_hold_up_another_at_its_address(frontier):
    a, b = sites(frontier, ["1.1.1.1", "1.1.1.1"])
    a.ready_at = 1000.0
    schedule = Schedule()
    schedule.push(a)
    schedule.push(b)
    assert schedule.pop(0.0) is b
    schedule.done(b, 1.0)
    assert schedule.pop(999.0) is None and schedule.pop(1000.0) is a


def test_a_site_that_is_put_off_while_it_is_queued_is_not_asked_before(frontier):
    (a,) = sites(frontier, ["1.1.1.1"])
    schedule = Schedule()
    schedule.push(a)
    assert schedule.pop(0.0) is a
    schedule.push(a)  # a link to it was found meanwhile
    a.ready_at = 500.0
    schedule.done(a, 2.0)
    assert schedule.pop(499.0) is None and schedule.next_time() == 500.0 and schedule.pop(500.0) is a


def test_the_pause_is_never_shorter_than_the_delay_and_the_same_for_a_url():
    pauses = [pause_of(2.0, key(str(i))) for i in range(200)]
    assert all(2.0 <= each <= 3.0 for each in pauses) and len(set(pauses)) > 190
    assert pauses == [pause_of(2.0, key(str(i))) for i in range(200)]


def test_backing_off_doubles_to_a_limit_and_honours_what_the_server_asks():
    waits = [back_off(1.0, failures, None) for failures in range(1, 30)]
    assert waits[:3] == [2.0, 4.0, 8.0] and waits == sorted(waits) and waits[-1] == 600.0
    assert back_off(1.0, 1, 120.0) == 120.0 and back_off(1.0, 1, 1e12) == 6 * 3600.0


# -- traps ---------------------------------------------------------------------------------------------------------------------


def test_a_page_is_new_by_the_share_of_its_text_that_was_not_seen_numbers_apart():
    text = [f"<p>{'abcdefghij'[i] * 30} and so 7 on</p>" for i in range(10)]
    novelty = Novelty()
    assert novelty.of(1, "".join(text[:8]).encode()) == 1.0
    assert novelty.of(1, "".join(text).encode()) == pytest.approx(0.2, abs=0.01)
    assert novelty.of(2, "".join(text).encode()) == 1.0
    again = Novelty(novelty.save())
    assert again.of(1, "".join(text).replace("so 7 on", "so 2031 on").encode()) == 0.0


@pytest.mark.parametrize("body", [b"<a " + b"x=1 " * 200_000 + b">", b"<" * 500_000, b">" * 500_000, b"a" * 500_000, b"<p>" * 200_000])
def test_no_page_makes_the_search_for_what_is_new_slow(body):
    before = time.process_time()
    Novelty().of(1, body)
    assert time.process_time() - before < 20.0  # a search that is not linear takes minutes


def test_urls_that_begin_alike_are_one_group_and_wait_the_longer_the_more_there_are():
    assert prefix_name("http://a/calendar/2031/05/03?view=day") == "/calendar/#?" and prefix_name("http://a/") == "/"
    waits = [surplus(found) for found in range(2000)]
    assert waits[:FREE] == [0] * FREE and waits == sorted(waits) and waits[-1] == 6


def test_the_database_itself_is_not_written_at_every_commit(frontier, tmp_path):
    size = os.path.getsize(tmp_path / "crawl.sqlite")
    for number in range(6000):
        add(frontier, f"{HOST}/{number}")
        if number % 100 == 0:
            frontier.commit()
    assert os.path.getsize(tmp_path / "crawl.sqlite") == size
    assert os.path.getsize(tmp_path / "crawl.sqlite-wal") > 4 << 20
