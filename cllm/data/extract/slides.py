"""Slides (pptx): one document a file, one heading a slide, text in reading order, tables and the speaker's notes."""

import posixpath
from collections.abc import Iterator
from typing import Any

from cllm.data.extract.document import Document, Unreadable
from cllm.data.extract.markdown import pipe_table
from cllm.data.extract.options import Options
from cllm.data.extract.package import Package, iso_date, language_code, local, properties

_A = "{http://schemas.openxmlformats.org/drawingml/2006/main}"
_P = "{http://schemas.openxmlformats.org/presentationml/2006/main}"
_R = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}"
_MOST_SLIDES = 5_000
_FURNITURE = frozenset(("sldNum", "ftr", "dt", "hdr", "sldImg"))


def read(data: bytes, name: str, options: Options) -> list[Document]:
    """One document. Raises Unreadable."""
    package = Package(data)
    root = "ppt/presentation.xml"
    targets = _targets(package, root)
    order = [targets.get(slide.get(f"{_R}id") or "", "") for slide in package.xml(root).iter(f"{_P}sldId")]
    blocks: list[str] = []
    title, missing = "", 0
    for number, part in enumerate(order[:_MOST_SLIDES], 1):
        slide = package.optional_xml(part)
        if slide is None:
            missing += 1
            continue
        heading, content = _slide(slide)
        notes = [target for target in _targets(package, part).values() if "notesSlide" in target]
        said = [block for target in notes[:1] for block in _slide(package.optional_xml(target), bullets=False)[1]]
        if heading or content or said:
            blocks += [f"## {heading or f'Slide {number}'}", *content, *(["Notes:", *said] if said else [])]
            title = title or heading
    if not blocks:
        raise Unreadable("empty: the slides have no text; text in their pictures needs cllm[ocr]")
    core = properties(package.optional_xml("docProps/core.xml"))
    lost = [f"{missing} of {len(order)} slides could not be read"] if missing else []
    lost += [f"truncated after {_MOST_SLIDES:,} slides"] if len(order) > _MOST_SLIDES else []
    return [
        Document(
            "\n\n".join(blocks),
            title=core.get("title", "").replace("PowerPoint Presentation", "") or title,
            date=iso_date(core.get("modified") or core.get("created") or ""),
            language=language_code(core.get("language", "")),
            note="; ".join(lost),
        )
    ]


def _targets(package: Package, part: str) -> dict[str, str]:
    """The parts that a part names, by relation."""
    folder, _, file = part.rpartition("/")
    relations = package.optional_xml(f"{folder}/_rels/{file}.rels")
    found = {}
    for relation in relations if relations is not None else ():
        if relation.get("TargetMode") != "External":
            target = relation.get("Target") or ""
            found[relation.get("Id") or ""] = target.lstrip("/") if target.startswith("/") else posixpath.normpath(posixpath.join(folder, target))
    return found


def _slide(slide: Any | None, bullets: bool = True) -> tuple[str, list[str]]:
    """A slide's title and its other text in blocks. bullets: the paragraphs of its body are items of a list unless they say otherwise."""
    tree = next(slide.iter(f"{_P}spTree"), None) if slide is not None else None
    title, blocks = "", []
    for shape in _shapes(tree) if tree is not None else ():
        placeholder = shape.find(f".//{_P}nvPr/{_P}ph")
        kind = placeholder.get("type") or "" if placeholder is not None else ""
        if kind in _FURNITURE:
            continue
        for table in shape.iter(f"{_A}tbl"):
            rows = [[" ".join(_paragraphs(cell, False)).replace("|", "\\|") for cell in row.iter(f"{_A}tc")] for row in table.iter(f"{_A}tr")]
            blocks += pipe_table(rows)
        body = shape.find(f"{_P}txBody")
        if body is None:
            continue
        if kind in ("title", "ctrTitle") and not title:
            title = " ".join(" ".join(_paragraphs(body, False)).split())
            continue
        bulleted = bullets and placeholder is not None and kind not in ("subTitle", "title", "ctrTitle")
        if text := "\n".join(_paragraphs(body, bulleted)):
            blocks.append(text)
    return title, blocks


def _shapes(tree: Any) -> Iterator[Any]:
    for shape in tree:
        tag = local(shape)
        if tag == "grpSp":
            yield from _shapes(shape)
        elif tag in ("sp", "graphicFrame", "cxnSp"):
            yield shape
        elif tag == "AlternateContent":
            yield from (inner for choice in shape for inner in _shapes(choice) if local(choice) == "Choice")


def _paragraphs(body: Any, bulleted: bool) -> list[str]:
    lines = []
    for paragraph in body.iter(f"{_A}p"):
        pieces = []
        for piece in paragraph.iter(f"{_A}t", f"{_A}br"):
            pieces.append(piece.text or "" if local(piece) == "t" else "\n")
        text = "".join(pieces).replace("\x0b", "\n").strip()
        if not text:
            continue
        setting = paragraph.find(f"{_A}pPr")
        level = setting.get("lvl") or "0" if setting is not None else "0"
        marked = bulleted and (setting is None or setting.find(f"{_A}buNone") is None)
        depth = int(level) if level.isdigit() and len(level) == 1 else 0
        marker = "- " if setting is None or setting.find(f"{_A}buAutoNum") is None else "1. "
        lines.append("  " * depth + marker + text.replace("\n", "\n" + "  " * (depth + 1)) if marked else text)
    return lines
