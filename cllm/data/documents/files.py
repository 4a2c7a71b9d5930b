"""Which files of a folder may hold text, in a fixed order, and a count of what was left out and why. What they hold is told by `scan`."""

import json
import os
import re
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from cllm.runtime.errors import DataError
from cllm.runtime.printable import printable
from cllm.runtime.quantities import counted

# Skipped without opening them. Everything else is decided by its content.
_BINARY_EXTENSIONS = """
    .7z .a .aac .arrow .avi .avif .bin .bmp .bz2 .class .db .deb .dll .dmg .doc .docx .dylib .egg .eot .epub .exe .feather .flac .gguf .gif
    .gz .h5 .hdf5 .heic .ico .img .iso .jar .jpeg .jpg .lib .lz4 .m4a .mkv .mo .mobi .mov .mp3 .mp4 .msi .node .npy .npz .o .obj .odp .ods
    .odt .oga .ogg .ogv .onnx .otf .pdf .pickle .pkl .png .ppt .pptx .psd .pt .pth .pyc .pyo .rar .rpm .safetensors .so .sqlite
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
# Reasons for which a file is left out here and read by `cllm prepare`, by its name or by its first bytes.
_FOR_PREPARE = re.compile(
    r"binary \((?:\.(?:pdf|docx|pptx|xlsx|odt|ods|odp|epub|zip|tar|tgz|gz|xz|zst)|PDF|RTF document|(?:zip|gzip|xz|zstd) archive)\)"
)
GENERATED_ENDINGS = (".min.js", ".min.css", ".js.map", ".css.map")
VCS_FOLDERS = frozenset({"CVS", "_darcs", "_svn", "SCCS"})
# Files that give away a folder of results: packed tokens, prepared text, a trained run, a run that is being prepared.
_OUTPUTS = (
    ("dataset.json",), ("tokens/dataset.json",), ("sources.json", "sources.bin"),
    ("config.toml", "metrics.jsonl"), ("config.toml", ".lock"), ("config.toml", "data/sources.json"),
)  # fmt: skip
# What `cllm prepare` leaves in the folder that it writes, so that its results can be told from its reports and its memory.
PREPARED_MARK, PREPARED_FORMAT = "prepared.json", "cllm-prepared"
_PREPARED_WORK = frozenset({"cache", "ledger", "work", "stage", "tmp"})  # folders in it that hold no results
_KINDS = "unreadable |hidden |special |broken |version control |JSON |Parquet "
_NOUN = re.compile(rf"((?:{_KINDS})?(?:record|row|question|table|file|folder|link|output))\b( that is )?")  # the first words of a reason
FOREIGN_FOLDERS = {"__pycache__": "compiled files"} | dict.fromkeys(("node_modules", "site-packages", "dist-packages"), "installed packages")


@dataclass
class Skipped:
    """What was left out: reason -> number, and up to three examples. A reason follows a number: "binary (.png)", "record with empty text"."""

    counts: dict[str, int] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, name: str, count: int = 1) -> None:
        self.counts[reason] = self.counts.get(reason, 0) + count
        names = self.examples.setdefault(reason, [])
        if len(names) < 3:
            names.append(printable(name))

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
        return [
            f"{n:,} {_plural(reason) if n != 1 else reason}: {', '.join(self.examples[reason])}{', ...' if n > len(self.examples[reason]) else ''}"
            for reason, n in ordered
        ]

    def advice(self) -> str:
        """How text is got out of what was left out, as a sentence; empty where there is no way."""
        if not any(_FOR_PREPARE.fullmatch(reason) for reason in self.counts):
            return ""
        return "cllm prepare makes text of PDF, Office, e-books and archives: give it the same path, and train on the folder that it writes."

    def report(self) -> list[str]:
        """What people are told: how many, the most frequent reasons, and what helps; nothing where nothing was left out."""
        lines = self.lines()
        more = [f"  and for {counted(len(lines) - 8, 'other reason')} (listed in dataset.json)"] if len(lines) > 8 else []
        advice = [f"  {self.advice()}"] if self.advice() else []
        return [f"left out {self.total:,}:", *(f"  {line}" for line in lines[:8]), *more, *advice] if lines else []

    def brief(self) -> str:
        """The same on one line; empty where nothing was left out."""
        lines = self.lines()
        more = [f"and for {counted(len(lines) - 3, 'other reason')}"] if len(lines) > 3 else []
        return f"left out {self.total:,}: {'; '.join([*lines[:3], *more])}" if lines else ""

    def to_dict(self) -> dict[str, Any]:
        return {reason: {"count": count, "examples": self.examples[reason]} for reason, count in sorted(self.counts.items())}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Skipped":
        return cls({r: int(v["count"]) for r, v in values.items()}, {r: [str(name) for name in v["examples"]] for r, v in values.items()})


def _plural(reason: str) -> str:
    """What is said of several: "records with empty text" for "record with empty text". Adjectives, such as "empty", stay as they are."""
    found = _NOUN.match(reason)
    if found is None:
        return reason
    return f"{found[1]}s{' that are ' if found[2] else ''}{reason[found.end() :]}"


class SourceFile(NamedTuple):
    """A file that may hold text: where it is, its name below the folder, and what the file system says about it."""

    path: Path
    name: str
    size: int
    stamp: tuple[int, int, int]  # mtime_ns, ctime_ns, inode: unchanged means that the content need not be read again
    real: str  # where it is without any link on the way


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
        raise DataError(f"{base} {what}. Give a folder of text, a text file, a JSON, CSV or Parquet file or a packed token folder.") from None
    if stat.S_ISREG(status.st_mode):
        return [_source(base, base.name, status, os.path.realpath(base))], skipped
    if not stat.S_ISDIR(status.st_mode):
        raise DataError(
            f"{base} is neither a file nor a folder. Give a folder of text, a text file, a JSON, CSV or Parquet file or a packed token folder."
        )
    if not os.access(base, os.R_OK | os.X_OK):
        raise DataError(f"{base} cannot be read (permission denied). Change its permissions, or run as a user who may read it.")

    excluded = {os.path.realpath(path) for path in exclude}
    files: list[SourceFile] = []
    visited: set[tuple[int, int]] = {(status.st_dev, status.st_ino)}
    pending = [(base, "", False)]
    while pending:
        folder, prefix, prepared = pending.pop()
        prepared = prepared or is_prepared(folder)
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:
            skipped.add("unreadable folder", prefix or str(folder))
            continue
        real_folder = os.path.realpath(folder)
        for entry in entries:
            name = prefix + entry.name
            path = Path(entry.path)
            real = os.path.realpath(path) if entry.is_symlink() else os.path.join(real_folder, entry.name)
            if real in excluded:
                continue
            try:
                status = entry.stat()
            except OSError:
                skipped.add("broken link" if entry.is_symlink() else "unreadable", name)
                continue
            if prepared and _beside_prepared(entry.name, stat.S_ISDIR(status.st_mode)):
                continue
            if stat.S_ISDIR(status.st_mode):
                reason = _skip_folder(path, visited, (status.st_dev, status.st_ino))
                if reason:
                    skipped.add(reason, name + "/")
                else:
                    pending.append((path, name + "/", prepared))
                continue
            reason = _skip_file(path, status)
            if reason:
                skipped.add(reason, name)
            else:
                files.append(_source(path, name, status, real))
    return sorted(files, key=lambda file: file.name), skipped


def is_prepared(folder: Path) -> bool:
    """Whether `cllm prepare` wrote this folder: then the Parquet files in it are the text, and nothing else is."""
    try:
        mark = json.loads((folder / PREPARED_MARK).read_text("utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(mark, dict) and mark.get("format") == PREPARED_FORMAT


def _beside_prepared(name: str, is_folder: bool) -> bool:
    """Whether something in a prepared folder is no result: a report, a list of what was done, a folder of work that is not finished."""
    return name.startswith((".", "_")) or (name in _PREPARED_WORK if is_folder else not name.lower().endswith(".parquet"))


def _source(path: Path, name: str, status: os.stat_result, real: str) -> SourceFile:
    return SourceFile(path, name, status.st_size, (status.st_mtime_ns, status.st_ctime_ns, status.st_ino), real)


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
        return "special file (a pipe, a socket or a device)"
    if status.st_size == 0:
        return "empty"
    if path.suffix.lower() in BINARY_EXTENSIONS:
        return f"binary ({path.suffix.lower()})"
    if name in GENERATED_NAMES or name.endswith(GENERATED_ENDINGS):
        return "minified or generated"
    return None
