"""What the reading of files may cost, and what it is told beside the bytes."""

from dataclasses import asdict, dataclass
from typing import Any

MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Options:
    """Limits of one file, and what helps to read it. It travels to the child process as JSON, so it holds plain values only."""

    passwords: tuple[str, ...] = ()
    """Tried in this order on every encrypted archive and document."""
    ocr: bool = False
    """Whether images, and pages of a PDF without text, are read by character recognition."""
    encoding: str = "auto"
    """The charset of files that are not certainly Unicode, as `charset.check_encoding` gives it."""
    text_field: str = ""
    """The field of records that holds the text; empty: found by itself."""
    every_text: bool = False
    """Whether each text in a record is a document, as of text for evaluation: a question, its answers, the turns of a chat."""
    separator: str = "auto"
    """What stands between documents in one text, as `separators.parse` gives it."""
    content_type: str = ""
    """What a server said that this file is: "text/html; charset=koi8-r". Of one file, not of all."""
    languages: tuple[str, ...] = ()
    """Languages that character recognition looks for, codes of two letters; empty: Latin letters and Chinese."""

    seconds: int = 60
    """Of CPU that one document may take. The clock on the wall is allowed several times that, so that a busy machine changes no result."""
    memory_bytes: int = 2048 * MEGABYTE
    """Address space of the child process."""
    input_bytes: int = 128 * MEGABYTE
    """The largest file that is held in memory. Records, mail boxes and plain text are read as streams and may be of any size."""
    text_bytes: int = 64 * MEGABYTE
    """Of UTF-8, that one file of another kind than those may become."""
    document_bytes: int = 16 * MEGABYTE
    """A longer plain text is cut into parts."""

    depth: int = 3
    """Of archives inside archives."""
    ratio: int = 100
    """An archive may unpack to so many times its size,"""
    small_bytes: int = 64 * MEGABYTE
    """or to this much where that is more,"""
    archive_bytes: int = 1 << 40
    """and never to more than this."""
    entries: int = 1_000_000
    """Members of one archive; those beyond are left out."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Options":
        """What `to_dict` gave, after JSON has made lists of its tuples."""
        plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
        return cls(**plain)
