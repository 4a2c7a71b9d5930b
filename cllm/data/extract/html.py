"""HTML to text: the article of a page, or the whole main part of a page of documentation.

`article_text` gives plain text, as extractors are compared by; `read` gives Markdown. Pages that no parser of trees should be given (very large, very
deep) go to resiliparse, or lose their tags where they are too deep for that as well.
"""

import re
from typing import Any

from cllm.data.documents.charset import Binary, decode
from cllm.data.extract.article import article
from cllm.data.extract.decoding import declared, refusal
from cllm.data.extract.document import Document, Unreadable
from cllm.data.extract.documentation import is_aside, main_part
from cllm.data.extract.html_head import Head, head_of
from cllm.data.extract.html_strip import strip_tags
from cllm.data.extract.markdown import to_markdown
from cllm.data.extract.options import Options

_LARGEST_TREE = 4_000_000  # characters
_MOST_TAGS = 60_000
_DEEPEST = 200  # the parser of libxml2 drops what stands deeper than 255 elements
_DEEPEST_LINEAR = 1_000
_NESTING = re.compile(r"<(/?)(?:div|span|table|t[rd]|[uod]l|dd|section|article|blockquote|font|center|[bi]|em|strong|a)\b", re.IGNORECASE)
_NOT_XML = re.compile("[\x00-\x08\x0b\x0e-\x1f\x7f\ud800-\udfff\ufffe\uffff]")


def read(data: bytes, name: str, options: Options) -> list[Document]:
    """One document a page, as Markdown, with what its head tells. Raises Unreadable where the page has no text."""
    page = decoded(data, options)
    root = tree(page)
    if root is None:
        text, head = _linear(page), Head()
    else:
        head = head_of(root)
        main = main_part(root)
        text = to_markdown(main, is_aside) if main is not None else ""
        if not text:
            text = article(root, page, markdown=True) or _linear(page)
    if not text.strip():
        raise Unreadable("empty: the page has no text besides navigation; cllm crawl --browser stores what scripts write")
    return [Document(text, title=head.title, date=head.date, language=head.language, licence=head.licence, url=head.url)]


def article_text(page: str | bytes) -> str:
    """The plain text of a page's article without navigation, comments and advertisements; empty where there is none."""
    if isinstance(page, bytes):
        page = decoded(page, Options())
    root = tree(page)
    return _linear(page) if root is None else article(root, page, markdown=False)


def decoded(data: bytes, options: Options) -> str:
    """The characters of a page, in the charset that its mark, its server, its head or its letters tell. Raises Unreadable."""
    if not data.strip(b" \t\r\n\0<>"):
        raise Unreadable("empty: the page has no bytes")
    found = decode(data, declared(options, data))
    if isinstance(found, Binary) and b"\0" in data:
        data = data.replace(b"\0", b"")  # as browsers do
        found = decode(data, declared(options, data))
    if isinstance(found, Binary):
        raise Unreadable(refusal(found))
    return found[0]


def tree(page: str) -> Any | None:
    """The page as a tree of lxml; None where it is too large or too deep for one."""
    from lxml import etree
    from lxml.html import HTMLParser, document_fromstring

    if len(page) > _LARGEST_TREE or page.count("<") > _MOST_TAGS or _depth(page) > _DEEPEST:
        return None
    parser = HTMLParser(encoding="utf-8", no_network=True, huge_tree=False, remove_comments=True, remove_pis=True)
    try:
        return document_fromstring(_NOT_XML.sub(" ", page).encode("utf-8"), parser=parser)
    except (etree.ParserError, etree.XMLSyntaxError, ValueError):
        return None


def _depth(page: str) -> int:
    """How deep the elements that pages nest are nested, about: elements that are never closed count as open."""
    depth = deepest = 0
    for tag in _NESTING.finditer(page):
        depth = max(0, depth - 1) if tag.group(1) else depth + 1
        deepest = max(deepest, depth)
    return deepest


def _linear(page: str) -> str:
    """The main text of a page of any size, by resiliparse; all of its text where that finds no main part.

    Its time grows with the square of the depth, so very deep pages only lose their tags.
    """
    from resiliparse.extract.html2text import extract_plain_text

    if _depth(page) > _DEEPEST_LINEAR:
        return strip_tags(page)
    text = extract_plain_text(page, main_content=True, alt_texts=False, noscript=False)
    return (text.strip() and text) or extract_plain_text(page, alt_texts=False, noscript=True)
