"""From a web site that grows to a model that has learnt it: crawl, prepare and train as a user types them, on a server of this machine."""

import pytest
from command import cllm
from growing_site import Site

for module in ("aiohttp", "protego", "pyarrow", "trafilatura"):
    pytest.importorskip(module, reason="of the extra [data]")

SETTINGS = ("--embed-dim", 32, "--num-layers", 1, "--num-heads", 2, "--seq-len", 32, "--batch-size", 4, "--vocab-size", 320, "--threads", 2,
            "--steps", 10, "--round-bytes", 1000, "--set", "log.tensorboard=false")  # fmt: skip


def kept(folder):
    """Documents that the rules for web pages let through."""
    return cllm("data", "stats", folder / "run" / "documents", "--json").json["kept"]


def test_a_site_that_grows_is_crawled_and_learnt_in_rounds(tmp_path):
    crawl = ("crawl", "--out", tmp_path / "site", "--delay", 0, "--revisit", 0)
    train = ("train", tmp_path / "site", "--follow", "--once", "--out", tmp_path / "run", *SETTINGS, "--json")
    with Site() as site:
        site.published = 8
        begun = cllm(*crawl, f"http://{site.address}/", "--allow-private", site.address)
        assert begun.status == 0 and "9 pages" in begun.out, begun
        first = cllm(*train)
        assert first.status == 0, first.err
        (row,) = first.json["rounds"]
        assert row["documents"] == kept(tmp_path) <= 8, "the index is no text"

        site.published = 14
        again = cllm(*crawl, "--allow-private", site.address)
        assert again.status == 0, again.err
        second = cllm(*train)
        assert second.status == 0, second.err
        assert second.json["rounds"][0] == row
        assert second.json["rounds"][1]["documents"] == kept(tmp_path) - row["documents"] > 0
    written = cllm("generate", tmp_path / "run" / "model", "--prompt", "The", "--max-tokens", 4)
    assert written.status == 0
