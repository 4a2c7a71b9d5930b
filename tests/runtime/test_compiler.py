"""The key of the cache of compiled kernels changes with all that a kernel depends on, and with all that the kernels registered."""

import ast
import importlib
from pathlib import Path

import pytest

from cllm.runtime import compiler

numba_kernels = importlib.import_module("cllm.kernels.numba")
KERNELS = Path(__file__).parents[2] / "kernels" / "numba"


@pytest.fixture
def nothing_registered(monkeypatch):
    monkeypatch.setattr(compiler, "_folders", {})
    monkeypatch.setattr(compiler, "_beside", {})
    monkeypatch.setattr(compiler, "_ready", False)
    compiler.kernel_cache_key.cache_clear()
    yield
    monkeypatch.undo()
    compiler.kernel_cache_key.cache_clear()


def _key() -> str:
    compiler.kernel_cache_key.cache_clear()
    return compiler.kernel_cache_key()


def _variables_read(path: Path) -> set[str]:
    """Names of the environment variables that a source reads, by os.environ.get, os.environ[...] or os.getenv."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).removeprefix("os.") in ("environ.get", "getenv"):
            found.add(ast.literal_eval(node.args[0]))
        if isinstance(node, ast.Subscript) and ast.unparse(node.value).removeprefix("os.") == "environ":
            found.add(ast.literal_eval(node.slice))
    return found


def test_the_kernels_register_every_variable_that_they_read():
    read = set().union(*map(_variables_read, KERNELS.glob("*.py")))
    assert read == set(numba_kernels.VARIABLES) and "CLLM_BF16_KERNEL" in read
    assert {folder.resolve(): variables for folder, variables in compiler._folders.items()}[KERNELS.resolve()] == read


def test_the_key_changes_with_every_variable_that_the_kernels_registered(nothing_registered, monkeypatch):
    for name in numba_kernels.VARIABLES:
        monkeypatch.delenv(name, raising=False)
    compiler.register_kernels(KERNELS, numba_kernels.VARIABLES)
    keys = {_key()}
    for name in numba_kernels.VARIABLES:
        with monkeypatch.context() as changed:
            changed.setenv(name, "8")
            keys.add(_key())
    assert len(keys) == 1 + len(numba_kernels.VARIABLES)
    monkeypatch.setenv("CLLM_THREADS", "3")  # which no kernel reads
    assert _key() in keys


def test_the_key_changes_with_the_sources(nothing_registered, tmp_path):
    (tmp_path / "a.py").write_text("x = 1")
    before = _key()
    compiler.register_kernels(tmp_path)
    registered = _key()
    (tmp_path / "a.py").write_text("x = 2")
    assert len({before, registered, _key()}) == 3


def test_the_key_changes_with_the_constants_that_kernels_take_from_beside_their_folder(nothing_registered, tmp_path):
    folder, beside = tmp_path / "kernels", tmp_path / "constants.py"
    folder.mkdir()
    beside.write_text("x = 1")
    compiler.register_kernels(folder, beside=[beside])
    before = _key()
    beside.write_text("x = 2")
    compiler.kernel_cache_key.cache_clear()
    assert _key() != before


def test_every_file_that_the_kernels_take_names_from_is_in_their_key():
    taken = set()
    for path in KERNELS.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if path.name == "__init__.py" or not isinstance(node, ast.ImportFrom):
                continue
            parts = (node.module or "").split(".")
            if parts[:2] == ["cllm", "kernels"] and parts[2:3] != ["numba"]:
                taken |= {f"{parts[2]}.py"} if len(parts) > 2 else {f"{alias.name}.py" for alias in node.names}
    assert "quantization.py" in taken and taken - {"numba.py"} == set(numba_kernels.CONSTANTS)


def test_other_folders_do_not_change_where_the_kernels_of_a_folder_are_kept(nothing_registered, tmp_path, monkeypatch):
    """A command that reads text before it trains uses the kernels that one that only trains has compiled."""
    monkeypatch.setenv("NUMBA_CACHE_DIR", "")
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
        (folder / "kernel.py").write_text(f"x = {folder.name!r}")
    assert compiler.folder_of(str(first / "kernel.py")) is None
    compiler.register_kernels(first, ["CLLM_FIRST"])
    alone = compiler.folder_of(str(first / "kernel.py"))
    compiler.register_kernels(second, ["CLLM_SECOND"])
    monkeypatch.setenv("CLLM_SECOND", "1")
    assert compiler.folder_of(str(first / "kernel.py")) == alone != compiler.folder_of(str(second / "kernel.py"))
    compiler.kernel_cache_key.cache_clear()
    monkeypatch.setenv("CLLM_FIRST", "1")
    assert compiler.folder_of(str(first / "kernel.py")) != alone
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "mine"))
    assert compiler.folder_of(str(first / "kernel.py")) is None


def test_kernels_registered_after_numba_was_prepared_get_a_folder_of_their_own(nothing_registered, tmp_path, monkeypatch):
    numba = pytest.importorskip("numba")
    monkeypatch.setattr(compiler, "_ready", True)
    monkeypatch.setattr(numba.config, "CACHE_DIR", numba.config.CACHE_DIR)
    monkeypatch.setenv("NUMBA_CACHE_DIR", "numba-0123456789abcdef")
    compiler.register_kernels(tmp_path)
    assert numba.config.CACHE_DIR.endswith(f"numba-{_key()}")


def test_what_numba_really_compiles_is_said_by_the_work_that_waits_for_it(capsys):
    import numba

    from cllm.runtime import progress

    compiler.numba_setup()

    @numba.njit(cache=False)
    def twice(number):
        return 2 * number

    with progress.Stage("first step", log_seconds=0.0) as stage:
        began = progress.compilation.clock()
        before = stage.seconds
        assert twice(2) == 4
        passed, working = stage.seconds - before, progress.compilation.clock() - began
        assert twice(3) == 6
        assert stage.line().startswith("first step: compiling CPU kernels for this machine")
    assert not progress.compilation.is_going_on and working < passed / 2
