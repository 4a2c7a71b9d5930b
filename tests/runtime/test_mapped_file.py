"""Files read through memory: the bytes of the file, with no descriptor held open, until the last array has gone."""

import gc
import resource
from contextlib import contextmanager

import numpy as np
import pytest

from cllm.runtime.mapped_file import mapped


@contextmanager
def descriptors(most):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_more_files_are_read_than_a_process_may_have_open(tmp_path):
    for number in range(400):
        (tmp_path / str(number)).write_bytes(np.full(3, number, "<u2").tobytes())
    with descriptors(300):
        maps = [mapped(tmp_path / str(number), np.dtype("<u2")) for number in range(400)]
        assert [each.tolist() for each in maps] == [[number] * 3 for number in range(400)]


def test_an_array_outlives_its_file_and_the_map_ends_with_the_last_view(tmp_path):
    (tmp_path / "numbers").write_bytes(np.arange(5000, dtype="<i8").tobytes())
    whole = mapped(tmp_path / "numbers", np.dtype("<i8"))
    last = whole[-3:]
    (tmp_path / "numbers").unlink()
    del whole
    gc.collect()
    assert last.tolist() == [4997, 4998, 4999] and _is_mapped("numbers")
    with pytest.raises(ValueError, match="read-only"):
        last[0] = 1
    del last
    gc.collect()
    assert not _is_mapped("numbers")


def _is_mapped(name):
    with open("/proc/self/maps") as maps:
        return any(f"/{name}" in line for line in maps)


def test_what_is_empty_or_missing_or_no_whole_number_of_elements(tmp_path):
    (tmp_path / "empty").touch()
    assert mapped(tmp_path / "empty", np.float32).shape == (0,)
    with pytest.raises(FileNotFoundError):
        mapped(tmp_path / "missing", np.float32)
    (tmp_path / "odd").write_bytes(b"abc")
    with pytest.raises(ValueError, match="multiple"):
        mapped(tmp_path / "odd", np.int16)
    with pytest.raises(OSError):
        mapped(tmp_path, np.int16)
