"""No path of a request leads out of the workspace, or into the app's own folder."""

import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm.app.workspace import Workspace
from cllm.runtime.errors import UserError
from cllm.serve.errors import Refused


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    folder = tmp_path_factory.mktemp("around")
    root = folder / "workspace"
    (root / "books" / "deep").mkdir(parents=True)
    (folder / "outside").mkdir()
    (root / "books" / "inside").symlink_to(root / "books" / "deep")
    (root / "books" / "out").symlink_to(folder / "outside")
    (root / "books" / "loop").symlink_to(root / "books" / "loop")
    (root / "books" / "state").symlink_to(root / ".cllm")
    return Workspace(root)


HOSTILE = [
    "..", "../x", "books/../..", "books/../../outside", "/etc/passwd", "//etc", "/", "books/out", "books/out/new/file",
    "\0", "a\0b", "a\nb", "a\x7fb",
    "-x", "--out", "~", "~/x", ".cllm", ".cllm/secret", "./.cllm/jobs.sqlite", "books/.cllm/secret", ".CLLM/secret", "books/state/secret",
    "x" * 10_000, "y" * 300, "\ud800",
    None, 3, ["x"], {"a": 1}, True,
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_paths_are_refused(workspace, text):
    with pytest.raises(Refused) as caught:
        workspace.resolve(text, "data")
    assert caught.value.status == 400 and caught.value.param == "data"


def test_paths_inside_are_found_as_they_are(workspace):
    for text, place in [("", "."), (".", "."), ("books", "books"), ("books/inside/x", "books/deep/x"), ("new/é/x y", "new/é/x y"), ("a..b", "a..b")]:
        assert workspace.relative(workspace.resolve(text)) == place
    with pytest.raises(Refused) as caught:
        workspace.resolve("no/such", exists=True)
    assert caught.value.status == 404


PARTS = st.sampled_from(
    ["..", ".", "books", "out", "inside", "state", "loop", ".cllm", "", "x", "~", "-", "\\", "..\\", "%2e%2e", "\u2024\u2024", "é"]
)


@settings(deadline=None)
@given(st.lists(PARTS, max_size=7).map("/".join) | st.text(max_size=40))
def test_what_is_let_through_lies_inside(workspace, text):
    try:
        found = workspace.resolve(text)
    except Refused as error:
        assert error.status == 400
        return
    real = os.path.realpath(found)
    assert real == str(workspace.root) or real.startswith(f"{workspace.root}{os.sep}")
    assert not real.startswith(str(workspace.state))


def test_the_apps_folder_is_the_users_alone_and_no_link(tmp_path):
    (tmp_path / "real").mkdir()
    found = Workspace(tmp_path / "real")
    assert found.state.stat().st_mode & 0o777 == 0o700
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / ".cllm").symlink_to(tmp_path / "real")
    with pytest.raises(UserError, match="no link"):
        Workspace(tmp_path / "linked")
