"""Pages hear everything once, whenever they come and go, and each file has one reader."""

import asyncio
import json
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.app import live as live_module
from cllm.app.live import Live, changes
from cllm.app.tail import Tail
from cllm.serve.errors import Refused


@pytest.fixture
def live(monkeypatch):
    monkeypatch.setattr(live_module, "PERIOD", 0.005)
    found = Live(lambda *a, **k: pytest.fail(f"an error of a source: {a} {k}"))
    yield found
    found.close()


class Counter:
    """A source that tells numbers as they are put in."""

    def __init__(self, kind="run"):
        self.kind, self.waiting, self.asked, self.made = kind, [], 0, 0

    def __call__(self, name):
        self.made += 1

        def look():
            self.asked += 1
            found, self.waiting = self.waiting, []
            return [{"kind": self.kind, "number": each} for each in found]

        return look


def events(part):
    """What a part of a stream tells, each with its id."""
    blocks = [block.splitlines() for block in part.decode().split("\n\n")]
    told = [dict(line.split(": ", 1) for line in block if not line.startswith((":", "retry"))) for block in blocks]
    return [(each["id"], json.loads(each["data"])) for each in told if "data" in each]


async def kept(live, number):
    """Returns once the event with this number is the newest that is kept: what a source has given is not kept yet."""
    while not live._entries or json.loads(live._entries[-1].data).get("number") != number:
        await asyncio.sleep(0.005)


async def read(stream, until):
    """The events of a stream, each with its id, until one satisfies `until`."""
    found = []
    async for part in stream:
        found += events(part)
        if found and until(found[-1][1]):
            break
    await stream.aclose()
    return found


def test_a_page_that_comes_back_has_missed_nothing_and_hears_nothing_twice(live):
    source = Counter()
    live.register("run", source)

    async def work():
        heard, last, sent = [], None, 0
        for size in (1, 5, 2, 30, 1, 7):
            stream = live.listen(["run:a"], last)
            first = await anext(stream)
            assert first.startswith(b"retry")
            source.waiting = list(range(sent, sent + size))
            sent += size
            found = await read(stream, lambda event, end=sent - 1: event.get("number") == end)
            heard += [event["number"] for _, event in found]
            last = found[-1][0]
            source.waiting = list(range(sent, sent + 3))  # while nobody listens
            sent += 3
            while source.waiting:
                await asyncio.sleep(0.005)
        found = await read(live.listen(["run:a"], last), lambda event: event.get("number") == sent - 1)
        assert heard + [event["number"] for _, event in found] == list(range(sent))

    asyncio.run(work())
    assert source.made == 1


def test_twenty_pages_share_one_reader(live):
    source = Counter()
    live.register("run", source)

    async def work():
        streams = [live.listen(["run:a"], None) for _ in range(20)]
        for each in streams:
            await anext(each)
        source.waiting = [1, 2, 3]
        heard = await asyncio.gather(*(read(each, lambda event: event["number"] == 3) for each in streams))
        assert all([event["number"] for _, event in each] == [1, 2, 3] for each in heard)

    asyncio.run(work())
    assert source.made == 1


def test_a_slow_page_is_told_to_fetch_again_and_holds_no_queue(live, monkeypatch):
    monkeypatch.setattr(live_module, "MOST_KEPT", 10)
    source, other = Counter(), Counter()
    live.register("run", source)
    live.register("log", other)

    async def work():
        stream = live.listen(["run:a", "log:b"], None)
        await anext(stream)
        other.waiting = ["kept?"]
        await kept(live, "kept?")
        for batch in range(20):
            source.waiting = [batch * 5 + each for each in range(5)]
            await kept(live, batch * 5 + 4)
        resets = events(await anext(stream))  # and nothing of what is kept still, which is fetched again too
        assert [event for _, event in resets] == [{"topic": topic, "kind": "reset"} for topic in ("run:a", "log:b")]
        assert len(live._entries) <= 10
        source.waiting = ["last"]
        found = [event for _, event in await read(stream, lambda event: True)]
        assert [(event["topic"], event["number"]) for event in found] == [("run:a", "last")]

    asyncio.run(work())


def test_a_list_is_sent_once_however_often_it_changed(live):
    source = Counter("jobs")
    live.register("jobs", source)

    async def work():
        stream = live.listen(["jobs"], None)
        await anext(stream)
        for number in range(50):
            source.waiting = [number]
            while source.waiting:
                await asyncio.sleep(0.002)
        await kept(live, 49)
        found = await read(stream, lambda event: event["number"] == 49)
        assert [event["number"] for _, event in found] == [49]

    asyncio.run(work())


def test_an_id_of_another_start_or_of_nonsense_means_fetching_again(live):
    live.register("run", Counter())

    async def work():
        for last in ("00000000-5", "x", f"{live.epoch}-999999", f"{live.epoch}--1", f"{live.epoch}-\u00b2", "-", "a" * 10_000):
            found = await read(live.listen(["run:a"], last), lambda event: True)
            assert found[0][1] == {"topic": "run:a", "kind": "reset"}, last

    asyncio.run(work())


def test_a_topic_that_nobody_heard_for_long_is_read_no_more_and_resets(live, monkeypatch):
    monkeypatch.setattr(live_module, "LINGER", 0.02)
    source = Counter()
    live.register("run", source)

    async def work():
        stream = live.listen(["run:a"], None)
        await anext(stream)
        source.waiting = [1]
        last = (await read(stream, lambda event: True))[-1][0]
        while "run:a" in live._topics:
            await asyncio.sleep(0.005)
        asked = source.asked
        await asyncio.sleep(0.05)
        assert source.asked == asked
        found = await read(live.listen(["run:a"], last), lambda event: True)
        assert found[0][1]["kind"] == "reset" and source.made == 2

    asyncio.run(work())


def test_topics_that_there_are_not_are_refused(live):
    live.register("run", Counter())
    for topics in ([], ["no"], ["no:such"], ["run:a", "x:y"], [f"run:{n}" for n in range(65)]):
        with pytest.raises(Refused) as caught:
            live.check(topics)
        assert caught.value.param == "topics"


def test_a_source_that_fails_keeps_nobody_else_from_hearing(monkeypatch):
    monkeypatch.setattr(live_module, "PERIOD", 0.005)
    told = []
    live, source = Live(lambda *a, **k: told.append(k["message"])), Counter()

    def broken():
        raise OSError("the disk is gone")

    live.register("bad", lambda name: broken)
    live.register("run", source)

    async def work():
        stream = live.listen(["bad:x", "run:a"], None)
        await anext(stream)
        source.waiting = [1]
        await read(stream, lambda event: event["number"] == 1)

    asyncio.run(work())
    live.close()
    assert "OSError: the disk is gone" in told


def test_what_is_watched_tells_only_of_changes(monkeypatch):
    state, now = [1], [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    look = changes(lambda: state[0], 1.0, lambda value: {"kind": "runs", "value": value})
    assert look() == []
    state[0] = 2
    assert look() == []  # not asked again so soon
    now[0] = 1.0
    assert look() == [{"kind": "runs", "value": 2}] and look() == []


# -- the end of a file ------------------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.lists(st.binary(max_size=30) | st.just(b"\n") | st.text(max_size=10).map(str.encode), max_size=12), st.booleans())
def test_a_tail_gives_every_byte_once(parts, lines):
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x"
        tail, found = Tail(path, lines=lines), b""
        for part in parts:
            with open(path, "ab") as file:
                file.write(part)
            new = tail.new()
            assert new is not None
            found += new
            if lines:
                assert new == b"" or new.endswith(b"\n")
        found += tail.new() or b""
        everything = b"".join(parts)
        assert everything.startswith(found)
        assert (len(found) == (everything.rfind(b"\n") + 1 if lines else len(found)) and len(everything) - len(found) < 4) or lines


def test_text_is_cut_between_characters(tmp_path):
    path = tmp_path / "x"
    tail, text, found = Tail(path, lines=False), "aé€\U0001f600b" * 3, []
    for byte in text.encode():
        with open(path, "ab") as file:
            file.write(bytes([byte]))
        found.append(tail.new().decode())  # strictly
    assert "".join(found) == text


def test_a_file_that_was_cut_back_or_replaced_is_told_from_one_that_grew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {n}}}\n' for n in range(100)))
    tail = Tail(path, lines=True)
    assert tail.new() == b""
    content = path.read_bytes()
    path.write_bytes(content[:500])
    assert tail.new() is None and tail.new() == b""
    path.write_bytes(content[:500] + b'{"step": "other"}\n' * 20)  # cut back and longer again between two looks, in the same file
    assert tail.new() is not None
    path.write_bytes(content[:200] + b'{"other": "branch"}\n' * 60)
    assert tail.new() is None
    beside = tmp_path / "new"
    beside.write_bytes(path.read_bytes() + b"{}\n")
    beside.replace(path)
    assert tail.new() is None
    path.unlink()
    assert tail.new() is None and tail.new() == b""
