"""Office files and e-books are zip archives of XML: opened here with limits, read here without entities, DTDs or network."""

import io
import re
import zipfile
import zlib
from typing import Any

from cllm.data.extract.document import Unreadable

LARGEST_PART = 200_000_000  # bytes unpacked
LARGEST_PACKAGE = 1_000_000_000
MOST_PARTS = 50_000
LARGEST_RATIO = 200  # of what is larger than a megabyte; XML of spreadsheets packs 20 to 50 times
_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"


class Package:
    """The parts of a zip archive by name. Raises Unreadable where it is damaged, encrypted, or unpacks to more than a document can hold."""

    def __init__(self, data: bytes) -> None:
        if data.startswith(_OLE):
            raise Unreadable("encrypted: an Office file with a password; save a copy without one")
        if not data:
            raise Unreadable("empty: the file has no bytes")
        try:
            self.zip = zipfile.ZipFile(io.BytesIO(data))
        except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError) as error:
            raise Unreadable("damaged: not a whole zip archive, as files of this kind are; perhaps it is truncated") from error
        entries = self.zip.infolist()
        if len(entries) > MOST_PARTS:
            raise Unreadable(f"too large: it has {len(entries):,} parts, more than {MOST_PARTS:,}")
        if sum(entry.file_size for entry in entries) > LARGEST_PACKAGE:
            raise Unreadable(f"too large: it unpacks to more than {LARGEST_PACKAGE:,} bytes")
        self.names = {entry.filename for entry in entries}

    def read(self, name: str) -> bytes:
        """The bytes of a part. Raises Unreadable where it is missing, damaged or a bomb."""
        try:
            entry = self.zip.getinfo(name)
            if entry.flag_bits & 1:
                raise Unreadable("encrypted: its parts have a password; save a copy without one")
            limit = LARGEST_PART if entry.file_size <= 1 << 20 else min(LARGEST_PART, LARGEST_RATIO * max(1, entry.compress_size))
            with self.zip.open(entry) as part:
                content = part.read(limit + 1)
        except KeyError:
            raise Unreadable(f"damaged: it has no part {name}") from None
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, NotImplementedError, RuntimeError, ValueError) as error:
            raise Unreadable(f"damaged: its part {name} cannot be unpacked") from error
        if len(content) > limit:
            raise Unreadable(f"too large: its part {name} unpacks to more than {limit:,} bytes")
        return content

    def xml(self, name: str) -> Any:
        """The root element of a part. Raises Unreadable."""
        return parse_xml(self.read(name), name)

    def optional_xml(self, name: str) -> Any | None:
        """The same; None where there is no such part, or where it cannot be read, because the text stands elsewhere."""
        if name not in self.names:
            return None
        try:
            return self.xml(name)
        except Unreadable:
            return None


def parse_xml(content: bytes, name: str) -> Any:
    """The root element of a part of a package; entities stay unresolved, nothing is loaded. Raises Unreadable where it is not XML."""
    from lxml import etree

    parser = etree.XMLParser(resolve_entities=False, no_network=True, load_dtd=False, huge_tree=False, remove_comments=True, remove_pis=True)
    try:
        return etree.fromstring(content, parser=parser)
    except (etree.XMLSyntaxError, ValueError) as error:
        raise Unreadable(f"damaged: its part {name} is not XML") from error


def local(element: Any) -> str:
    """The name of an element without its namespace; empty for what is no element."""
    tag = element.tag
    return tag.rpartition("}")[2] if isinstance(tag, str) else ""


def properties(root: Any | None) -> dict[str, str]:
    """The Dublin Core and other simple elements of a part with metadata: name without namespace to text, the first of each name."""
    found: dict[str, str] = {}
    for element in root.iter() if root is not None else ():
        if element.text and element.text.strip():
            found.setdefault(local(element), " ".join(element.text.split()))
    return found


def iso_date(text: str) -> str:
    """The day of a date that is written as in ISO 8601, as exact as it is; empty for others."""
    day = re.match(r"((?:19|20)\d\d)(?:-(0[1-9]|1[0-2])(?:-(0[1-9]|[12]\d|3[01]))?)?(?!\d)", text.strip())
    return "-".join(part for part in day.groups() if part) if day else ""


def language_code(text: str) -> str:
    """The two letters of a language tag as "en-GB"; empty for others."""
    code = re.match(r"([A-Za-z]{2})(?:[-_]|$)", text.strip())
    return code.group(1).lower() if code else ""
