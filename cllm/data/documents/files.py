"""From a folder, a file or JSONL to documents: a name and a stream of text, in a fixed order, with a count of what was left out and why.

One file is one document; in a JSONL file each line with a "text" (or "content") field is one. Line ends become \\n as in Python's universal
newlines, a byte order mark is dropped, halves of surrogate pairs (JSON can hold them) become U+FFFD; nothing else in a text is changed.
No file is held in memory: text comes in chunks.
"""

import hashlib
import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cllm.data.documents.charset import Binary, Charset, detect
from cllm.runtime.errors import DataError

CHUNK_CHARS = 1 << 18
JSONL = frozenset({".jsonl", ".ndjson"})
TEXT_FIELDS = ("text", "content")
ROW = np.dtype([("key", "<u8"), ("chars", "<i8"), ("bytes", "<i8")])  # one document: hash of its text, its size in characters and in UTF-8

# Skipped without opening them. Everything else is decided by its content.
_BINARY_EXTENSIONS = """
    .7z .a .aac .arrow .avi .avif .bin .bmp .bz2 .class .db .deb .dll .dmg .doc .docx .dylib .egg .eot .epub .exe .feather .flac .gguf .gif
    .gz .h5 .hdf5 .heic .ico .img .iso .jar .jpeg .jpg .lib .lz4 .m4a .mkv .mo .mobi .mov .mp3 .mp4 .msi .node .npy .npz .o .obj .odp .ods
    .odt .oga .ogg .ogv .onnx .otf .parquet .pdf .pickle .pkl .png .ppt .pptx .psd .pt .pth .pyc .pyo .rar .rpm .safetensors .so .sqlite
    .sqlite3 .tar .tgz .tif .tiff .ttf .war .wasm .wav .webm .webp .whl .woff .woff2 .xls .xlsx .xz .zip .zst
"""
# Where endless lines mean that a program wrote the file. In prose a paragraph may well be one line.
_CODE_EXTENSIONS = """
    .py .pyi .pyx .c .h .cc .cpp .cxx .hpp .hh .cu .cuh .m .mm .rs .go .java .kt .kts .scala .swift .cs .fs .vb .js .mjs .cjs .jsx .ts .tsx
    .vue .svelte .css .scss .less .html .htm .xml .svg .json .ipynb .php .rb .pl .pm .lua .r .jl .hs .ml .mli .clj .ex .exs .erl .sh .bash
    .zsh .fish .ps1 .sql .tcl .asm .s .f .f90 .f95 .d .dart .zig .nim .v .vhd .proto .thrift .cmake .yaml .yml .toml .ini
"""
_GENERATED_NAMES = "package-lock.json yarn.lock pnpm-lock.yaml poetry.lock uv.lock Cargo.lock composer.lock Gemfile.lock go.sum"
BINARY_EXTENSIONS, CODE_EXTENSIONS, GENERATED_NAMES = (frozenset(each.split()) for each in (_BINARY_EXTENSIONS, _CODE_EXTENSIONS, _GENERATED_NAMES))
GENERATED_ENDINGS = (".min.js", ".min.css", ".js.map", ".css.map")
LONG_LINE = 5000  # characters in the longest line, and
LONG_MEAN = 200  # on average, from which source code counts as minified or generated
VCS_FOLDERS = frozenset({"CVS", "_darcs", "_svn", "SCCS"})
# Files that give away a folder of results: packed tokens, prepared text, a trained run, a run that is being prepared.
_OUTPUTS = (("dataset.json",), ("tokens/dataset.json",), ("sources.json", "sources.bin"), ("metrics.jsonl", "config.toml"), ("config.toml", ".lock"))
FOREIGN_FOLDERS = {"__pycache__": "compiled files"} | dict.fromkeys(("node_modules", "site-packages", "dist-packages"), "installed packages")


@dataclass
class Skipped:
    """What was left out: reason -> number, and up to three examples."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str, count: int = 1) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count
        names = self.examples.setdefault(reason, [])
        if len(names) < 3:
            names.append(name)

    def update(self, other: "Skipped") -> None:
        for reason, count in other.counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + count
            self.examples[reason] = [*self.examples.get(reason, []), *other.examples.get(reason, [])][:3]

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def lines(self) -> list[str]:
        """One line a reason, the most frequent first: "12 binary (zero bytes): a.dat, b.dat, ..."."""
        ordered = sorted(self.counts.items(), key=lambda item: (-item[1], item[0]))
        return [f"{n:,} {reason}: {', '.join(self.examples[reason])}{', ...' if n > len(self.examples[reason]) else ''}" for reason, n in ordered]

    def to_dict(self) -> dict[str, Any]:
        return {reason: {"count": count, "examples": self.examples[reason]} for reason, count in sorted(self.counts.items())}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Skipped":
        return cls({r: int(v["count"]) for r, v in values.items()}, {r: [str(name) for name in v["examples"]] for r, v in values.items()})


class SourceFile(NamedTuple):
    """A file that may hold text: where it is, its name below the folder, and what the file system says about it."""

    path: Path
    name: str
    size: int
    stamp: tuple[int, int, int]  # mtime_ns, ctime_ns, inode: unchanged means that the content need not be read again


@dataclass
class FileInfo:
    """What reading a file told: its content hash, how to decode it, and a row for each of its documents."""

    kind: str  # "text" or "jsonl"
    digest: str
    charset: Charset
    rows: np.ndarray  # (num_documents,) of ROW
    skipped: Skipped = field(default_factory=Skipped)


class Document(NamedTuple):
    """A name and the text in chunks; the chunks must be taken before the next document is."""

    name: str
    chunks: Iterable[str]


def find(root: str | os.PathLike[str], exclude: Iterable[str | os.PathLike[str]] = ()) -> tuple[list[SourceFile], Skipped]:
    """All files below a folder (or the file itself) that may hold text, ordered by name; links are followed once.

    exclude: folders and files that are not part of the data, such as the place the results go to.
    Raises DataError when there is nothing at that place or it cannot be read.
    """
    base = Path(root)
    skipped = Skipped()
    try:
        status = base.stat()
    except OSError as error:
        what = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
        raise DataError(f"{base} {what}. Give a folder of text, a text file, a JSONL file or a packed token folder.") from None
    if stat.S_ISREG(status.st_mode):
        return [_source(base, base.name, status)], skipped
    if not stat.S_ISDIR(status.st_mode):
        raise DataError(f"{base} is neither a file nor a folder. Give a folder of text, a text file, a JSONL file or a packed token folder.")
    if not os.access(base, os.R_OK | os.X_OK):
        raise DataError(f"{base} cannot be read (permission denied). Change its permissions, or run as a user who may read it.")

    excluded = {os.path.realpath(path) for path in exclude}
    files: list[SourceFile] = []
    visited: set[tuple[int, int]] = {(status.st_dev, status.st_ino)}
    pending = [(base, "")]
    while pending:
        folder, prefix = pending.pop()
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            skipped.add("unreadable folder", prefix or str(folder))
            continue
        for entry in entries:
            name = prefix + entry.name
            path = Path(entry.path)
            if excluded and os.path.realpath(path) in excluded:
                continue
            try:
                status = entry.stat()
            except OSError:
                skipped.add("broken link" if entry.is_symlink() else "unreadable", name)
                continue
            if stat.S_ISDIR(status.st_mode):
                reason = _skip_folder(path, visited, (status.st_dev, status.st_ino))
                if reason:
                    skipped.add(reason, name + "/")
                else:
                    pending.append((path, name + "/"))
                continue
            reason = _skip_file(path, status)
            if reason:
                skipped.add(reason, name)
            else:
                files.append(_source(path, name, status))
    return sorted(files, key=lambda file: file.name), skipped


def _source(path: Path, name: str, status: os.stat_result) -> SourceFile:
    return SourceFile(path, name, status.st_size, (status.st_mtime_ns, status.st_ctime_ns, status.st_ino))


def _skip_folder(path: Path, visited: set[tuple[int, int]], identity: tuple[int, int]) -> str | None:
    name = path.name
    if name.startswith("."):
        return "hidden folder"
    if name in VCS_FOLDERS:
        return "version control folder"
    if name in FOREIGN_FOLDERS:
        return f"folder of {FOREIGN_FOLDERS[name]}"
    if (path / "pyvenv.cfg").exists():
        return "folder of installed packages"
    if any(all((path / name).exists() for name in names) for names in _OUTPUTS):
        return "output of cllm"
    if identity in visited:
        return "link to a folder seen before"
    visited.add(identity)
    return None


def _skip_file(path: Path, status: os.stat_result) -> str | None:
    name = path.name
    if name.startswith("."):
        return "hidden file"
    if not stat.S_ISREG(status.st_mode):
        return "not a regular file"
    if status.st_size == 0:
        return "empty"
    if path.suffix.lower() in BINARY_EXTENSIONS:
        return f"binary ({path.suffix.lower()})"
    if name in GENERATED_NAMES or name.endswith(GENERATED_ENDINGS):
        return "minified or generated"
    return None


def scan(file: SourceFile, report: Callable[[int], None] | None = None) -> FileInfo | str:
    """Read a file once and say what it holds, or why it is left out."""
    try:
        with open(file.path, "rb") as raw:
            digest = hashlib.blake2b(digest_size=16)
            while block := raw.read(1 << 20):
                digest.update(block)
                if report:
                    report(len(block))
            raw.seek(0)
            if file.path.suffix.lower() in JSONL:
                return _scan_jsonl(file, digest.hexdigest())
            charset = detect(raw)
    except PermissionError:
        return "unreadable (permission denied)"
    except OSError as error:
        return f"unreadable ({error.strerror})"
    if isinstance(charset, Binary):
        return charset.reason
    row, longest, mean = _measure(_read_text(file.path, charset))
    if row is None:
        return "empty"
    if file.path.suffix.lower() in CODE_EXTENSIONS and longest > LONG_LINE and mean > LONG_MEAN:
        return "minified or generated"
    return FileInfo("text", digest.hexdigest(), charset, np.array([row], dtype=ROW))


def read(file: SourceFile, info: FileInfo) -> Iterator[Document]:
    """The documents of a file, in the order of info.rows."""
    try:
        if info.kind == "jsonl":
            for line, text in _read_jsonl(file.path, Skipped()):
                yield Document(f"{file.name}:{line}", [text])
        else:
            yield Document(file.name, _read_text(file.path, info.charset))
    except OSError as error:
        raise DataError(f"{file.path} cannot be read any more ({error.strerror}). Run the same command again.") from None


def _read_text(path: Path, charset: Charset) -> Iterator[str]:
    with open(path, encoding=charset.codec, errors=charset.errors, newline=None) as text:
        while chunk := text.read(CHUNK_CHARS):
            yield chunk if chunk.isascii() else clean(chunk)


def clean(text: str) -> str:
    """The text without halves of surrogate pairs, which no encoding can express."""
    try:
        text.encode("utf-8")
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _measure(chunks: Iterable[str]) -> tuple[tuple[int, int, int] | None, int, float]:
    """Row of a document (None when it is blank), characters of its longest line, and of its mean line."""
    key = hashlib.blake2b(digest_size=8)
    chars = num_bytes = longest = open_line = newlines = 0
    blank = True
    for chunk in chunks:
        encoded = chunk.encode("utf-8")
        key.update(encoded)
        chars += len(chunk)
        num_bytes += len(encoded)
        blank = blank and not chunk.strip()
        first, *rest = chunk.split("\n")
        longest = max(longest, open_line + len(first), max(map(len, rest), default=0))
        open_line = len(rest[-1]) if rest else open_line + len(first)
        newlines += len(rest)
    if blank:
        return None, 0, 0.0
    return (int.from_bytes(key.digest(), "little"), chars, num_bytes), longest, chars / (newlines + 1)


def _scan_jsonl(file: SourceFile, digest: str) -> FileInfo | str:
    skipped = Skipped()
    rows = []
    for _, text in _read_jsonl(file.path, skipped, file.name):
        row = _measure([text])[0]
        assert row is not None  # blank ones are left out while reading
        rows.append(row)
    if not rows:
        return "JSONL without a line that has a text field"
    return FileInfo("jsonl", digest, Charset("utf-8", "strict", "JSON"), np.array(rows, dtype=ROW), skipped)


def _read_jsonl(path: Path, skipped: Skipped, name: str = "") -> Iterator[tuple[int, str]]:
    """(line number from 1, text) of each line that has a text; the others are counted."""
    with open(path, "rb") as raw:
        for number, line in enumerate(raw, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
            except (ValueError, RecursionError):
                skipped.add("JSONL line that is not JSON", f"{name}:{number}")
                continue
            text = next((record[key] for key in TEXT_FIELDS if isinstance(record.get(key), str)), None) if isinstance(record, dict) else None
            if text is None:
                skipped.add("JSONL line without a text field", f"{name}:{number}")
            elif not text.strip():
                skipped.add("JSONL line with empty text", f"{name}:{number}")
            else:
                yield number, clean(text.replace("\r\n", "\n").replace("\r", "\n"))
