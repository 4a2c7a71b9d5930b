"""Segments: every record is readable where it lies, what was not committed is cut off, and what is sealed never changes."""

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.data.sources.store import Store, info_record, response_record, revisit_record
from cllm.runtime.errors import DataError

fastwarc = pytest.importorskip("fastwarc", reason="another program's reader of WARC, of the extra [data]")


def records(content):
    stream = fastwarc.ArchiveIterator(io.BytesIO(content), parse_http=True)
    return [
        (each.headers["WARC-Type"], each.headers.get("WARC-Target-URI"), each.http_headers and each.http_headers.status_code, each.reader.read())
        for each in stream
    ]


HEADERS = [(b"Content-Type", b"text/html; charset=utf-8"), (b"Content-Encoding", b"gzip"), (b"Transfer-Encoding", b"chunked"), (b"ETag", b'"x"')]


def test_another_programs_reader_finds_the_pages_as_they_were():
    content = (
        info_record(0, 0.0, "cllm")
        + response_record("http://a/1", 5.0, 200, HEADERS, b"<p>one")
        + revisit_record("http://a/2", 6.0, 200, HEADERS, b"<p>one", "http://a/1")
    )
    kinds, urls, statuses, bodies = zip(*records(content))
    assert kinds == ("warcinfo", "response", "revisit") and urls[1:] == ("http://a/1", "http://a/2")
    assert statuses[1:] == (200, 200) and bodies[1:] == (b"<p>one", b"")


def test_the_digests_are_those_of_the_bytes():
    content = response_record("http://a/1", 5.0, 200, HEADERS, b"text " * 1000)
    record = next(fastwarc.ArchiveIterator(io.BytesIO(content), parse_http=False))
    assert record.verify_block_digest()
    record = next(fastwarc.ArchiveIterator(io.BytesIO(content), parse_http=True))
    assert record.verify_payload_digest()
    assert record.http_headers.get("Content-Encoding") is None and record.http_headers.get("Content-Length") == "5000"
    assert record.http_headers.get("ETag") == '"x"'


@given(st.text(max_size=40), st.binary(max_size=40), st.binary(max_size=40), st.binary(max_size=200))
def test_nothing_from_outside_adds_a_header_or_ends_a_record(url, name, value, body):
    content = response_record("http://a/" + url, 5.0, 200, [(name, value), (b"X-Last", b"1")], body)
    (found,) = records(content + content)[:1]
    assert len(records(content + content)) == 2 and found[0] == "response" and found[3] == body
    assert found[1].startswith("http://a/") and found[1].isascii() and found[1].isprintable()


def test_what_was_not_committed_is_cut_off(tmp_path):
    store = Store(tmp_path, 0, 0)
    one, two = (response_record(f"http://a/{i}", 5.0, 200, HEADERS, b"x" * 500) for i in range(2))
    store.append([one])
    committed = store.size
    store.append([two])
    store._file.write(b"half a record")
    store.close()
    store = Store(tmp_path, 0, committed)
    assert store.size == committed and store.open_path(0).read_bytes() == one
    store.append([two])
    assert [each[1] for each in records(store.open_path(0).read_bytes())] == ["http://a/0", "http://a/1"]


def test_a_sealed_segment_gets_its_name_also_when_the_crawl_was_killed_before(tmp_path):
    store = Store(tmp_path, 0, 0)
    store.append([b"first"])
    store.next_segment()
    assert store.sealed_path(0).read_bytes() == b"first" and not store.open_path(0).exists()
    store.append([b"second, and a part that nobody has counted"])
    store.close()
    store = Store(tmp_path, 2, 0, sealed=[(0, 5), (1, 6)])
    assert store.sealed_path(1).read_bytes() == b"second" and store.sealed_path(0).read_bytes() == b"first"
    store.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000000.warc.gz", "000001.warc.gz"]


def test_pages_that_are_gone_are_not_taken_for_stored(tmp_path):
    store = Store(tmp_path, 0, 0)
    store.append([b"four"])
    store.close()
    with pytest.raises(DataError, match="is shorter"):
        Store(tmp_path, 0, 5)
    store.open_path(0).unlink()
    with pytest.raises(DataError, match="is not there"):
        Store(tmp_path, 0, 4)


def test_a_full_disk_takes_back_what_it_did_not_finish(tmp_path, monkeypatch):
    store = Store(tmp_path, 0, 0)
    store.append([b"whole"])

    class Full:
        def __init__(self, file):
            self.file = file

        def write(self, content):
            self.file.write(content[:3])
            raise OSError(28, "No space left on device")

        def __getattr__(self, name):
            return getattr(self.file, name)

    store._file = Full(store._file)
    with pytest.raises(DataError, match="the disk is full"):
        store.append([b"another"])
    assert store.open_path(0).read_bytes() == b"whole" and store.size == 5
