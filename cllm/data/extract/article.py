"""The article of a page: by trafilatura, which leads on articles; what else the page shows decides whether that found enough.

trafilatura set for precision is the best single extractor of articles, but drops most of some pages. Where it keeps little of the page's
paragraphs it is asked again for recall, and where the page carries its article's text in JSON-LD, that says which of the answers is right.
"""

from collections import Counter
from typing import Any

from cllm.data.extract.article_lines import without_surroundings
from cllm.data.extract.html_head import json_ld, titles_of
from cllm.data.extract.markdown import to_markdown

_LITTLE = 0.6  # of the words in the page's paragraphs, below which the article may be more
_MUCH_LESS = 0.3  # of what is found when asked for recall, below which that is taken
_FEW_WORDS = 60
_TRUE_WORDS = 80  # that the text in JSON-LD has at least, to be believed
_LIKE = 0.8  # F1 of words from which an answer is what JSON-LD says


def article(root: Any, page: str, markdown: bool) -> str:
    """The article of a page without navigation, comments and what stands around it, as Markdown or plain text; empty where there is none."""
    titles = titles_of(root)  # before trafilatura, which changes the tree that it is given
    told = _told(root)
    paragraphs = sum(_count("".join(paragraph.itertext())) for paragraph in root.iter("p"))
    text = _trafilatura(root, markdown, precision=True)
    if told and _likeness(text, told) < _LIKE:
        answers = [text, _trafilatura(root, markdown, precision=False), told]
        text = max(answers, key=lambda answer: _likeness(answer, told)) if _likeness(answers[1], told) < _LIKE else answers[1]
    elif not told and _count(text) < max(_FEW_WORDS, _LITTLE * paragraphs):
        more = _trafilatura(root, markdown, precision=False)
        if _count(text) < _MUCH_LESS * _count(more):
            text = more
    return without_surroundings(text, titles) if text else _resiliparse(page)


def _trafilatura(root: Any, markdown: bool, precision: bool) -> str:
    """What trafilatura takes for the article, set for precision or for recall; as Markdown by our own rules, which it gets as HTML."""
    import trafilatura
    from lxml.html import document_fromstring

    text = trafilatura.extract(
        root,
        favor_precision=precision,
        favor_recall=not precision,
        include_comments=False,
        include_links=False,
        include_images=False,
        include_formatting=markdown,
        output_format="html" if markdown else "txt",
    )
    return to_markdown(document_fromstring(text)) if text and markdown else text or ""


def _resiliparse(page: str) -> str:
    from resiliparse.extract.html2text import extract_plain_text

    return extract_plain_text(page, main_content=True, alt_texts=False, links=False, form_fields=False)


def _told(root: Any) -> str:
    """The article as the page's JSON-LD gives it in plain text; empty where that is missing, short, or written in HTML."""
    bodies = [body for thing in json_ld(root) if isinstance(body := thing.get("articleBody"), str) and "<" not in body]
    longest = max(bodies, key=len, default="")
    page = Counter(_words("".join(root.itertext())))
    words = Counter(_words(longest))
    seen = sum((words & page).values())
    return longest if sum(words.values()) >= _TRUE_WORDS and seen >= 0.9 * sum(words.values()) else ""


def _likeness(text: str, other: str) -> float:
    """F1 of the words of two texts."""
    ours, theirs = Counter(_words(text)), Counter(_words(other))
    return 2 * sum((ours & theirs).values()) / max(1, sum(ours.values()) + sum(theirs.values()))


def _words(text: str) -> list[str]:
    return text.split()


def _count(text: str) -> int:
    """Words; a character of a script without spaces counts as half of one."""
    return max(len(text.split()), len(text) // 12)
