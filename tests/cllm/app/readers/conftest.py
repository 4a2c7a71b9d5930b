"""A workspace in which the real commands have worked, made once: a run, a data set, a crawl, and a model in a file."""

import shutil

import pytest
from app_client import Client
from command import TINY, cllm
from growing_site import Site, articles
from served_model import write_model


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """Not to be changed: tests that change something take `workspace`."""
    root = tmp_path_factory.mktemp("workspace")
    (root / "books").mkdir()
    for number, paragraphs in enumerate(articles()[:12]):
        (root / "books" / f"{number}.txt").write_text("\n\n".join(paragraphs))
    (root / "books" / "copy.txt").write_bytes((root / "books" / "0.txt").read_bytes())
    (root / "books" / "short.txt").write_text("too short")
    settings = ("--steps", 12, "--set", "log.layers_every=3", "--set", "train.sample_every=6", "--set", "train.eval_every=4")
    ran = cllm("train", "books", "--out", "runs/tiny", *settings, *TINY, cwd=root)
    assert ran.status == 0, ran.err
    ran = cllm("prepare", "books", "--out", "sets/books", "--json", cwd=root)
    assert ran.status == 0, ran.err
    with Site() as site:
        site.published = 3
        ran = cllm("crawl", f"http://{site.address}/", "--out", "pages", "--delay", 0, "--allow-private", site.address, cwd=root)
        assert ran.status == 0, ran.err
    write_model(root / "chat.cllm")
    return root


@pytest.fixture
def workspace(made, tmp_path):
    """A copy, to be changed as a test likes."""
    root = tmp_path / "workspace"
    shutil.copytree(made, root, symlinks=True)
    return root


@pytest.fixture(scope="session")
def reader(made):
    """A client of the workspace that is not changed."""
    with Client(made) as client:
        yield client


@pytest.fixture
def client(workspace):
    with Client(workspace) as found:
        yield found
