"""Messages that Outlook has saved (.msg), by python-oxmsg."""

import io
from dataclasses import replace

from cllm.data.extract import readers
from cllm.data.extract.decoding import plain
from cllm.data.extract.document import Document, Unreadable
from cllm.data.extract.mail import attachment
from cllm.data.extract.options import Options
from cllm.runtime.printable import printable

_ATTACHMENTS = 100


def read(data: bytes, name: str, options: Options) -> list[Document]:
    from oxmsg import Message

    message = Message.load(io.BytesIO(data))
    subject = " ".join((message.subject or "").split())[:500]
    date = message.sent_date.isoformat() if message.sent_date is not None else ""
    body = plain(message.body or "").strip()
    if not body and message.html_body:
        html = message.html_body.encode("utf-8") if isinstance(message.html_body, str) else message.html_body
        body = "\n\n".join(document.text for document in readers.read(html, "html", "message.html", options)).strip()
    documents = []
    if body:
        documents.append(Document(f"# {subject}\n\n{body}\n" if subject else f"{body}\n", title=subject, date=date))
    notes = []
    for each in list(message.attachments)[:_ATTACHMENTS]:
        label = f"attachment {printable(each.file_name or 'without name').replace('/', '_')[:200]}"
        try:
            documents += attachment(label, each.file_bytes or b"", date, options)
        except Unreadable as error:
            notes.append(f"{label}: {error}")
    if not documents:
        raise Unreadable("empty (a message without text)")
    if notes:
        documents[0] = replace(documents[0], note=f"not read: {'; '.join(notes[:5])}")
    return documents
