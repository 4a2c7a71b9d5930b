"""Archives are opened as streams: every member is found by name, what is hostile in them costs a row, and nothing is written to the disk."""

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
import zlib

import pytest

from cllm.data.extract import zip_cipher
from cllm.data.extract.members import Again, Member, Refused, members
from cllm.data.extract.options import Options


def zipped(files, method=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def tarred(files, mode="w", kind=tarfile.GNU_FORMAT):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=kind) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def found(tmp_path, content, name="a.zip", options=Options()):
    """({name: content}, {name: reason}) of what is in a file."""
    path = tmp_path / name
    path.write_bytes(content)
    kept, refused = {}, {}
    for member in members(path, name, options):
        if isinstance(member, Refused):
            refused[member.name] = member.reason
        else:
            kept[member.name] = (
                member.source if isinstance(member.source, bytes) else member.source.read() if not hasattr(member.source, "open") else b""
            )
    return kept, refused


FILES = {"b/c.txt": b"some text\n" * 50, "d.py": b"import os\n", "\u00fc/\u65e5.md": b"# words\n"}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_members_of_a_zip_archive(tmp_path, method):
    assert found(tmp_path, zipped(FILES, method)) == ({f"a.zip/{name}": content for name, content in FILES.items()}, {})


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_members_of_a_tar_archive(tmp_path, mode, kind):
    files = {**FILES, "long/" * 18 + "name.txt": b"far down\n"}
    assert found(tmp_path, tarred(files, mode, kind), "a.tar") == ({f"a.tar/{name}": content for name, content in files.items()}, {})


@pytest.mark.parametrize(("pack", "ending"), [(gzip.compress, "gz"), (bz2.compress, "bz2"), (lzma.compress, "xz")])
def test_a_compressed_file_keeps_its_name(tmp_path, pack, ending):
    content = pack(b"one ") + pack(b"two")
    assert found(tmp_path, content, f"a.txt.{ending}") == ({f"a.txt.{ending}": b"one two"}, {})


def test_names_that_point_out_of_the_archive_are_names(tmp_path):
    kept, refused = found(tmp_path, zipped({"../../../etc/passwd": b"root", "/abs/olute.txt": b"x y"}))
    assert kept == {"a.zip/../../../etc/passwd": b"root", "a.zip//abs/olute.txt": b"x y"} and not refused
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.zip"]


def test_a_member_that_unpacks_to_a_hundred_times_its_size_is_refused_and_the_next_one_read(tmp_path):
    kept, refused = found(tmp_path, zipped({"bomb.txt": bytes(40_000_000), "after.txt": b"words"}))
    assert kept == {"a.zip/after.txt": b"words"}
    assert refused["a.zip/bomb.txt"].startswith("too large (a bomb: ")


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_compressed_bomb_ends_when_its_file_has_unpacked_to_a_hundred_times_its_size(tmp_path, pack):
    path = tmp_path / "bomb.txt.x"
    path.write_bytes(pack(bytes(30_000_000)))
    options = Options(small_bytes=1 << 20)
    results = list(members(path, "bomb.txt.gz", options))
    (refused,) = [each for each in results if isinstance(each, Refused)]
    assert refused.reason.startswith("too large (a bomb: ")
    assert sum(len(each.source) for each in results if isinstance(each, Member)) <= max(100 * path.stat().st_size, 1 << 20)


def test_archives_in_archives_share_one_budget(tmp_path):
    """A bomb of many small archives, none of which is a bomb itself."""
    inner = zipped({f"{number}.bin": bytes(3_000_000) for number in range(4)})
    content = zipped({f"{number}.zip": inner for number in range(20)})
    kept, refused = found(tmp_path, content, "a.zip", Options(small_bytes=32 << 20))
    assert refused["a.zip"].startswith("too large (a bomb: ")
    assert len(kept) + len(refused) < 20


def test_archives_are_read_to_a_depth_of_three(tmp_path):
    content = b"deep words"
    for level in range(4, 0, -1):
        content = zipped({f"{level}.zip" if level < 4 else "deep.txt": content})
    # 1.zip/2.zip/3.zip/deep.txt is three archives around a text; one more is too many.
    kept, refused = found(tmp_path, zipped({"top.txt": b"top", "0.zip": content}))
    assert kept == {"a.zip/top.txt": b"top"}
    (reason,) = refused.values()
    assert reason.startswith("nested too deeply")
    assert found(tmp_path, zipfile.ZipFile(io.BytesIO(content)).read("1.zip"))[0] == {"a.zip/2.zip/3.zip/deep.txt": b"deep words"}


def test_members_of_a_zip_archive_may_not_overlap(tmp_path):
    """The bomb of one piece that every entry of the directory points at."""
    content = zipped({f"{number}.txt": b"the same words for all " * 40 for number in range(50)})
    end = content.rindex(b"PK\5\6")
    start = struct.unpack_from("<I", content, end + 16)[0]
    directory = bytearray(content[start:end])
    place = 0
    while place < len(directory):
        struct.pack_into("<I", directory, place + 42, 0)
        place += 46 + sum(struct.unpack_from("<HHH", directory, place + 28))
    kept, refused = found(tmp_path, content[:start] + bytes(directory) + content[end:])
    assert len(kept) <= 1 and len(refused) >= 49
    assert set(refused.values()) == {"damaged (it overlaps another member)"}


def test_a_size_that_lies_costs_its_member(tmp_path):
    content = bytearray(zipped({"a.txt": b"first words", "b.txt": b"second words"}, zipfile.ZIP_STORED))
    start = struct.unpack_from("<I", content, content.rindex(b"PK\5\6") + 16)[0]
    struct.pack_into("<II", content, start + 20, 4, 4_000_000_000)  # of the first member: packed, unpacked
    kept, refused = found(tmp_path, bytes(content))
    assert kept == {"a.zip/b.txt": b"second words"} and refused == {"a.zip/a.txt": "damaged (its checksum is wrong)"}


def encrypted(password):
    """An archive that Python's own reader opens with this password; Python cannot write one."""
    plain = b"secret words\n" * 20
    check = zlib.crc32(plain)
    keys = zip_cipher._Keys(password.encode())
    packed = bytearray()
    for byte in b"elevenbytes" + bytes([check >> 24]) + plain:
        mask = keys._keys[2] | 2
        packed.append(byte ^ (mask * (mask ^ 1) >> 8) & 0xFF)
        keys._keys = zip_cipher._next_keys(*keys._keys, byte)
    content = bytearray(zipped({"s.txt": bytes(packed)}, zipfile.ZIP_STORED))
    start = struct.unpack_from("<I", content, content.rindex(b"PK\5\6") + 16)[0]
    for place in (6, start + 8):
        content[place] |= 1
    struct.pack_into("<I", content, 14, check)
    struct.pack_into("<I", content, start + 16, check)
    assert zipfile.ZipFile(io.BytesIO(content)).read("s.txt", pwd=password.encode()) == plain
    return bytes(content), plain


def test_an_encrypted_archive_is_named_so_and_opened_by_its_password(tmp_path):
    content, plain = encrypted("swordfish")
    assert found(tmp_path, content) == ({}, {"a.zip/s.txt": "encrypted (give its password)"})
    wrong = found(tmp_path, content, options=Options(passwords=("shark",)))[1]["a.zip/s.txt"]
    assert wrong.startswith("encrypted")
    assert found(tmp_path, content, options=Options(passwords=("shark", "swordfish"))) == ({"a.zip/s.txt": plain}, {})


@pytest.mark.parametrize(
    "archive", [zipped(FILES), tarred(FILES), tarred(FILES, "w:gz"), tarred(FILES, "w:xz")], ids=["zip", "tar", "tar.gz", "tar.xz"]
)
def test_an_archive_that_ends_in_the_middle_gives_what_was_whole_and_one_row(tmp_path, archive):
    name = "a.bin"
    for cut in range(1, len(archive) - 1, max(1, len(archive) // 40)):
        kept, refused = found(tmp_path, archive[:cut], name)
        if f"{name}" in kept:  # too short to be told from any other file
            assert cut < 520
            continue
        if not refused:  # only the empty blocks behind the last member are missing
            assert len(kept) == len(FILES)
            continue
        assert list(refused) == [name] and refused[name].startswith("truncated"), (cut, refused)
        assert all(FILES[each.removeprefix(f"{name}/")] == content for each, content in kept.items())
    assert kept, "the last cut leaves some members whole"


def test_links_and_devices_are_told_and_not_followed(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, kind in (("s", tarfile.SYMTYPE), ("h", tarfile.LNKTYPE), ("d", tarfile.CHRTYPE), ("p", tarfile.FIFOTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.size = kind, "/etc/passwd", 0
            archive.addfile(entry)
        entry = tarfile.TarInfo("last.txt")
        entry.size = 5
        archive.addfile(entry, io.BytesIO(b"words"))
    kept, refused = found(tmp_path, file.getvalue(), "a.tar")
    assert kept == {"a.tar/last.txt": b"words"}
    assert refused == {
        "a.tar/s": "link (not followed)",
        "a.tar/h": "link (to another member)",
        "a.tar/d": "special file (a device)",
        "a.tar/p": "special file (a pipe)",
    }


def test_an_extended_header_cannot_make_us_hold_what_it_says(tmp_path):
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = tarfile.GNUTYPE_LONGNAME, 1 << 33
    kept, refused = found(tmp_path, header.tobuf(tarfile.GNU_FORMAT) + bytes(1 << 20), "a.tar")
    assert not kept and refused == {"a.tar": "damaged (a header of more than a megabyte)"}


def test_a_damaged_header_costs_one_member(tmp_path):
    content = bytearray(tarred({"1.txt": b"one", "2.txt": b"two", "3.txt": b"three"}))
    content[1024] ^= 0xFF  # in the name of the second one
    kept, refused = found(tmp_path, bytes(content), "a.tar")
    assert kept == {"a.tar/1.txt": b"one", "a.tar/3.txt": b"three"} and refused["a.tar"].startswith("damaged")


def test_a_large_file_of_records_in_an_archive_comes_as_a_stream(tmp_path):
    lines = b"".join(b'{"text": "document number %d"}\n' % number for number in range(400_000))
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(lines))
    (member,) = members(path, "a.jsonl.gz")
    assert member.kind == "records" and not isinstance(member.source, bytes)


@pytest.mark.parametrize("content", [b"", b"PK\5\6" + bytes(18)])
def test_what_is_empty_is_told(tmp_path, content):
    kept, refused = found(tmp_path, content)
    assert not kept and refused in ({"a.zip": "empty"}, {})


WARC = """WARC/1.0\r
WARC-Type: {kind}\r
WARC-Target-URI: {url}\r
WARC-Date: 2026-11-29T01:02:03Z\r
{more}Content-Type: application/http; msgtype=response\r
Content-Length: {length}\r
\r
"""


def record(url, body, status="200 OK", kind="response", headers="", same_as=""):
    http = f"HTTP/1.1 {status}\r\nContent-Type: text/html; charset=koi8-r\r\n{headers}\r\n".encode() + body
    more = f"WARC-Refers-To-Target-URI: {same_as}\r\n" if same_as else ""
    return WARC.format(kind=kind, url=url, length=len(http), more=more).encode() + http + b"\r\n\r\n"


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_pages_of_a_crawl(tmp_path, pack):
    page = "<html><body>\u043f\u0440\u0438\u0432\u0435\u0442</body></html>".encode("koi8-r")
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(page), page)
    records = [
        record("http://a.example/x", page),
        record("http://a.example/gone", b"not here", "404 Not Found"),
        record("http://a.example/z", gzip.compress(page), headers="Content-Encoding: gzip\r\n"),
        record("http://a.example/c", chunked, headers="Transfer-Encoding: chunked\r\n"),
        record("http://a.example/", b"", kind="request"),
        record("http://a.example/y", b"", kind="revisit", same_as="http://a.example/x"),
        record("http://a.example/x", b"", "304 Not Modified", kind="revisit", same_as="http://a.example/x"),
    ]
    path = tmp_path / "p.warc.gz"
    path.write_bytes(b"".join(map(pack, records)))
    results = list(members(path, "p.warc.gz"))
    pages = [each for each in results if isinstance(each, Member)]
    assert [(each.url, each.part, each.source) for each in pages] == [
        ("http://a.example/x", "record 1", page), ("http://a.example/z", "record 3", page), ("http://a.example/c", "record 4", page)
    ]  # fmt: skip
    assert {(each.kind, each.date, each.content_type) for each in pages} == {("html", "2026-11-29T01:02:03Z", "text/html; charset=koi8-r")}
    assert [each for each in results if isinstance(each, Again)] == [("http://a.example/y", "2026-11-29T01:02:03Z", "http://a.example/x")]
    assert [each for each in results if isinstance(each, Refused)] == [("p.warc.gz record 2", "no page (the server answered with status 404)")]


def test_what_a_browser_made_of_a_page_takes_its_place(tmp_path):
    def converted(url, body, made_from):
        more = f"WARC-Refers-To: <urn:{made_from}>\r\n"
        head = WARC.format(kind="conversion", url=url, length=len(body), more=more).replace(
            "application/http; msgtype=response", "text/html; charset=utf-8"
        )
        return head.encode() + body + b"\r\n\r\n"

    def named(name, record):
        return record.replace(b"\r\n", f"\r\nWARC-Record-ID: <urn:{name}>\r\n".encode(), 1)

    records = [
        named("x", record("http://a.example/x", b"shell")),
        converted("http://a.example/x", b"<p>text</p>", "x"),
        named("y", record("http://a.example/y", b"page")),
        converted("http://a.example/z", b"of another file", "z"),
        named("e", record("http://a.example/e", b"kept")),
        converted("http://a.example/e", b" ", "e"),
        named("l", record("http://a.example/last", b"whole")),
        converted("http://a.example/last", b"cut", "l")[:-9],
    ]
    path = tmp_path / "p.warc"
    path.write_bytes(b"".join(records))
    results = list(members(path, "p.warc"))
    assert [(each.url[-1], each.source) for each in results if isinstance(each, Member)] == [
        ("x", b"<p>text</p>"), ("y", b"page"), ("z", b"of another file"), ("e", b"kept"), ("t", b"whole"),
    ]  # fmt: skip
    assert results[0].content_type == "text/html; charset=utf-8"
