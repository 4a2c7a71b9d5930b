"""What kind of file this is. Its content decides before its name, and the name where the content leaves it open."""

import re

from cllm.data.documents.charset import Binary, decode
from cllm.data.documents.files import BINARY_EXTENSIONS
from cllm.data.documents.records import RECORD_EXTENSIONS
from cllm.data.extract.programming import language_of

HEAD_BYTES = 1 << 16
_PROBE_CHARS = 4096

_MAGIC = (
    (b"PK\x03\x04", "zip"), (b"PK\x05\x06", "zip"), (b"PK00PK\x03\x04", "zip"), (b"\x1f\x8b\x08", "gz"), (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zst"), (b"PAR1", "records"), (b"{\\rtf", "rtf"), (b"\x89PNG\r\n\x1a\n", "image"), (b"\xff\xd8\xff", "image"),
    (b"GIF87a", "image"), (b"GIF89a", "image"), (b"II*\x00", "image"), (b"MM\x00*", "image"), (b"WARC/", "warc"),
)  # fmt: skip
_BZIP2 = re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)")
_SKIPPED_FRAME = re.compile(rb"[\x50-\x5f]\x2a\x4d\x18")  # may stand before the data of a zstd file
_OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"  # the container of Outlook's messages and of Office documents before 2007
_OFFICE = ((b"word/", "docx"), (b"ppt/", "pptx"), (b"xl/", "xlsx"))
_MIMETYPES = (
    (b"application/epub+zip", "epub"), (b"application/vnd.oasis.opendocument.text", "odt"),
    (b"application/vnd.oasis.opendocument.spreadsheet", "ods"), (b"application/vnd.oasis.opendocument.presentation", "odp"),
)  # fmt: skip
_ZIPPED = frozenset({"docx", "pptx", "xlsx", "epub", "odt", "ods", "odp"})
_EXTENSIONS = {
    ".docm": "docx", ".dotx": "docx", ".pptm": "pptx", ".ppsx": "pptx", ".xlsm": "xlsx", ".xltx": "xlsx", ".ott": "odt", ".ots": "ods", ".otp": "odp",
    ".htm": "html", ".xhtml": "html", ".xht": "html", ".shtml": "html", ".eml": "email", ".mbx": "mbox", ".ipynb": "notebook", ".tex": "latex",
    ".ltx": "latex", ".latex": "latex", ".srt": "subtitles", ".vtt": "subtitles", ".parquet": "records",
} | {f".{kind}": kind for kind in ("html", "pdf", "docx", "pptx", "xlsx", "odt", "ods", "odp", "epub", "rtf", "mbox", "msg")}  # fmt: skip
_HTML = re.compile(r"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)[\s>]", re.IGNORECASE | re.DOTALL)
_LATEX = re.compile(r"^[ \t]*\\(?:documentclass|documentstyle|begin\{document\})", re.MULTILINE)
_SRT = re.compile(r"\s*\d+[ \t]*\r?\n\d{1,2}:\d\d:\d\d[,.]\d{1,3} --> \d{1,2}:\d\d:\d\d[,.]\d{1,3}")
_HEADER = re.compile(r"(?:[!-9;-~]+:[^\n]*\n(?:[ \t][^\n]*\n)*)+")
_HEADER_NAMES = re.compile(
    r"^(?:from|to|subject|date|message-id|received|return-path|delivered-to|mime-version|reply-to|cc|content-type|x-[\w-]+):", re.M | re.I
)
_ENVELOPE = re.compile(r"From \S+.*\d\d:\d\d.*\n(?=[!-9;-~]+:)")


def kind_of(name: str, head: bytes) -> str:
    """One of the kinds that readers.py knows, or of an archive. `head`: the first HEAD_BYTES of the file, or all of it."""
    return _by_magic(name, head) or _by_text(name, head)


def kind_of_members(names: list[str], first: bytes) -> str:
    """What a zip archive is whose members are these; `first`: the content of the first one. "zip" where it is an archive and nothing else."""
    if names and names[0] == "mimetype":
        return next((kind for content, kind in _MIMETYPES if first.startswith(content)), "zip")
    if "[Content_Types].xml" in names:
        return next((kind for folder, kind in _OFFICE if any(each.startswith(folder.decode()) for each in names)), "zip")
    return "zip"


def extension_of(name: str) -> str:
    """In small letters and with its dot; empty where there is none."""
    base = name.rpartition("/")[2]
    stem, dot, extension = base.rpartition(".")
    return f".{extension.lower()}" if dot and stem else ""


def _named(name: str) -> str:
    return _EXTENSIONS.get(extension_of(name), "")


def _named_text(name: str, text: str) -> str:
    """What the name says of a text; nothing where files of that kind are no text: it was renamed, or a program has called it so."""
    kind = _named(name)
    return "" if kind in _ZIPPED or kind == "msg" or (kind == "pdf" and "endobj" not in text) else kind


def _by_magic(name: str, head: bytes) -> str:
    found = next((kind for magic, kind in _MAGIC if head.startswith(magic)), "")
    if found == "zip":
        return _kind_of_zip(name, head)
    if found:
        return found
    if head[8:12] == b"WEBP" and head.startswith(b"RIFF"):
        return "image"
    if b"%PDF-" in head[:1024]:
        return "pdf"
    if _BZIP2.match(head):
        return "bz2"
    if _SKIPPED_FRAME.match(head):
        return "zst"
    if head.startswith(_OLE):
        return "msg" if _named(name) == "msg" or "__properties_version1".encode("utf-16-le") in head else "unknown"
    return "tar" if _is_tar(head) else ""


def _kind_of_zip(name: str, head: bytes) -> str:
    if head[30:38] == b"mimetype":
        return next((kind for content, kind in _MIMETYPES if content in head[38:200]), "zip")
    if _named(name) in _ZIPPED:
        return _named(name)
    if b"[Content_Types].xml" in head:
        return next((kind for folder, kind in _OFFICE if folder in head), "zip")
    return "zip"


def _is_tar(head: bytes) -> bool:
    """Old archives have no mark, but all have the sum of the bytes of their first header in it."""
    block = head[:512]
    if len(block) < 512 or not any(block):
        return False
    try:
        told = int(block[148:156].strip(b" \0") or b"x", 8)
    except ValueError:
        return False
    return told == sum(block[:148]) + 256 + sum(block[156:])


def _by_text(name: str, head: bytes) -> str:
    extension = extension_of(name)
    if not head:
        return "text"
    if extension in BINARY_EXTENSIONS and not _is_plain(head):
        return _named(name) or "unknown"
    decoded = decode(head)
    if isinstance(decoded, Binary) and _HTML.match(head[:_PROBE_CHARS].decode("latin-1")):
        return "html"  # with zero bytes, which browsers pass over
    if isinstance(decoded, Binary):
        return _named(name) or ("records" if extension in RECORD_EXTENSIONS else "unknown")
    text = decoded[0]
    language = language_of(name, text[:_PROBE_CHARS])
    return (
        _by_content(name, text, language)
        or _named_text(name, text)
        or ("records" if extension in RECORD_EXTENSIONS else "code" if language else "text")
    )


def _is_plain(head: bytes) -> bool:
    return b"\0" not in head and not isinstance(decode(head), Binary)


def _by_content(name: str, text: str, language: str) -> str:
    """The kind of a text that begins like this where that leaves no doubt."""
    start = text[:_PROBE_CHARS]
    if start.startswith("WEBVTT") or _SRT.match(start):
        return "subtitles"
    if _ENVELOPE.match(start):
        return "mbox"
    if language:
        return ""
    if _HTML.match(start):
        return "html"
    header = _HEADER.match(start)
    if header and len({found.lower() for found in _HEADER_NAMES.findall(header[0])}) >= 3 and not _named(name):
        return "email"
    if start.lstrip().startswith("{"):
        if '"cell_type"' in text and '"metadata"' in text and '"source"' in text:
            return "notebook"
        if not extension_of(name) and _is_json_lines(text):
            return "records"
    if _LATEX.search(text) and extension_of(name) in ("", ".txt", ".tex"):
        return "latex"
    return ""


def _is_json_lines(text: str) -> bool:
    lines = [line.strip() for line in text.splitlines()[:3]]
    return len(lines) > 1 and all(line.startswith('{"') and line.endswith("}") for line in lines[:2])
