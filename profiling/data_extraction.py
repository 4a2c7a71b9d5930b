"""How much of a documentation page's words comes out of its HTML, against the source text that Debian ships beside it.

    apt-get download python3.11-doc linux-doc-6.1; dpkg-deb -x each into FOLDER
    python profiling/data_extraction.py FOLDER [--pages 400] [--write profiling/results/data-extraction.json]

The source is reStructuredText. What never reaches a page (comments, labels, options of directives, names of roles) is taken out of it by rule;
pages whose text comes from elsewhere (kernel-doc, include, literalinclude, automodule) are left out, because their source is not their truth.
Words are compared as multisets, in lower case.
"""

import argparse
import json
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

from cllm.data.extract import html
from cllm.data.extract.markdown import names
from cllm.data.extract.options import Options

_WORD = re.compile(r"[^\W_]+")
_ELSEWHERE = re.compile(
    r"^\s*\.\. +(?:kernel-doc|include|literalinclude|automodule|autoclass|kernel-include|kernel-feat|kernel-abi|kernel-figure|"
    r"kernel-render|maintainers-include|flat-table|productionlist|opcode|csv-table|miscnews|audit-event-table|availability-table|math|tabularcolumns|only|raw|impl-detail)::",
    re.MULTILINE,
)
_DROPPED = names(
    "index module currentmodule sectionauthor moduleauthor codeauthor toctree highlight highlightlang contents image figure "
    "default-domain role default-role testsetup testcleanup meta program c:namespace kernel-figure sectnum header footer title "
    "target-notes audit-event"
)  # directives that show nothing of their own text
_WITHOUT_ARGUMENT = names(
    "code-block sourcecode code parsed-literal highlight doctest testcode table list-table class rst-class cssclass tabularcolumns container"
)
_LEADS = {"seealso": "see also"}
_VERSION = {"versionadded": "new in version", "versionchanged": "changed in version", "deprecated": "deprecated since version"}
_OWN_WORDS = names("note warning tip important caution danger attention hint error seealso")
_ROLE = re.compile(r":(?:[\w.+-]+:)?[\w.+-]+:`([^`]+)`")
_REFERENCE = re.compile(r"`([^`<]*?)\s*<[^`>]*>`__?")


def truth(source: str) -> str:
    """The words of a page's source that a reader of the page sees."""
    lines = source.expandtabs(8).split("\n")
    kept: list[str] = []
    skipping: int | None = None  # the indentation of a directive or comment whose content is left out
    options: int | None = None
    for line in lines:
        bare = line.strip()
        indent = len(line) - len(line.lstrip())
        if skipping is not None:
            if not bare or indent > skipping:
                continue
            skipping = None
        if options is not None:
            if bare and indent > options and re.match(r":[\w -]+:", bare):
                continue
            options = None
        directive = re.match(r"\.\.(?: +\|[^|]+\|)? +([\w:.+-]+?)::(?: +(.*))?$", bare)
        if directive:
            name, argument = directive.group(1), directive.group(2) or ""
            if name in _DROPPED or bare.startswith(".. |"):
                skipping = indent
                continue
            options = indent
            if name in _WITHOUT_ARGUMENT:
                continue
            if name in _VERSION:
                kept.append(f"{_VERSION[name]} {argument}")
            elif name in _OWN_WORDS:
                kept.append(f"{_LEADS.get(name, name)} {argument}")
            else:
                kept.append(argument)
            continue
        footnote = re.match(r"\.\. +\[([^\]]+)\] ?(.*)$", bare)
        if footnote:
            kept.append(f"{footnote.group(1)} {footnote.group(2)}")
            continue
        if re.match(r"\.\.(?: |$)", bare):  # a label or a comment
            skipping = indent
            continue
        field = re.match(r":(\w[\w -]*):(?: |$)", bare)
        if field and indent == 0 and not kept:  # the page's own fields
            continue
        kept.append(line)
    text = "\n".join(kept)
    text = _ROLE.sub(lambda role: _shown(role.group(1)), text)
    text = _REFERENCE.sub(r"\1", text)
    text = re.sub(r"\|(?:release|version|today)\|", " ", text)
    return re.sub(r"\\(.)", r"\1", text)


def _shown(content: str) -> str:
    titled = re.match(r"(.*?)\s*<[^>]*>$", content, re.DOTALL)
    if titled:
        return titled.group(1)
    if content.startswith("~"):
        return content.rsplit(".", 1)[-1]
    return content.lstrip("!")


def words(text: str) -> Counter[str]:
    return Counter(word.lower() for word in _WORD.findall(text))


def pages(folder: Path) -> list[tuple[str, Path, Path]]:
    """(collection, page, source) for every page whose source text is its truth."""
    found = []
    python = folder / "usr/share/doc/python3.11/html"
    for source in sorted((python / "_sources").rglob("*.txt")):
        page = python / source.relative_to(python / "_sources").with_suffix("").with_suffix(".html")
        found.append(("python", page, source))
    linux = folder / "usr/share/doc/linux-doc-6.1"
    for source in sorted((linux / "Documentation").rglob("*.rst*")):
        name = source.relative_to(linux / "Documentation").as_posix().split(".rst")[0]
        found.append(("linux", linux / "html" / f"{name}.html", source))
    return [entry for entry in found if entry[1].is_file()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pages", type=int, default=0, help="every n-th page so that about this many are read of each collection")
    parser.add_argument("--worst", type=int, default=0)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    libraries = {library: version(library) for library in ("trafilatura", "resiliparse", "lxml")}
    result: dict = {"machine": platform.machine(), "interpreter": platform.python_version(), "libraries": libraries}
    result["commit"] = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    for collection in ("python", "linux"):
        entries = [(page, source) for kind, page, source in pages(arguments.folder) if kind == collection]
        sources = [(page, _opened(source)) for page, source in entries]
        sources = [(page, source) for page, source in sources if not _ELSEWHERE.search(source)]
        step = max(1, len(sources) // arguments.pages) if arguments.pages else 1
        scores, seconds, common_all, true_all, found_all = [], 0.0, 0, 0, 0
        for page, source in sources[::step]:
            true = words(truth(source))
            if sum(true.values()) < 50:
                continue
            data = page.read_bytes()
            start = time.process_time()
            found = words(html.read(data, page.name, Options())[0].text)
            seconds += time.process_time() - start
            common = sum((true & found).values())
            scores.append((common / sum(true.values()), common / max(1, sum(found.values())), str(page)))
            common_all, true_all, found_all = common_all + common, true_all + sum(true.values()), found_all + sum(found.values())
        result[collection] = {
            "pages": len(scores),
            "of": len(entries),
            "recall": round(common_all / true_all, 4),
            "precision": round(common_all / found_all, 4),
            "recall_mean_of_pages": round(sum(score[0] for score in scores) / len(scores), 4),
            "precision_mean_of_pages": round(sum(score[1] for score in scores) / len(scores), 4),
            "cpu_seconds": round(seconds, 1),
        }
        for score in sorted(scores, key=lambda s: s[0] + s[1])[: arguments.worst]:
            print(f"{score[0]:.3f} {score[1]:.3f} {score[2]}")
    text = json.dumps(result, indent=1)
    print(text)
    if arguments.write:
        arguments.write.write_text(text + "\n")


def _opened(source: Path) -> str:
    if source.suffix == ".gz":
        import gzip

        return gzip.decompress(source.read_bytes()).decode("utf-8", "replace")
    return source.read_text("utf-8", "replace")


if __name__ == "__main__":
    sys.exit(main())
