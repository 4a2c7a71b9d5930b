"""What a page tells about itself: title, date, language, licence and its canonical address."""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

_DATE_NAMES = (  # in this order; the day on which something was first published says more than when it was changed
    "article:published_time", "datepublished", "dc.date.issued", "dcterms.issued", "dc.date.created", "dcterms.created", "citation_publication_date",
    "citation_date", "parsely-pub-date", "sailthru.date", "dc.date", "dcterms.date", "pubdate", "publish-date", "date", "article:modified_time",
    "og:updated_time", "dcterms.modified", "last-modified",
)  # fmt: skip
_DATE = re.compile(r"(?<!\d)((?:19|20)\d\d)[-/.](0[1-9]|1[0-2])(?:[-/.](0[1-9]|[12]\d|3[01]))?(?!\d)")
_SPACE = re.compile(r"\s+")
_SITE = re.compile(r"\s+[|\u2013\u2014\u00bb\u00b7:-]\s+")
_LARGEST_JSON = 1_000_000


@dataclass(frozen=True)
class Head:
    title: str = ""
    date: str = ""
    language: str = ""
    licence: str = ""
    url: str = ""


def head_of(root: Any) -> Head:
    """The head of a page of lxml elements. Fields that the page does not tell are empty."""
    named: dict[str, str] = {}
    for meta in root.iter("meta"):
        name = (meta.get("property") or meta.get("name") or meta.get("itemprop") or meta.get("http-equiv") or "").lower()
        if name and (content := (meta.get("content") or "").strip()):
            named.setdefault(name, content)
    linked = list(json_ld(root))
    return Head(_title(root, named), _date(root, named, linked), _language(root, named), _licence(root, named), _canonical(root, named))


def titles_of(root: Any) -> list[str]:
    """Everything that a page may be called, with and without the name of its site."""
    told = [_text(title) for title in root.iter("title")][:1]
    told += [meta.get("content") or "" for meta in root.iter("meta") if meta.get("property") in ("og:title", "twitter:title")]
    headings = [_text(heading) for heading in root.iter("h1")]
    told += [heading for heading in headings if len(headings) == 1 or any(heading in title for title in told)]
    return told + [part for title in told for part in _SITE.split(title)[:1]]


def json_ld(root: Any) -> Iterator[dict]:
    """Every object that a page describes itself with in JSON-LD, those in lists and in @graph included."""
    for script in root.iter("script"):
        if "ld+json" not in (script.get("type") or "").lower() or not script.text or len(script.text) > _LARGEST_JSON:
            continue
        try:
            todo = [json.loads(script.text.strip().removeprefix("<!--").removesuffix("-->"), strict=False)]
        except (ValueError, RecursionError):
            continue
        while todo:
            value = todo.pop(0)
            if isinstance(value, list):
                todo.extend(value)
            elif isinstance(value, dict):
                yield value
                todo.extend(value[key] for key in ("@graph", "mainEntity", "mainEntityOfPage") if isinstance(value.get(key), list | dict))


def _title(root: Any, named: dict[str, str]) -> str:
    headings = [_text(heading) for heading in root.iter("h1")]
    whole = next((_text(title) for title in root.iter("title")), "")
    if len(headings) == 1 and headings[0] and headings[0].rstrip("¶# ") in whole:
        return headings[0].rstrip("¶# ")
    return _SPACE.sub(" ", named.get("og:title") or whole or (headings[0] if headings else "")).strip()


def _date(root: Any, named: dict[str, str], linked: list[dict]) -> str:
    told = [named[name] for name in _DATE_NAMES[:2] if name in named]
    told += [value for thing in linked if isinstance(value := thing.get("datePublished"), str)]
    told += [named[name] for name in _DATE_NAMES[2:] if name in named]
    told += [time.get("datetime") or "" for time in root.iter("time")][:1]
    for text in told:
        if found := _DATE.search(text):
            return "-".join(part for part in found.groups() if part)
    return ""


def _language(root: Any, named: dict[str, str]) -> str:
    xml = "{http://www.w3.org/XML/1998/namespace}lang"
    for told in (
        root.get("lang"),
        root.get("xml:lang"),
        root.get(xml),
        named.get("content-language"),
        named.get("og:locale"),
        named.get("dc.language"),
    ):
        code = re.match(r"([a-z]{2})(?:[-_]|$)", (told or "").strip().lower())
        if code:
            return code.group(1)
    return ""


def _licence(root: Any, named: dict[str, str]) -> str:
    for element in root.iter("link", "a"):
        if "license" in (element.get("rel") or "").lower().split():
            return (element.get("href") or _text(element)).strip()
    for name in ("dcterms.license", "dc.rights.license", "license"):
        if name in named:
            return named[name]
    return ""


def _canonical(root: Any, named: dict[str, str]) -> str:
    told = [link.get("href") or "" for link in root.iter("link") if "canonical" in (link.get("rel") or "").lower().split()]
    for address in [*told, named.get("og:url", "")]:
        if re.match(r"https?://[^\s/]", address.strip()):
            return address.strip()
    return ""


def _text(element: Any) -> str:
    return _SPACE.sub(" ", "".join(element.itertext())).strip()
