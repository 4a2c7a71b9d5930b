"""E-books (epub): the chapters in the order of reading, as one document."""

import posixpath
from typing import Any
from urllib.parse import unquote

from cllm.data.extract.document import Document, Unreadable
from cllm.data.extract.html import decoded, tree
from cllm.data.extract.html_strip import strip_tags
from cllm.data.extract.markdown import to_markdown
from cllm.data.extract.options import Options
from cllm.data.extract.package import Package, iso_date, language_code, local, properties

_FONTS = ("http://www.idpf.org/2008/embedding", "http://ns.adobe.com/pdf/enc#RC")
_CHAPTERS = ("application/xhtml+xml", "text/html", "application/x-dtbook+xml", "text/x-oeb1-document")
_MOST_CHAPTERS = 20_000


def read(data: bytes, name: str, options: Options) -> list[Document]:
    """One document. Raises Unreadable."""
    package = Package(data)
    _check_encryption(package)
    book_part = _book(package)
    book = package.xml(book_part)
    folder = posixpath.dirname(book_part)
    items = {item.get("id") or "": item for item in book.iter("{*}item")}
    chapters, missing = [], 0
    for reference in list(book.iter("{*}itemref"))[:_MOST_CHAPTERS]:
        item = items.get(reference.get("idref") or "")
        if item is None or "nav" in (item.get("properties") or "").split() or item.get("media-type") not in _CHAPTERS:
            continue
        part = posixpath.normpath(posixpath.join(folder, unquote((item.get("href") or "").partition("#")[0])))
        try:
            if text := _chapter(package.read(part), options):
                chapters.append(text)
        except Unreadable:
            missing += 1
    if not chapters:
        raise Unreadable("empty: no chapter of the book has text")
    told = properties(next((element for element in book if local(element) == "metadata"), None))
    return [
        Document(
            "\n\n".join(chapters),
            title=told.get("title", ""),
            date=iso_date(told.get("date", "")),
            language=language_code(told.get("language", "")),
            licence=told.get("rights", ""),
            note=f"{missing} chapters could not be read" if missing else "",
        )
    ]


def _check_encryption(package: Package) -> None:
    """Raises Unreadable where more than fonts is encrypted."""
    root: Any = package.optional_xml("META-INF/encryption.xml")
    methods = [method.get("Algorithm") for method in root.iter("{*}EncryptionMethod")] if root is not None else []
    if any(method not in _FONTS for method in methods) or ("META-INF/rights.xml" in package.names and methods):
        raise Unreadable("encrypted: the book has copy protection (DRM), for which no password helps")


def _book(package: Package) -> str:
    container = package.optional_xml("META-INF/container.xml")
    for file in container.iter("{*}rootfile") if container is not None else ():
        if (path := file.get("full-path") or "") in package.names:
            return path
    for part in sorted(package.names):
        if part.endswith(".opf"):
            return part
    raise Unreadable("damaged: the book does not name its chapters")


def _chapter(content: bytes, options: Options) -> str:
    page = decoded(content, options)
    root = tree(page)
    if root is None:
        return strip_tags(page)
    body = root.find("body")
    return to_markdown(body, lambda element: element.tag == "nav") if body is not None else ""
