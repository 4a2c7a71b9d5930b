"""Finding and decoding: every file is either read correctly or left out with a reason."""

import codecs
import json
import os

import pytest

from cllm.data.documents.charset import Binary, detect
from cllm.data.documents.corpus import measure, no_text
from cllm.data.documents.files import Skipped, find
from cllm.data.documents.parquet import NEEDS_PYARROW
from cllm.data.documents.scan import Undecided, read, scan, scan_decoded
from cllm.runtime.errors import DataError
from cllm.runtime.progress import ByteProgress

GERMAN = (
    "V\u00f6gel fliegen \u00fcber die Stra\u00dfe, w\u00e4hrend gr\u00f6\u00dfere B\u00e4ume im Wind rauschen. M\u00fcde Menschen gehen nach Hause.\n"
    * 3
)
RUSSIAN = (
    "\u0412\u0441\u0435 "
    "\u0441\u0447\u0430\u0441\u0442\u043b\u0438\u0432\u044b\u0435 \u0441\u0435\u043c\u044c\u0438 \u043f\u043e\u0445\u043e\u0436\u0438 "
    "\u0434\u0440\u0443\u0433 \u043d\u0430 \u0434\u0440\u0443\u0433\u0430, \u043a\u0430\u0436\u0434\u0430\u044f "
    "\u043d\u0435\u0441\u0447\u0430\u0441\u0442\u043b\u0438\u0432\u0430\u044f \u043f\u043e-\u0441\u0432\u043e\u0435\u043c\u0443.\n"
) * 3
JAPANESE = (
    "\u543e\u8f29\u306f\u732b\u3067\u3042\u308b\u3002\u540d\u524d\u306f\u307e\u3060\u7121\u3044\u3002"
    "\u3069\u3053\u3067\u751f\u308c\u305f\u304b\u3068\u3093\u3068\u898b\u5f53\u304c\u3064\u304b\u306c\u3002\n"
) * 3


def texts(root, **kwargs):
    files, skipped = find(root, **kwargs)
    found = {}
    for file in files:
        info = scan(file)
        if isinstance(info, Undecided):
            info = scan_decoded(file, info, info.evidence.alone())
        if isinstance(info, str):
            skipped.add(info, file.name)
            continue
        for document in read(file, info):
            found[document.name] = "".join(document.chunks)
    return found, skipped


@pytest.mark.parametrize(
    "text, encoding",
    [
        *((GERMAN, name) for name in ("utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "cp1252")),
        *((RUSSIAN, name) for name in ("utf-16-le", "cp1251", "koi8-r")),
        *((JAPANESE, name) for name in ("utf-16-be", "shift_jis", "euc_jp")),
    ],
)
def test_text_is_decoded_whatever_its_charset(text, encoding, tmp_path):
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    assert texts(tmp_path)[0] == {"a.txt": text}


def test_a_declared_charset_is_believed(tmp_path):
    (tmp_path / "a.py").write_bytes("# -*- coding: cp866 -*-\nx = '\u0416'\n".encode("cp866"))
    (tmp_path / "b.xml").write_bytes("<?xml version='1.0' encoding='iso-8859-7'?>\n<a>\u03b1</a>\n".encode("iso-8859-7"))
    found, _ = texts(tmp_path)
    assert "\u0416" in found["a.py"] and "\u03b1" in found["b.xml"]


def test_utf8_with_one_damaged_byte_is_still_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(RUSSIAN.encode("utf-8") + b"\xff broken\n")
    assert texts(tmp_path)[0]["a.txt"] == RUSSIAN + "\ufffd broken\n"


def test_line_ends_and_the_byte_order_mark_are_normalised_and_nothing_else(tmp_path):
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"one\r\ntwo\rthree\n\tfour  \x0c\n")
    assert texts(tmp_path)[0]["a.txt"] == "one\ntwo\nthree\n\tfour  \x0c\n"


SEPARATED = "one\r\n<|endoftext|>\r\ntwo\rthree\r\n<|endoftext|>\nfour\n"


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfone\r\ntwo\rthree\n", SEPARATED.encode(), b"\r\n \r\n", b"caf\xc3\xa9 \xe2\x80\xa8 au lait\n" * 9 + b"\xff and more\n",
        GERMAN.encode("latin-1"), RUSSIAN.encode("utf-16"), JAPANESE.encode("shift_jis") * 9, b"plain\x00" * 40,
    ],
)  # fmt: skip
def test_a_small_file_which_is_read_at_once_gives_what_a_large_one_gives(content, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_bytes(content)

    def seen():
        (file,), _ = find(tmp_path)
        found = scan(file)
        found = scan_decoded(file, found, found.evidence.alone()) if isinstance(found, Undecided) else found
        if isinstance(found, str):
            return found
        return found.to_dict(), found.rows.tolist(), [(document.name, "".join(document.chunks)) for document in read(file, found)]

    at_once = seen()
    monkeypatch.setattr("cllm.data.documents.scan.SMALL_BYTES", 0)
    assert seen() == at_once


@pytest.mark.parametrize(
    "content", [b"%PDF-1.7 text", b"\x7fELF" + bytes(50), bytes(range(256)) * 4, b"one\0two\0three\n" * 20, bytes(range(1, 32)) * 9, b"\x89PNG\r\n"]
)
def test_binary_content_is_left_out_whatever_its_name(content, tmp_path):
    (tmp_path / "a.txt").write_bytes(content)
    found, skipped = texts(tmp_path)
    assert not found and skipped.total == 1 and next(iter(skipped.counts)).startswith("binary")
    with open(tmp_path / "a.txt", "rb") as file:
        assert isinstance(detect(file), Binary)


def test_many_zero_bytes_late_in_a_file_make_it_binary(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"text\n" * 20000 + b"\0\1" * 1000)
    assert not texts(tmp_path)[0]


def test_a_folder_is_searched_in_order_and_what_is_left_out_is_counted(tmp_path):
    for name in ("b.py", "a/z.md", "a/README", "deep/er/x.c"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}\n")
    for folder in (".git", "node_modules", "__pycache__", "CVS", "env"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "inside.txt").write_text("not this")
    (tmp_path / "env" / "pyvenv.cfg").write_text("home = /usr")
    (tmp_path / ".hidden").write_text("not this")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "picture.png").write_bytes(b"x")
    (tmp_path / "lib.min.js").write_text("var a=1;")
    (tmp_path / "packed.js").write_text("a=1;" * 5000)
    (tmp_path / "prose.txt").write_text("a paragraph on one line. " * 1000)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "nowhere").symlink_to(tmp_path / "missing")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)

    found, skipped = texts(tmp_path)
    assert list(found) == ["a/README", "a/z.md", "b.py", "deep/er/x.c", "prose.txt"]
    assert skipped.counts == {
        "hidden folder": 1, "folder of installed packages": 2, "folder of compiled files": 1, "version control folder": 1, "hidden file": 1,
        "empty": 2, "binary (.png)": 1, "minified or generated": 2,
        "special file (a pipe, a socket or a device)": 1, "broken link": 1, "link to a folder seen before": 1,
    }  # fmt: skip
    assert any(line.startswith("2 minified or generated: lib.min.js, packed.js") for line in skipped.lines())
    assert Skipped.from_dict(json.loads(json.dumps(skipped.to_dict()))) == skipped


@pytest.mark.parametrize(
    ("reason", "several"),
    [
        ("empty", "2 empty"),
        ("binary (.png)", "2 binary (.png)"),
        ("hidden file", "2 hidden files"),
        ("hidden folder", "2 hidden folders"),
        ("folder of installed packages", "2 folders of installed packages"),
        ("version control folder", "2 version control folders"),
        ("link to a folder seen before", "2 links to a folder seen before"),
        ("broken link", "2 broken links"),
        ("unreadable folder", "2 unreadable folders"),
        ("unreadable (permission denied)", "2 unreadable (permission denied)"),
        ("output of cllm", "2 outputs of cllm"),
        ("special file (a pipe, a socket or a device)", "2 special files (a pipe, a socket or a device)"),
        ("record that is not valid JSON", "2 records that are not valid JSON"),
        ("row with empty text", "2 rows with empty text"),
        ("JSON file in which no record has a text", "2 JSON files in which no record has a text"),
        ("question without an answer at the end of a conversation", "2 questions without an answer at the end of a conversation"),
        (NEEDS_PYARROW, f"2 Parquet files {NEEDS_PYARROW.removeprefix('Parquet file ')}"),
    ],
)
def test_what_is_said_of_one_and_of_several(reason, several):
    skipped = Skipped()
    skipped.add(reason, "a")
    assert skipped.lines() == [f"1 {reason}: a"] and skipped.brief() == f"left out 1: 1 {reason}: a"
    skipped.add(reason, "b")
    assert skipped.lines() == [f"{several}: a, b"]


@pytest.mark.parametrize(
    ("kinds", "long", "short"), [(8, None, "and for 5 other reasons"), (9, "and for 1 other reason (", "and for 6 other reasons")]
)
def test_many_reasons_are_cut_to_the_most_frequent(kinds, long, short):
    skipped = Skipped()
    for number in range(kinds):
        skipped.add(f"reason {number}", "a", count=20 - number)
    report = skipped.report()
    assert len(report) == 1 + min(kinds, 8) + (long is not None) and (long is None or long in report[-1])
    assert skipped.brief().startswith(f"left out {skipped.total}: 20 reason 0: a, ...; 19 reason 1") and skipped.brief().endswith(short)
    assert Skipped().brief() == "" and Skipped().report() == []


@pytest.mark.parametrize(("name", "helps"), [("a.pdf", True), ("a.docx", True), ("a.zip", True), ("a.png", False), ("a.mp3", False)])
def test_what_prepare_can_read_is_said_where_training_leaves_it_out(tmp_path, name, helps):
    (tmp_path / name).write_bytes(b"%PDF-1.7")
    _, skipped = find(tmp_path)
    assert ("cllm prepare makes text of PDF" in skipped.report()[-1]) is helps
    assert ("cllm prepare makes text of PDF" in no_text(tmp_path, skipped)) is helps


def test_a_pdf_of_another_name_is_told_by_its_first_bytes_and_prepare_named_for_it(tmp_path):
    (tmp_path / "paper").write_bytes(b"%PDF-1.7")
    with pytest.raises(DataError, match=r"binary .PDF.* And cllm prepare makes text"):
        measure(tmp_path / "paper", ByteProgress(None))


def test_links_are_followed_once(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("linked text")
    (tmp_path / "data" / "one").symlink_to(tmp_path / "other", target_is_directory=True)
    (tmp_path / "data" / "two").symlink_to(tmp_path / "other", target_is_directory=True)
    assert list(texts(tmp_path / "data")[0]) == ["one/a.txt"]


def test_each_line_of_jsonl_is_a_document(tmp_path):
    lines = [
        '{"text": "one\\r\\nline"}',
        "",
        '{"content": "two"}',
        "{broken",
        '{"title": "none"}',
        "[1]",
        '{"text": "  "}',
        '{"text": "half \\ud800"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    files, _ = find(tmp_path / "a.jsonl")
    info = scan(files[0])
    assert [(d.name, "".join(d.chunks)) for d in read(files[0], info)] == [
        ("a.jsonl:1", "one\nline"),
        ("a.jsonl:3", "two"),
        ("a.jsonl:8", "half \ufffd"),
    ]
    assert info.rows["chars"].tolist() == [8, 3, 6]
    assert info.skipped.counts == {
        "record that is not valid JSON": 1, "record without a text in 'text' or 'content'": 2, "record with empty text": 1,
    }  # fmt: skip


def test_text_comes_in_chunks_and_is_measured_exactly(tmp_path):
    text = "gr\u00f6\u00dfer als ein St\u00fcck\n" * 30000
    (tmp_path / "big.txt").write_text(text, "utf-8")
    files, _ = find(tmp_path)
    info = scan(files[0])
    (document,) = read(files[0], info)
    chunks = list(document.chunks)
    assert len(chunks) > 1 and "".join(chunks) == text
    assert info.rows[0]["chars"] == len(text) and info.rows[0]["bytes"] == len(text.encode("utf-8"))


def test_a_file_that_may_not_be_read_is_reported(tmp_path, monkeypatch):
    import builtins

    (tmp_path / "secret.txt").write_text("secret")
    real = builtins.open

    def refuse(path, *args, **kwargs):
        if str(path).endswith("secret.txt"):
            raise PermissionError(13, "Permission denied")
        return real(path, *args, **kwargs)

    monkeypatch.setattr(builtins, "open", refuse)
    found, skipped = texts(tmp_path)
    assert not found and skipped.counts == {"unreadable (permission denied)": 1}


def test_excluded_places_and_packed_tokens_are_no_data(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "log.txt").write_text("log")
    (tmp_path / "packed" / "tokens").mkdir(parents=True)
    (tmp_path / "packed" / "tokens" / "dataset.json").write_text("{}")
    (tmp_path / "packed" / "sources.json").write_text("{}")
    (tmp_path / "a.txt").write_text("data")
    found, skipped = texts(tmp_path, exclude=[tmp_path / "out"])
    assert list(found) == ["a.txt"] and skipped.counts == {"output of cllm": 1}


def test_a_missing_place_is_an_error_that_says_what_is_expected(tmp_path):
    with pytest.raises(DataError, match=r"does not exist\. Give a folder"):
        find(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(DataError, match="neither a file nor a folder"):
        find(tmp_path / "pipe")
