"""Pages of documentation, whose main part is taken whole.

Extractors of articles drop what a reference consists of: tables, definition lists, signatures and code. The generators of documentation leave
marks in their pages, and put everything that is not navigation into one element.
"""

import re
from typing import Any

from cllm.data.extract.markdown import is_hidden, names

_GENERATORS = re.compile(
    r"sphinx|docutils|doxygen|javadoc|mkdocs|docusaurus|asciidoc|docbook|gitbook|mdbook|vitepress|vuepress|rustdoc|pdoc|\byard|rdoc|publican|antora|texinfo|"
    r"makeinfo|latex2html|latex2man|pod::|\bnbconvert|qdoc|exdoc|typedoc|haddock|groff|mandoc|man2html|starlight|ocamldoc|godoc|swift-docc|naturaldocs|dblatex",
    re.IGNORECASE,
)
_MARKS = (  # of generators that do not name themselves
    "//script[@id='documentation_options' or contains(@src, '_static/doctools.js') or contains(@src, '_static/documentation_options.js')]",
    "//link[contains(@href, '_static/pygments.css')]",
    "//div[contains(concat(' ', @class, ' '), ' sphinxsidebar ')]",
    "//div[contains(@class, 'theme-doc-markdown')]",
    "//html[contains(@class, 'mdbook') or contains(@class, 'docs-doc-page')] | //body[contains(@class, 'rustdoc')]",
    "//div[contains(@class, 'md-content') and @data-md-component='content']",
    "//div[@class='navheader' and .//a[@accesskey='n']]",
    "//table[@class='head']//td[contains(@class, 'head-ltitle')]",
)
_MAIN = (  # the first of these that holds enough is the main part
    "//*[@role='main']//*[@itemprop='articleBody']",
    "//article[@role='main']",
    "//*[contains(@class, 'theme-doc-markdown')]",
    "//*[@data-md-component='content']//article",
    "//*[@role='main']",
    "//main//article",
    "//main",
    "//div[@class='body' or @id='content' or @id='main-content' or @class='contents' or @id='doc-content' or @id='contents']",
    "//article",
)
_LEAST = 0.15  # of the letters on the page, that its main part holds: pages of little text have long menus
_ASIDE_TAGS = frozenset(("nav", "footer"))
_ASIDE_ROLES = frozenset(("navigation", "contentinfo", "search", "banner"))
# Numbers of sections, and notes that a generator puts on every entry, are no more part of the text than navigation is.
_ASIDE_CLASSES = names(
    "sphinxsidebar related toc contents localtoc toctree-wrapper footer navheader navfooter breadcrumb breadcrumbs wy-breadcrumbs navbar "
    "rst-footer-buttons prev-next-area prev-next-footer pagination-nav theme-doc-toc-mobile theme-doc-breadcrumbs theme-doc-footer "
    "md-source-file edit-this-page table-of-contents tableofcontents toctitle tocwrapper sidebartoc page-toc navpath nav-wrapper "
    "nav-chapters section-number sectnum stableabi refcount"
)
_ASIDE_IDS = frozenset(("toc", "table-of-contents", "TOC", "nav-path", "searchbox", "footer", "navigation", "sidebar"))


def main_part(root: Any) -> Any | None:
    """The element of a documentation page that holds all but its navigation; None where the page is no documentation."""
    if not (_GENERATORS.search(_generator(root)) or any(root.xpath(mark) for mark in _MARKS) or _is_reference(root)):
        return None
    body = root.find("body")
    enough = _LEAST * _letters(body) if body is not None else 0
    for place in _MAIN:
        for element in root.xpath(place):
            if _letters(element) > enough:
                return element
    return body


def is_aside(element: Any) -> bool:
    """Whether an element of a documentation page's main part is navigation: bars, lists of contents, footers."""
    get = element.get
    if element.tag in _ASIDE_TAGS or get("role") in _ASIDE_ROLES or get("id") in _ASIDE_IDS:
        return True
    classes = get("class")
    return bool(classes) and not _ASIDE_CLASSES.isdisjoint(classes.split())


def _generator(root: Any) -> str:
    return " ".join(meta.get("content") or "" for meta in root.iterfind(".//meta[@name]") if meta.get("name").lower() == "generator")


def _is_reference(root: Any) -> bool:
    """A page without known marks, most of whose main part is code, definitions and tables, and that does not call itself an article."""
    places = root.xpath("//main | //*[@role='main']")
    if len(places) != 1:
        return False
    if root.xpath("//meta[@property='og:type' and @content='article'] | //meta[@property='article:published_time'] | //*[@itemprop='datePublished']"):
        return False
    main = places[0]
    words = _letters(main)
    reference = sum(_letters(element) for element in main.iter("pre", "dl", "table") if _outermost(element, main))
    links = sum(_letters(element) for element in main.iter("a"))
    return words > 400 and reference > 0.5 * words and links < 0.4 * words


def _outermost(element: Any, main: Any) -> bool:
    parent = element.getparent()
    while parent is not None and parent is not main:
        if parent.tag in ("pre", "dl", "table"):
            return False
        parent = parent.getparent()
    return True


def _letters(element: Any) -> int:
    return 0 if is_hidden(element) else sum(len(text.strip()) for text in element.itertext())
