"""PDF to text: by PDFium, with pypdf for files that it refuses.

The lines of each page are put in the order of reading (pdf_lines.py, pdf_order.py), what repeats at the edges of pages is left out, and lines become
paragraphs again (pdf_paragraphs.py). PDFium is not thread-safe: one file at a time in a process.
"""

import io
import re
from typing import Any

from cllm.data.extract.document import Document, Unreadable
from cllm.data.extract.options import Options
from cllm.data.extract.pdf_lines import Line, lines_of
from cllm.data.extract.pdf_order import in_reading_order
from cllm.data.extract.pdf_paragraphs import paragraphs, without_edges

_MOST_PAGES = 5_000
_FEW_CHARACTERS = 8  # a page with no more has no text worth the name: a number stamped on a scan
_DOTS_PER_INCH = 200
_LONGEST_SIDE = 4_000  # pixels of a rendered page
_WRONG_PASSWORD = 4  # FPDF_ERR_PASSWORD


def read(data: bytes, name: str, options: Options) -> list[Document]:
    """One document. Raises Unreadable: encrypted, damaged, or empty where its pages are scanned and recognition was not asked for."""
    import pypdfium2

    if not data.strip():
        raise Unreadable("empty: the file has no bytes")
    try:
        file = _opened(data, options)
    except pypdfium2.PdfiumError as error:
        return [_by_pypdf(data, options, error)]
    try:
        return [_document(file, options)]
    finally:
        file.close()


def _opened(data: bytes, options: Options) -> Any:
    """The open file. Raises Unreadable where no password fits, PdfiumError where PDFium does not understand the file."""
    import pypdfium2

    for password in (None, *options.passwords):
        try:
            return pypdfium2.PdfDocument(data, password=password)
        except pypdfium2.PdfiumError as error:
            if getattr(error, "err_code", None) != _WRONG_PASSWORD and "password" not in str(error).lower():
                raise
    raise _encrypted(options)


def _encrypted(options: Options) -> Unreadable:
    return Unreadable("encrypted: none of the passwords opens it" if options.passwords else "encrypted: it opens with a password only, give one")


def _document(file: Any, options: Options) -> Document:
    import pypdfium2

    pages: list[list[Line]] = []
    recognised: dict[int, str] = {}
    scanned: list[int] = []
    damaged = 0
    count = len(file)
    for number in range(min(count, _MOST_PAGES)):
        page = None
        try:
            page = file[number]
            lines = lines_of(page)
            if sum(len(line.text) for line in lines) <= _FEW_CHARACTERS and _has_content(page):
                scanned.append(number)
                if options.ocr:
                    recognised[number] = _recognise(page, options)
        except pypdfium2.PdfiumError:
            damaged += 1
            lines = []
        finally:
            if page is not None:
                page.close()
        pages.append([] if number in recognised else in_reading_order(lines))
    blocks = paragraphs(without_edges(pages), recognised)
    text = "\n\n".join(blocks)
    if not text.strip():
        if scanned and not options.ocr:
            raise Unreadable(f"empty: {_pages(len(scanned), count)} scanned, read them with --ocr and the extra cllm[ocr]")
        raise Unreadable("damaged: no page could be read" if damaged else "empty: no page has text")
    unread = len(scanned) - sum(1 for found in recognised.values() if found)
    notes = [f"{_pages(unread, count)} without text" + ("" if options.ocr else ", read them with --ocr and the extra cllm[ocr]")] if unread else []
    notes += [f"{_pages(damaged, count)} damaged"] if damaged else []
    notes += [f"truncated after {_MOST_PAGES:,} of {count:,} pages"] if count > _MOST_PAGES else []
    told = file.get_metadata_dict(skip_empty=True)
    return Document(
        text, title=_title(told.get("Title", ""), text), date=pdf_date(told.get("CreationDate") or told.get("ModDate") or ""), note="; ".join(notes)
    )


def _pages(some: int, count: int) -> str:
    verb = "is" if some == 1 else "are"
    return f"{some:,} of {count:,} {'page' if count == 1 else 'pages'} {verb}"


def _has_content(page: Any) -> bool:
    return next(page.get_objects(max_depth=2), None) is not None


def _recognise(page: Any, options: Options) -> str:
    from cllm.data.extract.images import recognise

    width, height = page.get_size()
    scale = min(_DOTS_PER_INCH / 72, _LONGEST_SIDE / max(width, height, 1))
    return recognise(page.render(scale=scale).to_pil().convert("RGB"), options)


def _title(told: str, text: str) -> str:
    """The title that the file names, unless that is the name of the file it was made from; otherwise its first heading."""
    told = " ".join(told.split())
    if told and not re.search(
        r"\.(?:docx?|pptx?|xlsx?|tex|dvi|odt|indd|qxd|pdf|html?|md|rtf|pub)$|^(?:untitled|microsoft word)", told, re.IGNORECASE
    ):
        return told
    first = text.partition("\n")[0]
    return first.lstrip("# ") if first.startswith("#") else ""


def pdf_date(told: str) -> str:
    """D:20240517083000+02'00' as 2024-05-17; empty for what is no date."""
    day = re.match(r"(?:D:)?((?:19|20)\d\d)-?(0[1-9]|1[0-2])?-?(0[1-9]|[12]\d|3[01])?", told)
    if not day:
        return ""
    parts = [day.group(1), day.group(2), day.group(3) if day.group(2) else None]
    return "-".join(part for part in parts if part)


def _by_pypdf(data: bytes, options: Options, refusal: Exception) -> Document:
    """The text of a file that PDFium refuses. Raises Unreadable."""
    import logging

    from pypdf import PdfReader

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    damaged = Unreadable("damaged: not a whole PDF file; perhaps it is truncated")
    if b"%PDF-" not in data[:1_024]:
        raise damaged from refusal
    try:
        reader = PdfReader(io.BytesIO(data))
        if reader.is_encrypted and not any(reader.decrypt(password) for password in ("", *options.passwords)):
            raise _encrypted(options)
        texts = []
        for number, page in enumerate(reader.pages):
            if number >= _MOST_PAGES:
                break
            texts.append(page.extract_text() or "")
        told: Any = reader.metadata or {}
        title, date = str(told.get("/Title") or ""), str(told.get("/CreationDate") or "")
    except Unreadable:
        raise
    except (MemoryError, RecursionError):
        raise
    except Exception as error:  # pypdf raises many kinds for damaged files, all of which mean the same here
        raise damaged from error
    text = "\n\n".join(text.strip() for text in texts if text.strip())
    if not text:
        raise damaged from refusal
    return Document(text, title=_title(title, text), date=pdf_date(date), note="the file is damaged; its lines are kept as they are on the page")
