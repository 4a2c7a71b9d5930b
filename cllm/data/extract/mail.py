"""E-mail: single messages (.eml) and mail boxes (mbox, RFC 4155). A document for each message, and one for each attachment that can be read."""

import email
import email.errors
import email.header
import email.utils
import re
from collections.abc import Iterator
from dataclasses import replace
from email.message import Message
from typing import IO

from cllm.data.extract import readers
from cllm.data.extract.decoding import plain, text_of
from cllm.data.extract.document import Document, Unreadable
from cllm.data.extract.kinds import HEAD_BYTES, kind_of
from cllm.data.extract.options import Options
from cllm.runtime.printable import printable

_ATTACHMENTS = 100  # of one message that are read
_PARTS = 1000
_SIGNATURES = ("application/pgp-signature", "application/pkcs7-signature", "application/x-pkcs7-signature")
_LINE = 1 << 20  # bytes of a line of a mail box that are taken together
_ENVELOPE = re.compile(rb"From \S.*\d\d:\d\d")
_HEADER_LINE = re.compile(rb"[!-9;-~]+:")
_QUOTED_ENVELOPE = re.compile(rb"^>(>*From )", re.MULTILINE)
_READ_ATTACHED = readers.KINDS - {"mbox", "unknown", "records"}


def read(data: bytes, name: str, options: Options) -> list[Document]:
    """A single message. Raises Unreadable where neither it nor an attachment holds text."""
    return _message(data, options)


def stream(file: IO[bytes], name: str, options: Options) -> Iterator[Document]:
    """The messages of a mail box: "message 3", "message 3, attachment notes.pdf". Those that cannot be read are told at the end."""
    failed: list[str] = []
    number = 0
    for number, data in enumerate(_messages(file, options.input_bytes), 1):
        try:
            if data is None:
                raise Unreadable("too large")
            for document in _message(data, options):
                yield replace(document, part=f"message {number}" + (f", {document.part}" if document.part else ""))
        except (Unreadable, RecursionError, ValueError, LookupError, email.errors.MessageError) as error:
            failed.append(f"message {number}: {error if isinstance(error, Unreadable) else 'damaged'}")
    if failed:
        more = f", and {len(failed) - 3:,} others" if len(failed) > 3 else ""
        raise Unreadable(f"damaged or empty ({len(failed):,} of {number:,} messages: {'; '.join(failed[:3])}{more})")
    if not number:
        raise Unreadable("empty")


def _messages(file: IO[bytes], limit: int) -> Iterator[bytes | None]:
    """The bytes of each message, cut before a line "From ..." that follows a blank one and precedes a header; None for one that is too large."""
    held: list[bytes] = []
    size = 0
    after_blank = True
    envelope = b""  # a line that may begin the next message
    while line := file.readline(_LINE):
        if envelope:
            if _HEADER_LINE.match(line) or line.startswith(b">From "):
                if held:
                    yield b"".join(held) if size <= limit else None
                held, size = [], 0
            else:
                held.append(envelope)
            envelope = b""
        if after_blank and _ENVELOPE.match(line):
            envelope = line
            after_blank = False
            continue
        after_blank = not line.strip()
        size += len(line)
        if size <= limit:
            held.append(line)
    if held:
        yield b"".join(held) if size <= limit else None


def _message(data: bytes, options: Options) -> list[Document]:
    message = email.message_from_bytes(_QUOTED_ENVELOPE.sub(rb"\1", data))
    subject = header(message, "Subject")
    date = _date(message.get("Date"))
    body, attached, notes = _taken_apart(message, options)
    documents = []
    if body.strip():
        text = f"# {subject}\n\n{body.strip()}\n" if subject else f"{body.strip()}\n"
        documents.append(Document(text, title=subject, date=date))
    for number, (label, part) in enumerate(attached[:_ATTACHMENTS], 1):
        try:
            documents += attachment(label if len(attached) == 1 else label.replace(" ", f" {number} ", 1), part, date, options)
        except Unreadable as error:
            notes.append(f"{label}: {error}")
    if len(attached) > _ATTACHMENTS:
        notes.append(f"{len(attached) - _ATTACHMENTS:,} more attachments")
    if not documents:
        raise Unreadable(notes[0].partition(": ")[2] if len(notes) == 1 else "empty (a message without text)")
    if notes:
        documents[0] = replace(documents[0], note=f"not read: {'; '.join(notes[:5])}{', ...' if len(notes) > 5 else ''}")
    return documents


def attachment(label: str, data: bytes, date: str, options: Options) -> list[Document]:
    """The documents of a file that came with a message. Raises Unreadable."""
    name = label.rpartition(" ")[2]
    kind = kind_of(name, data[:HEAD_BYTES])
    if kind not in _READ_ATTACHED:
        raise Unreadable("records or an archive, which are not read inside a message" if kind != "unknown" else "unknown type")
    if options.depth < 1:
        raise Unreadable("nested too deeply")
    inner = replace(options, depth=options.depth - 1, content_type="")
    found = readers.read(data, kind, name, inner)
    return [replace(each, part=f"{label}, {each.part}" if each.part else label, date=each.date or date) for each in found]


def header(message: Message, name: str) -> str:
    """A field of the header as text on one line, whatever charsets it names (RFC 2047)."""
    value = message.get(name)
    if value is None:
        return ""
    raw = str(value)[:10_000].encode("ascii", "surrogateescape")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        text = raw.decode("latin-1")
    try:
        pieces = email.header.decode_header(text)
        joined = "".join(piece if isinstance(piece, str) else _decoded(piece, charset) for piece, charset in pieces)
    except (email.errors.HeaderParseError, ValueError):
        joined = text
    return " ".join(joined.split())[:500]


def _decoded(content: bytes, charset: str | None) -> str:
    try:
        return content.decode(charset or "utf-8", "replace")
    except (LookupError, UnicodeError):
        return content.decode("utf-8", "replace")


def _date(value: object) -> str:
    try:
        return email.utils.parsedate_to_datetime(str(value)[:200]).isoformat()
    except (ValueError, TypeError, IndexError, OverflowError):
        return ""


def _taken_apart(message: Message, options: Options) -> tuple[str, list[tuple[str, bytes]], list[str]]:
    """(text of a message, (label, content) of what is attached, what could not be read). Of alternatives the plain one is taken."""
    bodies: list[str] = []
    attached: list[tuple[str, bytes]] = []
    notes: list[str] = []
    pending: list[Message] = [message]
    count = 0
    while pending and count < _PARTS:
        part = pending.pop()
        count += 1
        kind = part.get_content_type()
        name = _filename(part)
        if kind == "message/rfc822" and part.is_multipart():
            inner = part.get_payload(0)
            if isinstance(inner, Message):
                attached.append((f"attachment {name or 'message.eml'}", inner.as_bytes()))
        elif part.is_multipart():
            children = [each for each in part.get_payload() if isinstance(each, Message)]
            pending += reversed(_chosen(children) if kind == "multipart/alternative" else children)
        elif kind in _SIGNATURES:
            pass
        elif name or part.get_content_disposition() == "attachment" or part.get_content_maintype() != "text":
            if name or part.get_content_disposition() == "attachment":
                attached.append((f"attachment {name or 'without name'}", _payload(part)))
        else:
            try:
                bodies.append(_text(part, kind, options))
            except Unreadable as error:
                if str(error) != "empty":
                    notes.append(f"its text: {error}")
    return "\n\n".join(each.strip("\n") for each in bodies if each.strip()), attached, notes


def _chosen(alternatives: list[Message]) -> list[Message]:
    plain_ones = [each for each in alternatives if each.get_content_type() == "text/plain" and _payload(each).strip()]
    return plain_ones[:1] or alternatives[-1:]


def _payload(part: Message) -> bytes:
    payload = part.get_payload(decode=True)
    return payload if isinstance(payload, bytes) else b""


def _filename(part: Message) -> str:
    try:
        name = part.get_filename()
    except (ValueError, LookupError, TypeError):
        return ""
    return printable(name).replace("/", "_")[:200] if name else ""


def _text(part: Message, kind: str, options: Options) -> str:
    charset = part.get_content_charset() or ""
    told = replace(options, content_type=f"{kind}; charset={charset}" if charset else "")
    if kind == "text/html":
        return "\n\n".join(document.text for document in readers.read(_payload(part), "html", "message.html", told))
    text, _ = text_of(_payload(part), told)
    text = text.partition("\n-- \n")[0]  # what follows is the sender's card (RFC 3676, 4.3)
    if str(part.get_param("format", "")).lower() == "flowed":
        text = _unfolded(text, str(part.get_param("delsp", "")).lower() == "yes")
    return plain(text)


def _unfolded(text: str, drops_blank: bool) -> str:
    """Lines that end with a blank go on in the next one (RFC 3676)."""
    lines: list[str] = []
    goes_on = False
    for line in text.split("\n"):
        line = line[1:] if line.startswith(" ") else line
        if goes_on:
            lines[-1] += line
        else:
            lines.append(line)
        goes_on = lines[-1].endswith(" ") and not line.startswith(">")
        if goes_on and drops_blank:
            lines[-1] = lines[-1][:-1]
    return "\n".join(lines)
