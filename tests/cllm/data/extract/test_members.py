"""Archives are opened as streams: every member is found by name, what is hostile in them costs a row, and nothing is written to the disk."""

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile

import pytest

from cllm.data.extract.members import Refused, members
from cllm.data.extract.options import Options


def zipped(files, method=zipfile.ZIP_DEFLATED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return file.getvalue()


def tarred(files, mode="w", kind=tarfile.GNU_FORMAT):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode, format=kind) as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return file.getvalue()


def found(tmp_path, content, name="a.zip", options=Options()):
    """({name: content}, {name: reason}) of what is in a file."""
    path = tmp_path / name
    path.write_bytes(content)
    kept, refused = {}, {}
    for member in members(path, name, options):
        if isinstance(member, Refused):
            refused[member.name] = member.reason
        else:
            kept[member.name] = (
                member.source if isinstance(member.source, bytes) else member.source.read() if not hasattr(member.source, "open") else b""
            )
    return kept, refused


FILES = {"b/c.txt": b"some text\n" * 50, "d.py": b"import os\n", "\u00fc/\u65e5.md": b"# words\n"}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_members_of_a_zip_archive(tmp_path, method):
    assert found(tmp_path, zipped(FILES, method)) == ({f"a.zip/{name}": content for name, content in FILES.items()}, {})


@pytest.mark.parametrize("kind", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT, tarfile.USTAR_FORMAT])
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_members_of_a_tar_archive(tmp_path, mode, kind):
    files = {**FILES, "long/" * 18 + "name.txt": b"far down\n"}
    assert found(tmp_path, tarred(files, mode, kind), "a.tar") == ({f"a.tar/{name}": content for name, content in files.items()}, {})


@pytest.mark.parametrize(("pack", "ending"), [(gzip.compress, "gz"), (bz2.compress, "bz2"), (lzma.compress, "xz")])
def test_a_compressed_file_keeps_its_name(tmp_path, pack, ending):
    content = pack(b"one ") + pack(b"two")
    assert found(tmp_path, content, f"a.txt.{ending}") == ({f"a.txt.{ending}": b"one two"}, {})


def test_names_that_point_out_of_the_archive_are_names(tmp_path):
    kept, refused = found(tmp_path, zipped({"../../../etc/passwd": b"root", "/abs/olute.txt": b"x y"}))
    assert kept == {"a.zip/../../../etc/passwd": b"root", "a.zip//abs/olute.txt": b"x y"} and not refused
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.zip"]
