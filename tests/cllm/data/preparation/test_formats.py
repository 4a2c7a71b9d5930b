"""A folder with files of every kind, readable and not: each gives its rows, and each file that gives no text says why."""

import gzip
import io
import json
import tarfile
import zipfile

import pytest
from here import Here
from made import prose, recipe

from cllm.data.preparation.plan import prepare
from cllm.data.preparation.rows import read_rows

parquet = pytest.importorskip("pyarrow.parquet", reason="the data extra is not installed")
docx = pytest.importorskip("docx", reason="the data extra is not installed")
openpyxl = pytest.importorskip("openpyxl", reason="the data extra is not installed")
pptx = pytest.importorskip("pptx", reason="the data extra is not installed")
pyarrow = pytest.importorskip("pyarrow", reason="the data extra is not installed")
pypdf = pytest.importorskip("pypdf", reason="the data extra is not installed")


def page(text):
    paragraphs = "".join(f"<p>{each}</p>" for each in text.split("\n\n"))
    return f"<!doctype html><html><head><title>A page</title></head><body><article><h1>A page</h1>{paragraphs}</article></body></html>"


def make(folder):
    """Files by name; what is in each is the prose of its number in the list."""
    folder.mkdir()
    texts = iter(map(prose, range(1000)))
    made = {}

    def put(name, write):
        made[name] = next(texts)
        write(made[name])

    def word(text):
        document = docx.Document()
        for each in text.split("\n\n"):
            document.add_paragraph(each)
        document.save(folder / "letter.docx")

    def slides(text):
        deck = pptx.Presentation()
        deck.slides.add_slide(deck.slide_layouts[5]).shapes.title.text = text
        deck.save(folder / "talk.pptx")

    def sheet(text):
        book = openpyxl.Workbook()
        for each in text.split("\n\n"):
            book.active.append([each.strip(), 1])
        book.save(folder / "table.xlsx")

    def inside_tar(text):
        with tarfile.open(folder / "more.tar.gz", "w:gz") as archive:
            entry = tarfile.TarInfo("inside/page.html")
            entry.size = len(page(text).encode())
            archive.addfile(entry, io.BytesIO(page(text).encode()))

    def inside_zip(text):
        inner = io.BytesIO()
        with zipfile.ZipFile(inner, "w") as archive:
            archive.writestr("deep.txt", text)
        with zipfile.ZipFile(folder / "outer.zip", "w") as archive:
            archive.writestr("inner.zip", inner.getvalue())

    put("plain.txt", (folder / "plain.txt").write_text)
    put("notes.md", lambda text: (folder / "notes.md").write_text(f"# Notes\n\n{text}"))
    put("old.txt", lambda text: (folder / "old.txt").write_bytes(text.replace("bane", "bäne").encode("utf-16")))
    put("page.html", lambda text: (folder / "page.html").write_text(page(text)))
    put("letter.docx", word)
    put("talk.pptx", slides)
    put("table.xlsx", sheet)
    put("records.jsonl", lambda text: (folder / "records.jsonl").write_text(json.dumps({"text": text}) + "\n"))
    put("table.parquet", lambda text: parquet.write_table(pyarrow.table({"text": [text]}), folder / "table.parquet"))
    put("mail.eml", lambda text: (folder / "mail.eml").write_text(f"From: a@example.org\nTo: b@example.org\nSubject: News\n\n{text}"))
    put("packed.txt.gz", lambda text: (folder / "packed.txt.gz").write_bytes(gzip.compress(text.encode())))
    put("more.tar.gz/inside/page.html", inside_tar)
    put("outer.zip/inner.zip/deep.txt", inside_zip)
    (folder / "program.py").write_text('"""Doubles."""\n\n\ndef double(number):\n    """Twice the number."""\n    return 2 * number\n' * 3)
    # None of these gives a text.
    writer = pypdf.PdfWriter()
    writer.add_blank_page(200, 200)
    writer.encrypt("secret")
    writer.write(folder / "locked.pdf")
    (folder / "empty.docx").write_bytes(b"")
    (folder / "broken.docx").write_bytes((folder / "letter.docx").read_bytes()[:2000])
    (folder / "cut.txt.gz").write_bytes(gzip.compress(prose(500).encode() * 50)[:60])
    (folder / "unknown.bin").write_bytes(bytes(range(256)) * 20)
    (folder / "gone.txt").symlink_to(folder / "nowhere.txt")
    return made


def test_each_file_is_a_document_or_a_reason(tmp_path):
    made = make(tmp_path / "box")
    prepared = prepare([str(tmp_path / "box")], tmp_path / "out", recipe(filter=False, dedup=False), Here())
    found = {}
    for place in prepared.paths():
        for row in read_rows(place):
            found.setdefault(row["path"].partition("#")[0], []).append(row)
    for name, text in made.items():
        (row,) = found[name]
        assert not row["dropped_because"], row
        words = row["text"].replace("bäne", "bane").replace("**", "")
        assert all(sentence in " ".join(words.split()) for sentence in " ".join(text.split()).split(". ")[:5]), (name, row["text"][:300])
    assert found["program.py"][0]["code"] == "python" and found["program.py"][0]["text"].startswith('"""Doubles."""')
    because = {name: rows[0]["dropped_because"] for name, rows in found.items() if rows[0]["dropped_because"]}
    assert sorted(because) == ["broken.docx", "cut.txt.gz", "empty.docx", "gone.txt", "locked.pdf", "unknown.bin"]
    for name, word in (("locked.pdf", "encrypted"), ("empty.docx", "empty"), ("unknown.bin", "unknown type"), ("gone.txt", "broken link")):
        assert because[name].startswith(word), because
    assert {row["text"] for rows in found.values() for row in rows if row["dropped_because"]} <= {""}
