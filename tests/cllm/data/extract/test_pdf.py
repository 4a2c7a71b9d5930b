"""PDF files become paragraphs in the order of reading; images become the text that is recognised in them."""

import io
import zlib

import pytest

from cllm.data.extract import images, pdf
from cllm.data.extract.document import Unreadable
from cllm.data.extract.options import Options

pytest.importorskip("pypdfium2", reason="needs cllm[data]")
pytest.importorskip("PIL", reason="needs cllm[data]")
OPTIONS = Options()
TEXT = (
    "The old mill at the edge of the village had stood empty for eleven years when the council sold it to a baker, who repaired the wheel first, "
    "because nobody believed that he could, and for a whole winter the sound of hammers carried across the frozen river until the ice broke up."
)


def pdf_of(pages: list[list[tuple[float, float, float, str, str]]], info: str = "") -> bytes:
    """A PDF file of pages of (x, y, size, font, text); fonts: "F1" Helvetica, "F2" Courier."""
    objects = [b"<</Type/Catalog/Pages 2 0 R>>", b"", b"<</Type/Font/Subtype/Type1/BaseFont/Helvetica/Encoding/WinAnsiEncoding>>"]
    objects += [b"<</Type/Font/Subtype/Type1/BaseFont/Courier>>", f"<<{info}>>".encode("latin-1")]
    kids = []
    for page in pages:
        drawn = "".join(f"BT /{font} {size} Tf 1 0 0 1 {x} {y} Tm ({escaped(text)}) Tj ET\n" for x, y, size, font, text in page).encode("cp1252")
        packed = zlib.compress(drawn)
        objects.append(b"<</Length %d/Filter/FlateDecode>>stream\n%s\nendstream" % (len(packed), packed))
        kids.append(len(objects) + 1)
        resources = b"<</Font<</F1 3 0 R/F2 4 0 R>>>>"
        objects.append(b"<</Type/Page/Parent 2 0 R/MediaBox[0 0 595 842]/Resources%s/Contents %d 0 R>>" % (resources, len(objects)))
    objects[1] = b"<</Type/Pages/Count %d/Kids[%s]>>" % (len(kids), b" ".join(b"%d 0 R" % kid for kid in kids))
    out, places = io.BytesIO(b"%PDF-1.4\n"), []
    out.seek(0, io.SEEK_END)
    for number, content in enumerate(objects, 1):
        places.append(out.tell())
        out.write(b"%d 0 obj\n%s\nendobj\n" % (number, content))
    start = out.tell()
    out.write(b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1) + b"".join(b"%010d 00000 n \n" % place for place in places))
    out.write(b"trailer<</Size %d/Root 1 0 R/Info 5 0 R>>\nstartxref\n%d\n%%%%EOF" % (len(objects) + 1, start))
    return out.getvalue()


def escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("(", "\\(").replace(")", "\\)")


def wrapped(text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        lines = [*lines[:-1], f"{lines[-1]} {word}".strip()] if len(lines[-1]) + len(word) < width else [*lines, word]
    return lines


def column(lines: list[str], x: float, y: float, size: float = 11, font: str = "F1") -> list[tuple[float, float, float, str, str]]:
    return [(x, y - 14 * number, size, font, line) for number, line in enumerate(lines)]


def test_paragraphs_headings_lists_code_and_hyphens() -> None:
    lines = wrapped(TEXT, 80)
    page = [
        (60, 780, 20, "F1", "The mill"),
        *column(lines, 60, 740),
        *column(["Bread was given away, one loaf to each inter-", "ested house in the village."], 60, 660),
    ]
    page += column(["\u2022 rye", "\u2022 wheat"], 60, 610) + column(["for loaf in oven:", "    sell(loaf)"], 60, 560, font="F2")
    (document,) = pdf.read(pdf_of([page], "/Title(Mills)/CreationDate(D:20240517083000+02'00')"), "a.pdf", OPTIONS)
    assert (document.title, document.date) == ("Mills", "2024-05-17")
    assert document.text == (
        f"# The mill\n\n{TEXT}\n\nBread was given away, one loaf to each interested house in the village.\n\n- rye\n- wheat\n\n"
        "```\nfor loaf in oven:\n    sell(loaf)\n```"
    )


def test_columns_are_read_one_after_the_other_also_when_drawn_line_by_line() -> None:
    left, right = wrapped(TEXT, 44), wrapped(TEXT.replace("mill", "bakery").replace("baker,", "miller,"), 44)
    drawn = [entry for pair in zip(column(left, 50, 700), column(right, 320, 700)) for entry in pair]
    drawn += column(left, 50, 700)[len(right) :] + column(right, 320, 700)[len(left) :]
    (document,) = pdf.read(pdf_of([[(50, 760, 18, "F1", "A title across both columns of the page"), *drawn]]), "a.pdf", OPTIONS)
    assert document.text == f"# A title across both columns of the page\n\n{' '.join(left)}\n\n{' '.join(right)}"


def test_heads_feet_and_page_numbers_are_left_out_and_paragraphs_cross_pages() -> None:
    lines = wrapped(TEXT, 80)
    pages = [
        [(60, 810, 9, "F1", f"Valley News {number}/2024"), *column([lines[number - 1]], 60, 780), (290, 30, 9, "F1", str(number))]
        for number in range(1, len(lines) + 1)
    ]
    (document,) = pdf.read(pdf_of(pages), "a.pdf", OPTIONS)
    assert document.text == TEXT


def encrypted(data: bytes) -> bytes:
    pypdf = pytest.importorskip("pypdf", reason="needs cllm[data]")
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(data))
    writer.encrypt("open sesame", algorithm="RC4-128")
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def test_passwords() -> None:
    data = encrypted(pdf_of([column(wrapped(TEXT, 80), 60, 700)]))
    with pytest.raises(Unreadable, match=r"^encrypted"):
        pdf.read(data, "a.pdf", OPTIONS)
    with pytest.raises(Unreadable, match=r"^encrypted"):
        pdf.read(data, "a.pdf", Options(passwords=("wrong",)))
    assert pdf.read(data, "a.pdf", Options(passwords=("wrong", "open sesame")))[0].text == TEXT


def test_damaged_files_are_text_or_one_reason() -> None:
    whole = pdf_of([column(wrapped(TEXT, 80), 60, 700)] * 3)
    cases = [b"", b"%PDF-1.7", b"not a PDF", whole[: len(whole) // 2], whole[:-40], whole.replace(b"/Kids[", b"/Kids[2 0 R ")]
    cases += [whole.replace(b"/Count 3", b"/Count 1000000000"), whole.replace(b"startxref", b"startxxxx")]
    cases += [whole[:place] + bytes([whole[place] ^ 1 << place % 8]) + whole[place + 1 :] for place in range(9, len(whole), 61)]
    for data in cases:
        try:
            assert pdf.read(data, "a.pdf", OPTIONS)[0].text
        except Unreadable as reason:
            assert str(reason).split(":")[0] in ("damaged", "empty", "encrypted")


def scan(text: str, form: str = "PNG", **settings: object) -> bytes:
    from PIL import Image, ImageDraw, ImageFont

    image = Image.new("RGB", (600, 260), "white")
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(text.split("\n")):
        draw.text((30, 40 + 80 * number), line, fill="black", font=ImageFont.load_default(40))
    out = io.BytesIO()
    image.save(out, form, **settings)
    return out.getvalue()


def scanned_pdf() -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.open(io.BytesIO(scan("The baker\nsells bread"))).save(out, "PDF", resolution=100)
    return out.getvalue()


def test_scans_say_what_would_read_them() -> None:
    with pytest.raises(Unreadable, match=r"^empty.*--ocr"):
        pdf.read(scanned_pdf(), "a.pdf", OPTIONS)
    with pytest.raises(Unreadable, match=r"--ocr.*cllm\[ocr\]"):
        images.read(scan("The baker"), "a.png", OPTIONS)


def test_characters_are_recognised_without_any_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("rapidocr", reason="needs cllm[ocr]")
    import socket

    def refused(*arguments: object) -> None:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket, "socket", refused)
    monkeypatch.setattr(socket, "create_connection", refused)
    ocr = Options(ocr=True)
    assert images.read(scan("The baker\nsells bread"), "a.png", ocr)[0].text.split() == ["The", "baker", "sells", "bread"]
    assert pdf.read(scanned_pdf(), "a.pdf", ocr)[0].text.split() == ["The", "baker", "sells", "bread"]
    with pytest.raises(Unreadable, match=r"^empty"):
        images.read(scan(""), "a.png", ocr)


def test_images_that_are_no_pages_are_refused() -> None:
    ocr = Options(ocr=True)
    small = scan("x")
    head = b"IHDR" + (40_000).to_bytes(4, "big") * 2 + small[24:29]
    huge = small[:12] + head + zlib.crc32(head).to_bytes(4, "big") + small[33:]
    with pytest.raises(Unreadable, match=r"^too large"):
        images.read(huge, "a.png", ocr)
    for data in (b"\x89PNG\r\n\x1a\n", scan("x")[:60], b"GIF89a", b"no image", b"%PDF-1.4"):
        with pytest.raises(Unreadable, match=r"^damaged"):
            images.read(data, "a.png", ocr)


def test_lines_of_recognised_pieces_are_in_the_order_of_reading() -> None:
    def box(left: float, top: float) -> list[list[float]]:
        return [[left, top], [left + 50, top], [left + 50, top + 20], [left, top + 20]]

    assert images.in_lines([(box(0, 42), "third"), (box(90, 3), "second"), (box(0, 0), "first")]) == "first second\nthird"
