"""What is read out of a file: its documents, or the one reason why there are none."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Document:
    """A text and what its file says about it. Fields that the file does not tell are empty."""

    text: str
    """Structure is kept as Markdown (headings, lists, tables, code); source code and plain text stay as they are."""
    part: str = ""
    """Which part of the file, where one file holds several documents: "message 3", "sheet Prices". Added to the file's path."""
    title: str = ""
    date: str = ""
    """ISO 8601, as exact as the file says: "2024-05" or "2024-05-17"."""
    language: str = ""
    """The language that the file declares, a code of two letters."""
    licence: str = ""
    url: str = ""
    """Where the document came from, when the file says so (a page of a crawl, a canonical link)."""
    code: str = ""
    """The programming language of source code, in small letters ("python"); empty for prose."""
    note: str = ""
    """What was lost although the document was read: "truncated after 200,000 rows", "3 of 12 pages have no text"."""


class Unreadable(Exception):
    """A file or a member of an archive that gives no text; its words complete "left out: ..."

    They begin with what is the matter ("encrypted", "empty", "truncated", "damaged", "unknown type", "too large", "time limit") and say what would
    help ("install cllm[ocr]", "give the password"). Never a traceback, never a path of a temporary file.
    """
