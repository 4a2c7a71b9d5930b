"""Office documents and e-books, made by real writers, become Markdown with what they say about themselves."""

import datetime
import io
import zipfile
from pathlib import Path

import pytest

from cllm.data.extract import epub, opendocument, sheets, slides, word
from cllm.data.extract.document import Unreadable
from cllm.data.extract.options import Options

# ruff: noqa: E501 - parts of packages are written as they come
pytest.importorskip("lxml", reason="needs cllm[data]")
docx = pytest.importorskip("docx", reason="needs cllm[data]")
pptx = pytest.importorskip("pptx", reason="needs cllm[data]")
openpyxl = pytest.importorskip("openpyxl", reason="needs cllm[data]")


OPTIONS = Options()


def saved(thing: object) -> bytes:
    file = io.BytesIO()
    thing.save(file)  # type: ignore[attr-defined]
    return file.getvalue()


def zipped(parts: dict[str, str | bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as package:
        for name, content in parts.items():
            package.writestr(name, content)
    return file.getvalue()


def replaced(data: bytes, name: str, change: object) -> bytes:
    """A package with one part changed by a function."""
    with zipfile.ZipFile(io.BytesIO(data)) as package:
        parts = {entry: package.read(entry) for entry in package.namelist()}
    parts[name] = change(parts[name])  # type: ignore[operator]
    return zipped(dict(parts))


def report() -> bytes:
    document = docx.Document()
    document.core_properties.title = "Pumps"
    document.core_properties.language = "de-DE"
    document.core_properties.modified = datetime.datetime(2024, 5, 17)
    document.add_heading("How pumps work", 1)
    paragraph = document.add_paragraph("Water runs ")
    paragraph.add_run("uphill").bold = True
    paragraph.add_run(" when pushed.")
    document.add_paragraph("first", style="List Bullet")
    document.add_paragraph("inner", style="List Bullet 2")
    document.add_paragraph("open", style="List Number")
    document.add_paragraph("close", style="List Number")
    table = document.add_table(rows=2, cols=2)
    for cell, text in zip([cell for row in table.rows for cell in row.cells], ["Name", "Litres", "small", "3|4"]):
        cell.text = text
    document.add_heading("After the table", 2)
    return saved(document)


def test_word_document() -> None:
    (document,) = word.read(report(), "a.docx", OPTIONS)
    assert (document.title, document.date, document.language) == ("Pumps", "2024-05-17", "de")
    assert document.text == (
        "# How pumps work\n\nWater runs uphill when pushed.\n\n- first\n- inner\n1. open\n2. close\n\n"
        "| Name | Litres |\n| --- | --- |\n| small | 3\\|4 |\n\n## After the table"
    )


def test_word_keeps_insertions_and_controls_and_leaves_out_what_was_deleted() -> None:
    def change(xml: bytes) -> bytes:
        run = b'<w:r><w:t xml:space="preserve">%s</w:t></w:r>'
        changed = (
            b"<w:p>" + run % b"kept " + b'<w:ins w:id="1" w:author="a">' + run % b"inserted " + b"</w:ins>"
            b'<w:del w:id="2" w:author="a"><w:r><w:delText>deleted</w:delText></w:r></w:del></w:p>'
            b"<w:sdt><w:sdtContent><w:p>" + run % b"controlled" + b"</w:p></w:sdtContent></w:sdt>"
        )
        return xml.replace(b"<w:body>", b"<w:body>" + changed)

    (document,) = word.read(replaced(report(), "word/document.xml", change), "a.docx", OPTIONS)
    assert document.text.startswith("kept inserted\n\ncontrolled\n\n# How pumps work")


def test_slides_with_table_and_notes() -> None:
    presentation = pptx.Presentation()
    presentation.core_properties.title = "Pumps in ten minutes"
    slide = presentation.slides.add_slide(presentation.slide_layouts[1])
    slide.shapes.title.text = "Why pumps"
    frame = slide.placeholders[1].text_frame
    frame.text = "Water is low"
    frame.add_paragraph().text = "Fields are high"
    frame.paragraphs[1].level = 1
    slide.notes_slide.notes_text_frame.text = "Wait for laughter."
    second = presentation.slides.add_slide(presentation.slide_layouts[5])
    second.shapes.title.text = "Sizes"
    table = second.shapes.add_table(2, 2, 0, 0, 100, 100).table
    for place, text in {(0, 0): "Name", (0, 1): "Litres", (1, 0): "small", (1, 1): "3"}.items():
        table.cell(*place).text = text
    (document,) = slides.read(saved(presentation), "a.pptx", OPTIONS)
    assert document.title == "Pumps in ten minutes"
    assert document.text == (
        "## Why pumps\n\n- Water is low\n  - Fields are high\n\nNotes:\n\nWait for laughter.\n\n"
        "## Sizes\n\n| Name | Litres |\n| --- | --- |\n| small | 3 |"
    )


def test_sheets_are_documents_of_their_own() -> None:
    book = openpyxl.Workbook()
    book.active.title = "Prices"
    for row in (["item", None, "price", "since"], ["pump | small", None, 3.5, datetime.date(2024, 5, 17)], ["big", None, 1e6, None]):
        book.active.append(row)
    book.create_sheet("empty")
    book.create_sheet("Far")["XFD1048576"] = "corner"
    first, far = sheets.read(saved(book), "a.xlsx", OPTIONS)
    assert (first.part, first.title) == ("sheet Prices", "Prices")
    assert first.text == "| item | price | since |\n| --- | --- | --- |\n| pump \\| small | 3.5 | 2024-05-17 |\n| big | 1000000 |  |"
    assert (far.part, far.text) == ("sheet Far", "corner")


CONTENT = """<?xml version="1.0"?><office:document-content xmlns:office="urn:oasis:names:tc:opendocument:xmlns:office:1.0"
xmlns:text="urn:oasis:names:tc:opendocument:xmlns:text:1.0" xmlns:table="urn:oasis:names:tc:opendocument:xmlns:table:1.0"
xmlns:draw="urn:oasis:names:tc:opendocument:xmlns:drawing:1.0" xmlns:presentation="urn:oasis:names:tc:opendocument:xmlns:presentation:1.0">
<office:body>%s</office:body></office:document-content>"""
META = """<office:document-meta xmlns:office="urn:oasis:names:tc:opendocument:xmlns:office:1.0" xmlns:dc="http://purl.org/dc/elements/1.1/"><office:meta>
<dc:title>Pumps</dc:title><dc:date>2024-05-17T08:00:00</dc:date><dc:language>fr-FR</dc:language></office:meta></office:document-meta>"""


def opened(body: str) -> list:
    return opendocument.read(
        zipped({"mimetype": "application/vnd.oasis.opendocument", "content.xml": CONTENT % body, "meta.xml": META}), "a.odt", OPTIONS
    )


def test_open_document_text() -> None:
    (document,) = opened(
        '<office:text><text:tracked-changes><text:p>deleted</text:p></text:tracked-changes><text:h text:outline-level="2">How<text:s text:c="3"/>so</text:h>'
        "<text:p>Water runs<text:note><text:note-citation>1</text:note-citation><text:note-body><text:p>slowly</text:p></text:note-body></text:note> up.</text:p>"
        "<text:list><text:list-item><text:p>one</text:p><text:list><text:list-item><text:p>inner</text:p></text:list-item></text:list></text:list-item></text:list>"
        '<table:table><table:table-row><table:table-cell><text:p>a</text:p></table:table-cell><table:table-cell table:number-columns-repeated="16000"/>'
        "</table:table-row></table:table></office:text>"
    )
    assert (document.title, document.date, document.language) == ("Pumps", "2024-05-17", "fr")
    assert document.text == "## How so\n\nWater runs up.\n\nslowly\n\n- one\n  - inner\n\n| a |\n| --- |"


def test_open_document_sheets_and_slides() -> None:
    (sheet,) = opened(
        '<office:spreadsheet><table:table table:name="Prices"><table:table-row><table:table-cell/><table:table-cell><text:p>x</text:p></table:table-cell>'
        '<table:table-cell table:number-columns-repeated="2"><text:p>y</text:p></table:table-cell></table:table-row>'
        '<table:table-row table:number-rows-repeated="1048000"><table:table-cell table:number-columns-repeated="16384"/></table:table-row>'
        "</table:table></office:spreadsheet>"
    )
    assert (sheet.part, sheet.text) == ("sheet Prices", "| x | y | y |\n| --- | --- | --- |")
    (show,) = opened(
        '<office:presentation><draw:page><draw:frame presentation:class="title"><draw:text-box><text:p>Why</text:p></draw:text-box></draw:frame>'
        "<draw:frame><draw:text-box><text:list><text:list-item><text:p>low</text:p></text:list-item></text:list></draw:text-box></draw:frame></draw:page>"
        "</office:presentation>"
    )
    assert show.text == "## Why\n\n- low"


def book(**more: str) -> bytes:
    page = '<html xmlns="http://www.w3.org/1999/xhtml"><head><title>t</title></head><body>%s</body></html>'
    return zipped(
        {
            "mimetype": "application/epub+zip",
            "META-INF/container.xml": '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles>'
            '<rootfile full-path="OEBPS/content.opf"/></rootfiles></container>',
            "OEBPS/content.opf": '<package xmlns="http://www.idpf.org/2007/opf" xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata><dc:title>The mill</dc:title>'
            "<dc:language>en-GB</dc:language><dc:date>1904</dc:date><dc:rights>Public domain</dc:rights></metadata><manifest>"
            '<item id="n" href="nav.xhtml" media-type="application/xhtml+xml" properties="nav"/><item id="b" href="two%20b.xhtml" media-type="application/xhtml+xml"/>'
            '<item id="a" href="one.xhtml" media-type="application/xhtml+xml"/></manifest><spine><itemref idref="n"/><itemref idref="a"/><itemref idref="b"/></spine></package>',
            "OEBPS/nav.xhtml": page % "<nav><ol><li>contents</li></ol></nav>",
            "OEBPS/two b.xhtml": page % "<h1>Second</h1><p>It ends.</p>",
            "OEBPS/one.xhtml": page % "<h1>First</h1><p>It <em>begins</em>.</p>",
            **more,
        }
    )


def test_book_in_the_order_of_its_spine() -> None:
    (document,) = epub.read(book(), "a.epub", OPTIONS)
    assert document.text == "# First\n\nIt begins.\n\n# Second\n\nIt ends."
    assert (document.title, document.language, document.date, document.licence) == ("The mill", "en", "1904", "Public domain")


def test_copy_protection_and_passwords_are_said() -> None:
    encryption = '<encryption><EncryptedData><EncryptionMethod Algorithm="%s"/></EncryptedData></encryption>'
    with pytest.raises(Unreadable, match=r"^encrypted.*DRM"):
        epub.read(book(**{"META-INF/encryption.xml": encryption % "http://www.w3.org/2001/04/xmlenc#aes128-cbc"}), "a.epub", OPTIONS)
    assert epub.read(book(**{"META-INF/encryption.xml": encryption % "http://www.idpf.org/2008/embedding"}), "a.epub", OPTIONS)
    with pytest.raises(Unreadable, match=r"^encrypted"):
        word.read(b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(600), "a.docx", OPTIONS)
    manifest = (
        '<m:manifest xmlns:m="urn:oasis:names:tc:opendocument:xmlns:manifest:1.0"><m:file-entry><m:encryption-data/></m:file-entry></m:manifest>'
    )
    with pytest.raises(Unreadable, match=r"^encrypted"):
        opendocument.read(zipped({"META-INF/manifest.xml": manifest, "content.xml": b"\x00\x01"}), "a.odt", OPTIONS)


LAUGHS = '<!DOCTYPE x [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;&a;&a;">' + "".join(
    f'<!ENTITY {chr(name + 1)} "{f"&{chr(name)};" * 10}">' for name in range(ord("b"), ord("i"))
)


@pytest.mark.parametrize("entity", [LAUGHS + "]>", '<!DOCTYPE x [<!ENTITY i SYSTEM "file:///etc/passwd">]>'], ids=["laughs", "external"])
def test_entities_are_never_expanded(entity: str) -> None:
    def change(xml: bytes) -> bytes:
        head, body = xml.split(b"?>", 1)
        return head + b"?>" + entity.encode() + body.replace(b"<w:body>", b"<w:body><w:p><w:r><w:t>before &i; after</w:t></w:r></w:p>")

    try:
        (document,) = word.read(replaced(report(), "word/document.xml", change), "a.docx", OPTIONS)
    except Unreadable:
        return
    assert "hahaha" not in document.text and "root:" not in document.text


def test_bombs_are_refused() -> None:
    with pytest.raises(Unreadable, match=r"^too large"):
        word.read(zipped({"word/document.xml": b"<a>" + bytes(60_000_000) + b"</a>"}), "a.docx", OPTIONS)
    with pytest.raises(Unreadable, match=r"^too large"):
        sheets.read(zipped({"xl/worksheets/sheet1.xml": b"<a>" + b" " * 60_000_000 + b"</a>"}), "a.xlsx", OPTIONS)


@pytest.mark.parametrize("kind", ["docx", "pptx", "xlsx", "odt", "epub"])
def test_damaged_packages_are_unreadable_or_text(kind: str) -> None:
    workbook = openpyxl.Workbook()
    workbook.active["A1"] = "one value"
    presentation = pptx.Presentation()
    presentation.slides.add_slide(presentation.slide_layouts[0]).shapes.title.text = "A title"
    whole = {
        "docx": report, "pptx": lambda: saved(presentation), "xlsx": lambda: saved(workbook), "epub": book,
        "odt": lambda: zipped({"content.xml": CONTENT % "<office:text><text:p>one</text:p></office:text>"}),
    }[kind]()  # fmt: skip
    module = {"docx": word, "pptx": slides, "xlsx": sheets, "odt": opendocument, "epub": epub}[kind]
    assert module.read(whole, "a", OPTIONS)
    cases = [b"", b"PK\x03\x04", whole[: len(whole) // 2], whole[:-30], b"no zip at all", zipped({"other.txt": "text"})]
    cases += [
        whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :] for place in range(20, len(whole), max(1, len(whole) // 40))
    ]
    for data in cases:
        try:
            assert all(document.text for document in module.read(data, "a", OPTIONS))
        except Unreadable as reason:
            assert str(reason).split(":")[0] in ("damaged", "empty", "encrypted", "too large")


def test_book_of_another_layout_is_found(tmp_path: Path) -> None:
    parts = {"a.opf": '<package xmlns="http://www.idpf.org/2007/opf"><manifest><item id="a" href="a.html" media-type="text/html"/></manifest>'
             '<spine><itemref idref="a"/></spine></package>', "a.html": "<p>It begins."}  # fmt: skip
    assert epub.read(zipped(dict(parts)), "a.epub", OPTIONS)[0].text == "It begins."
