"""Pages of HTML become the text that their reader came for, with structure as Markdown and what the head tells."""

import json
import time

import pytest

pytest.importorskip("lxml", reason="needs cllm[data]")
pytest.importorskip("trafilatura", reason="needs cllm[data]")
pytest.importorskip("resiliparse", reason="needs cllm[data]")

from cllm.data.extract import html
from cllm.data.extract.document import Unreadable
from cllm.data.extract.kinds import kind_of
from cllm.data.extract.options import Options

OPTIONS = Options()

# ruff: noqa: E501 - pages are written as they come
SPHINX = """<!DOCTYPE html><html lang="en-GB"><head><meta name="generator" content="Docutils 0.19"><title>pump — Pumps &#8212; Manual</title>
<link rel="canonical" href="https://example.org/pump.html"><link rel="license" href="https://creativecommons.org/licenses/by/4.0/"></head><body>
<div class="related" role="navigation"><ul><li>index</li><li>modules</li></ul></div>
<div class="document"><div class="body" role="main"><section id="pump">
<h1><span class="section-number">3. </span><code>pump</code> — Pumps<a class="headerlink" href="#pump" title="Permalink">¶</a></h1>
<p>A pump moves water<br>uphill, see <a href="valve.html">the valve</a>.</p>
<dl class="py function"><dt class="sig"><code class="sig-prename">pump.</code><code class="sig-name">start</code>(<em>speed</em>, <em>*</em>)<a class="headerlink">¶</a></dt>
<dd><p>Start it.</p><p>Raises when dry.</p><ul><li><p>first</p><ul><li>inner</li></ul></li><li>second</li></ul></dd></dl>
<div class="highlight-c notranslate"><div class="highlight"><pre><span></span><span class="k">if</span> (wet) {
    start();
}
</pre></div></div>
<table class="docutils"><caption>Sizes</caption><thead><tr><th>Name</th><th>Litres</th></tr></thead><tbody><tr><td>small</td><td>3 | 4</td></tr><tr><td colspan="2">large</td></tr></tbody></table>
<ol start="4"><li>open</li><li>close</li></ol>
</section></div></div><div class="sphinxsidebar" role="navigation"><p>Quick search</p></div><div class="footer">© Copyright</div></body></html>"""


def test_documentation_keeps_all_structure_and_no_navigation() -> None:
    (document,) = html.read(SPHINX.encode(), "pump.html", OPTIONS)
    assert (document.title, document.language, document.url) == ("pump — Pumps — Manual", "en", "https://example.org/pump.html")
    assert document.licence == "https://creativecommons.org/licenses/by/4.0/"
    assert document.text == (
        "# `pump` — Pumps\n\nA pump moves water\nuphill, see the valve.\n\n"
        "pump.start(speed, *)\n:   Start it.\n\n    Raises when dry.\n\n    - first\n      - inner\n    - second\n\n"
        "```c\nif (wet) {\n    start();\n}\n```\n\n"
        "Sizes\n\n| Name | Litres |\n| --- | --- |\n| small | 3 \\| 4 |\n| large |  |\n\n4. open\n5. close"
    )


PARAGRAPHS = [
    "The old mill at the edge of the village had stood empty for eleven years when the council, after a long and bitter argument, sold it to a baker.",
    "He repaired the wheel first, because nobody believed that he could, and for a whole winter the sound of hammers carried across the frozen river.",
    "In spring the first loaves were given away, one to each house, together with a short letter in which he asked what kind of bread people missed most.",
]


def page(body: str, head: str = "") -> str:
    return f'<html lang="de"><head><title>The mill turns again - Valley News</title>{head}</head><body>{body}</body></html>'


ARTICLE = page(
    '<header><nav><a href="/">Home</a> <a href="/s">Sports</a></nav></header><article><h1>The mill turns again</h1>'
    '<time datetime="2024-05-17T08:00:00Z">17 May</time>'
    + "".join(f"<p>{text}</p>" for text in PARAGRAPHS)
    + '</article><aside class="related"><h3>Read more</h3><ul><li><a href="/a">Mayor resigns over parking dispute</a></li></ul></aside>'
    '<section id="comments"><h2>Comments</h2><div class="comment"><p>I never liked that baker, said my grandmother often and loudly.</p></div></section>'
    "<footer><p>© Valley News. All rights reserved. Imprint and privacy.</p></footer>"
)


def test_article_without_navigation_comments_and_related_pages() -> None:
    text = html.article_text(ARTICLE)
    assert all(paragraph in text for paragraph in PARAGRAPHS)
    assert not any(words in text for words in ("Sports", "Mayor resigns", "never liked", "All rights reserved"))
    (document,) = html.read(ARTICLE.encode(), "mill.html", OPTIONS)
    assert all(paragraph in document.text for paragraph in PARAGRAPHS)
    assert (document.title, document.date, document.language) == ("The mill turns again", "2024-05-17", "de")


def test_charset_that_the_page_declares() -> None:
    text = ARTICLE.replace("<title>", '<meta charset="windows-1251"><title>').replace(
        PARAGRAPHS[0], "Старая мельница на краю деревни пустовала одиннадцать лет. " * 4
    )
    assert "Старая мельница" in html.read(text.encode("cp1251"), "a.html", OPTIONS)[0].text


@pytest.mark.parametrize(
    "data", [b"", b"  \n", b"<html><body><script>var a = 1;</script></body></html>", b"<html></html>", b"<", b"<!-- only a comment -->"]
)
def test_pages_without_text_say_so(data: bytes) -> None:
    with pytest.raises(Unreadable, match=r"^empty"):
        html.read(data, "empty.html", OPTIONS)


@pytest.mark.parametrize(
    "body",
    [
        "<div>" * 20_000 + "<p>deep text of the page</p>" + "</div>" * 20_000,
        "<div><p>deep text of the page" * 20_000,
        "<table>" + "<tr><td>deep text</td><td>of the page</td></tr>" * 100_000 + "</table>",
        "<p>" + "deep text of the page " * 450_000 + "</p>",
        "<script>if (a < b) { document.write('<div>') }</script>" * 20_000 + "<p>deep text of the page</p>",
        "<p>deep text of the page</p>" + "<b><i>" * 5_000,
        "<p>deep text of the page</p><!--" + "-" * 1_000_000,
        "<p>deep text of the page</p><a " + "a=1 " * 300_000,
        "<p>deep text of the page</p>" + "&#65;" * 500_000,
    ],
    ids=["nested", "unclosed", "rows", "one line", "scripts", "inline", "comment", "attributes", "entities"],
)
def test_hostile_pages_take_bounded_time(body: str) -> None:
    start = time.process_time()
    (document,) = html.read(page(body).encode(), "hostile.html", OPTIONS)
    assert time.process_time() - start < 30  # the deadline of a document; without the checks before parsing some of these take minutes
    assert "deep text" in document.text


def test_headline_stamps_and_invitations_are_no_part_of_the_article() -> None:
    around = "<h1>The mill turns again</h1><p>By Anna Schmidt</p><p>Published 17 May 2024, 8:00 am</p>"
    body = around + "".join(f"<p>{text}</p>" for text in PARAGRAPHS) + "<p>Read more: Mayor resigns</p><p>Share this on Facebook</p>"
    assert html.article_text(page(f"<article>{body}</article>")).split("\n") == PARAGRAPHS
    assert html.read(page(f"<article>{body}</article>").encode(), "a.html", OPTIONS)[0].text.split("\n\n") == PARAGRAPHS


def test_article_that_only_a_script_would_show_comes_from_its_description() -> None:
    told = " ".join(PARAGRAPHS)
    described = json.dumps({"@graph": [{"@type": "NewsArticle", "articleBody": told}]})
    script = f'<script type="application/ld+json">{described}</script>'
    shown = "".join(f"<span>{text} </span>" for text in PARAGRAPHS)
    links = "".join(f'<li><a href="/{number}">Another story of the valley, number {number}</a></li>' for number in range(40))
    assert html.article_text(page(f"<ul>{links}</ul><div>{shown}</div>", script)).split() == told.split()


def test_charset_that_the_server_said() -> None:
    text = ARTICLE.replace(PARAGRAPHS[0], "Старая мельница на краю деревни пустовала одиннадцать лет. " * 4)
    told = Options(content_type="text/html; charset=koi8-r")
    assert "Старая мельница" in html.read(text.encode("koi8-r", "replace"), "a.html", told)[0].text


@pytest.mark.parametrize(
    ("told", "text", "codec"),
    [
        ("utf-8", "Größe und Äpfel für die Gäste im Frühling", "cp1252"),  # a server that says the same of all pages
        ("iso-8859-1", "“Smart quotes” — and dashes for 20 €", "cp1252"),  # browsers take the one for the other
        ("iso-8859-1", "Größe und Äpfel für die Gäste", "utf-8"),
        ("us-ascii", "Größe und Äpfel für die Gäste", "cp1252"),
        ("iso-8859-9", "“Çocuklar” — bahçede koşuyor", "cp1254"),
        ("gb2312", "朱镕基和他的朋友们在喆园喝茶", "gb18030"),
        ("shift_jis", "①髙島屋の前で待っています", "cp932"),
        ("shift_jis", "朝〜夜まで待っています", "shift_jis"),
        ("euc-kr", "펲시콜라와 똠방각하를 보았다", "cp949"),
        ("iso-8859-2", "Žluťoučký kůň stál u řeky", "iso-8859-2"),
        ("x-nothing", "Größe und Äpfel für die Gäste", "utf-8"),
    ],
)
def test_charset_that_is_declared_is_taken_as_browsers_take_it_unless_the_bytes_tell_otherwise(told: str, text: str, codec: str) -> None:
    content = f"<html><body><article><p>{text}.</p><p>{text}!</p></article></body></html>".encode(codec)
    assert text in html.read(content, "a.html", Options(content_type=f"text/html; charset={told}"))[0].text
    if told != "utf-8":
        meta = content.replace(b"<body>", f"<head><meta charset={told}></head><body>".encode())
        assert text in html.read(meta, "a.html", OPTIONS)[0].text


def test_zero_bytes_in_a_page_are_passed_over() -> None:
    content = page(f"<article><p>{PARAGRAPHS[0]}</p></article>").encode().replace(b" ", b" \0")
    assert kind_of("page", content) == "html"
    assert PARAGRAPHS[0] in html.read(content, "page", OPTIONS)[0].text


def test_markdown_of_articles_keeps_structure() -> None:
    body = f"<p>{PARAGRAPHS[0]}</p><h2>Bread</h2><ul><li>rye from the old oven</li><li>wheat</li></ul><p>{PARAGRAPHS[1]}</p>"
    body += "<pre><code>for loaf in oven:\n    sell(loaf)</code></pre>" + f"<p>{PARAGRAPHS[2]}</p>"
    (document,) = html.read(page(f"<article>{body}</article>").encode(), "a.html", OPTIONS)
    assert document.text == (
        f"{PARAGRAPHS[0]}\n\n## Bread\n\n- rye from the old oven\n- wheat\n\n{PARAGRAPHS[1]}\n\n"
        f"```\nfor loaf in oven:\n    sell(loaf)\n```\n\n{PARAGRAPHS[2]}"
    )
