"""Small valid files of many kinds, made by the programs that people make them with where there is one."""

import gzip
import io
import json
import mailbox
import struct
import tarfile
import zipfile
from email.message import EmailMessage

PROSE = "The mill stood at the river. Gr\u00fc\u00dfe from \u041c\u043e\u0441\u043a\u0432\u0430 and \u6771\u4eac, said the miller, and laughed.\n"


def message(attachment=b"attached words\n", name="notes.txt"):
    mail = EmailMessage()
    mail["From"], mail["To"], mail["Subject"] = "Anna <anna@example.org>", "ben@example.org", "Gr\u00fc\u00dfe aus der M\u00fchle"
    mail["Date"], mail["Message-ID"] = "Fri, 17 May 2024 10:11:12 +0200", "<1@example.org>"
    mail.set_content(PROSE * 3)
    mail.add_alternative(f"<html><body><p>{PROSE}</p></body></html>", subtype="html")
    mail.add_attachment(attachment, maintype="application", subtype="octet-stream", filename=name)
    return mail


def mail_box(folder, count=3):
    path = folder / "box"
    box = mailbox.mbox(path)
    for _ in range(count):
        box.add(message())
    box.close()
    return path.read_bytes()


def notebook():
    printed = [{"output_type": "stream", "text": "noise"}]
    cells = [
        {"cell_type": "markdown", "metadata": {}, "source": ["# A title\n", "\n", "Some *words*."]},
        {
            "cell_type": "code",
            "metadata": {},
            "execution_count": 1,
            "outputs": printed,
            "source": "x = 1\nprint(x)",
        },
        {"cell_type": "code", "metadata": {}, "execution_count": 2, "outputs": [], "source": "%%bash\nls"},
        {"cell_type": "code", "metadata": {}, "execution_count": None, "outputs": [], "source": []},
    ]
    return json.dumps({"cells": cells, "metadata": {"language_info": {"name": "python"}}, "nbformat": 4, "nbformat_minor": 5}, indent=1).encode()


LATEX = r"""\documentclass[11pt]{article}
\usepackage{amsmath} % a remark
\newcommand{\R}{\mathbb{R}}
\newcommand{\say}[1]{\emph{#1}!}
\title{On \emph{Mills}}\author{A. B.}\date{2024-05-17}
\begin{document}
\maketitle
\begin{abstract}Short text.\end{abstract}
\section{Introduction}\label{sec:intro}
This is caf\'e na\"{\i}ve, 50\% of \textbf{it}~\cite{x}. ``Quoted'' -- a dash. \say{Loud}
We have $x \in \R$ and
\begin{equation}\label{e} a = b \end{equation}
more text\footnote{A note.}.
\begin{itemize}
\item one \item two
 \begin{enumerate}\item inner a \item inner b\end{enumerate}
\end{itemize}
\begin{table}[ht]\centering\caption{Prices}\begin{tabular}{ll}\hline A & B \\ \hline 1 & 2\,3 \\ \end{tabular}\end{table}
\begin{lstlisting}[language=C]
int x; % no remark
\end{lstlisting}
\begin{tikzpicture}\draw (0,0);\end{tikzpicture}
See \href{http://x.org}{the site}. \includegraphics[width=2cm]{f.png} \unknown{kept} \[ z^2 \]
\end{document}
"""
SRT = """1
00:00:01,000 --> 00:00:02,500
<i>The mill</i> stood

2
00:00:02,500 --> 00:00:04,000
{\\an8}at the river.

3
00:00:20,000 --> 00:00:22,000
- Is it yours?
- No.
"""
VTT = """WEBVTT
Language: de

NOTE nothing

intro
00:01.000 --> 00:02.000 align:start
<v Anna>Die M&uuml;hle

00:02.000 --> 00:03.000
Die M&uuml;hle
am Fluss
"""
RTF = rb"""{\rtf1\ansi\ansicpg1252\deff0{\fonttbl{\f0\fswiss\fcharset0 Arial;}{\f1\fcharset204 Arial Cyr;}}{\stylesheet{\s0 Normal;}{\s1 heading 1;}}
{\info{\title My title}{\author Anna}{\creatim\yr2024\mo5\dy17}}{\*\generator Riched20;}
\pard\s1\b The head\b0\par
\pard\f0 Caf\'e9 and \u8364? and \u-10179?\u-8704? done\line next.{\footnote a note} {\f1\'cf\'f0\'e8\'e2\'e5\'f2}\par
{\listtext\bullet\tab}one\par
{\listtext\bullet\tab}two\par
\trowd\cellx100\cellx200\pard\intbl A\cell B\cell\row\pard\intbl 1\cell 2\cell\row
\pard Last {\field{\*\fldinst{HYPERLINK "http://x"}}{\fldrslt link}} {\pict\wmetafile8 010203}{\v hidden}text.\par}"""
PYTHON = """# SPDX-License-Identifier: MIT
import os


def main():
    print(os.getcwd())
"""


def archive():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as packed:
        packed.writestr("a.txt", PROSE * 5)
        packed.writestr("b/c.py", PYTHON)
        packed.writestr("d.tar.gz", tape("w:gz"))
    return file.getvalue()


def tape(mode="w"):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as packed:
        for name, content in (("x.md", b"# words\n" * 9), ("y.jsonl", lines())):
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            packed.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def lines():
    return b"".join(json.dumps({"text": PROSE * 2, "url": f"http://a.example/{n}", "date": "2024-05-17"}).encode() + b"\n" for n in range(5))


def table():
    return "id,text,lang\n" + "".join(f'{n},"{PROSE.strip()} ""Yes"", twice",en\n' for n in range(5))


def parquet():
    import pyarrow as arrow
    from pyarrow.parquet import write_table

    file = io.BytesIO()
    write_table(arrow.table({"text": [PROSE * 2] * 5, "title": list("abcde")}), file)
    return file.getvalue()


def samples(folder):
    """name -> content of a small valid file of each kind that needs no office program."""
    return {
        "prose.txt": (PROSE * 5).encode(),
        "prose16.txt": (PROSE * 5).encode("utf-16"),
        "latin.txt": "Ein Gru\u00df aus der M\u00fchle am gro\u00dfen Flu\u00df, sch\u00f6n f\u00fcr uns alle.\n".encode("cp1252") * 8,
        "main.py": PYTHON.encode(),
        "book.ipynb": notebook(),
        "paper.tex": LATEX.encode(),
        "film.srt": SRT.encode(),
        "film.vtt": VTT.encode(),
        "letter.rtf": RTF,
        "mail.eml": message().as_bytes(),
        "mail.mbox": mail_box(folder),
        "mail.msg": outlook_message("The mill", PROSE * 3, [("notes.txt", b"attached words")]),
        "rows.jsonl": lines(),
        "rows.csv": table().encode(),
        "rows.parquet": parquet(),
        "pack.zip": archive(),
        "pack.tar": tape(),
        "pack.tar.gz": tape("w:gz"),
        "prose.txt.gz": gzip.compress((PROSE * 5).encode()),
    }


PAGE = f"""<!DOCTYPE html><html lang="en"><head><title>Mills</title><meta charset="utf-8"></head><body><nav><a href="/">home</a></nav><main>
<h1>Mills</h1>
<p>{PROSE}</p><ul><li>one</li><li>two</li></ul><table><tr><th>A</th><th>B</th></tr><tr><td>1</td><td>2</td></tr></table><pre>x = 1</pre>
<p>{PROSE * 3}</p></main></body></html>"""
_OPEN_DOCUMENT = """<?xml version="1.0"?><office:document-content xmlns:office="urn:oasis:names:tc:opendocument:xmlns:office:1.0"
xmlns:text="urn:oasis:names:tc:opendocument:xmlns:text:1.0"><office:body><office:text><text:h text:outline-level="1">Mills</text:h>
<text:p>The mill stood at the river.</text:p></office:text></office:body></office:document-content>"""


def packed(parts):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as package:
        for name, content in parts.items():
            package.writestr(name, content)
    return file.getvalue()


def pdf():
    """A page of text, written by hand."""
    drawn = b"BT /F1 12 Tf 72 720 Td (The mill stood at the river, said the miller.) Tj 0 -20 Td (He laughed and went home.) Tj ET"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(drawn), drawn),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    content, places = b"%PDF-1.4\n", []
    for number, each in enumerate(objects, 1):
        places.append(len(content))
        content += b"%d 0 obj\n%s\nendobj\n" % (number, each)
    table = b"xref\n0 6\n0000000000 65535 f \n" + b"".join(b"%010d 00000 n \n" % place for place in places)
    return content + table + b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF\n" % len(content)


def office_samples():
    """The same for the documents that office programs write, pages and pictures."""
    import docx
    import openpyxl
    import pptx
    from PIL import Image

    letter = docx.Document()
    letter.add_heading("Mills", 1)
    letter.add_paragraph(PROSE)
    show = pptx.Presentation()
    show.slides.add_slide(show.slide_layouts[1]).shapes.title.text = "Mills"
    book = openpyxl.Workbook()
    book.active.append(["item", "price"])
    book.active.append(["mill", 3.5])
    picture = Image.new("RGB", (64, 32), "white")
    made = {"letter.docx": letter, "show.pptx": show, "prices.xlsx": book}
    files = {name: io.BytesIO() for name in (*made, "picture.png")}
    for name, thing in made.items():
        thing.save(files[name])
    picture.save(files["picture.png"], "PNG")
    container = '<container xmlns="urn:oasis:names:tc:opendocument:xmlns:container"><rootfiles><rootfile full-path="c.opf"/></rootfiles></container>'
    spine = (
        '<package xmlns="http://www.idpf.org/2007/opf"><metadata/><manifest><item id="a" href="a.xhtml" media-type="application/xhtml+xml"/>'
        '</manifest><spine><itemref idref="a"/></spine></package>'
    )
    page = f'<html xmlns="http://www.w3.org/1999/xhtml"><head><title>t</title></head><body><h1>First</h1><p>{PROSE}</p></body></html>'
    return {
        **{name: file.getvalue() for name, file in files.items()},
        "page.html": PAGE.encode(),
        "page.pdf": pdf(),
        "letter.odt": packed({"mimetype": "application/vnd.oasis.opendocument.text", "content.xml": _OPEN_DOCUMENT}),
        "book.epub": packed({"mimetype": "application/epub+zip", "META-INF/container.xml": container, "c.opf": spine, "a.xhtml": page}),
    }


def outlook_message(subject, body, attachments=()):
    """A message as Outlook saves it ([MS-OXMSG]), in a compound file ([MS-CFB]) whose streams are all in its small sectors."""
    text = struct.Struct("<IIQ")

    def properties(head, names):
        return bytes(head) + b"".join(text.pack(name << 16 | 0x1F, 6, 0) for name in names)

    def string(name, value):
        return f"__substg1.0_{name:04X}001F", value.encode("utf-16-le")

    sent = struct.pack("<IIQ", 0x0039_0040, 6, 133_604_000_000_000_000)  # 2024-05-16, in steps of 100 ns since 1601
    top = [("__properties_version1.0", properties(32, (0x37, 0x1000)) + sent), string(0x37, subject), string(0x1000, body)]
    entries = [(name, content, -1) for name, content in top]
    for number, (name, content) in enumerate(attachments):
        folder = len(entries)
        method = struct.pack("<IIQ", 0x3705_0003, 6, 1)
        parts = [
            ("__properties_version1.0", properties(8, (0x3707,)) + method + struct.pack("<IIQ", 0x3701_0102, 6, len(content))),
            string(0x3707, name),
            ("__substg1.0_37010102", content),
        ]
        entries.append((f"__attach_version1.0_#{number:08X}", None, -1))
        entries += [(part, value, folder) for part, value in parts]
    return _compound_file(entries)


def _compound_file(entries):
    """entries: (name, content or None for a storage, number of the storage around or -1), in the order of the directory behind its root."""
    small, chain, starts = b"", [], []
    for _, content, _ in entries:
        starts.append(len(small) // 64 if content else 0xFFFFFFFE)
        if content:
            count = -(-len(content) // 64)
            chain += [*range(len(chain) + 1, len(chain) + count), 0xFFFFFFFE]
            small += content.ljust(64 * count, b"\0")
    children = {around: [number for number, entry in enumerate(entries) if entry[2] == around] for around in (-1, *range(len(entries)))}

    def entry(name, kind, child, after, start, size):
        raw = name.encode("utf-16-le")
        links = struct.pack("<III", 0xFFFFFFFF, after, child)
        return raw.ljust(64, b"\0") + struct.pack("<HBB", len(raw) + 2, kind, 1) + links + bytes(36) + struct.pack("<IQ", start, size)

    def first(around):
        return children[around][0] + 1 if children[around] else 0xFFFFFFFF

    small = small.ljust(-(-len(small) // 512) * 512, b"\0")
    directory = entry("Root Entry", 5, first(-1), 0xFFFFFFFF, 0, len(chain) * 64)
    for number, (name, content, around) in enumerate(entries):
        later = [each for each in children[around] if each > number]
        after = later[0] + 1 if later else 0xFFFFFFFF
        kind, child = (1, first(number)) if content is None else (2, 0xFFFFFFFF)
        directory += entry(name, kind, child, after, starts[number], len(content or b""))
    directory = directory.ljust(-(-len(directory) // 512) * 512, b"\0")
    table = b"".join(struct.pack("<I", each) for each in chain)
    table = table.ljust(-(-len(table) // 512) * 512, b"\xff")
    runs = [len(small) // 512, len(directory) // 512, len(table) // 512]
    sectors = []
    for count in runs:
        sectors += [*range(len(sectors) + 1, len(sectors) + count), 0xFFFFFFFE]
    places = [0, runs[0], runs[0] + runs[1], sum(runs)]
    sectors.append(0xFFFFFFFD)
    assert len(sectors) <= 128
    fat = b"".join(struct.pack("<I", each) for each in sectors).ljust(512, b"\xff")
    head = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(16) + struct.pack("<HHHHH6x", 0x3E, 3, 0xFFFE, 9, 6)
    head += struct.pack("<IIIIIIIII", 0, 1, places[1], 0, 4096, places[2], runs[2], 0xFFFFFFFE, 0) + struct.pack("<I", places[3])
    return head.ljust(512, b"\xff") + small + directory + table + fat
