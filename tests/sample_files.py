"""Small valid files of many kinds, made by the programs that people make them with where there is one."""

import gzip
import io
import json
import mailbox
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
        "rows.jsonl": lines(),
        "rows.csv": table().encode(),
        "rows.parquet": parquet(),
        "pack.zip": archive(),
        "pack.tar": tape(),
        "pack.tar.gz": tape("w:gz"),
        "prose.txt.gz": gzip.compress((PROSE * 5).encode()),
    }
