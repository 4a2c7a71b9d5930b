"""Every command and the Python example of the README do what it says, on real text."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import urllib.request
from pathlib import Path

import pytest
from command import PATIENCE, TINY, Started, cllm, python, wait_until
from growing_site import Site, articles

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def commands() -> list[list[str]]:
    return [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines() if line.strip()]


@pytest.fixture
def site():
    with Site() as site:
        site.published = 5
        yield site


def test_the_commands_of_the_readme_run_one_after_the_other(text, site, tmp_path):
    """In a folder with books/, more-text/ and the like; the model is made small, the text short, and the web a server of this machine."""
    (tmp_path / "books").symlink_to(text)
    (tmp_path / "more-text").symlink_to(text / "json")
    for name in ("papers", "notes"):
        (tmp_path / name).mkdir()
        for number, paragraphs in enumerate(articles()[-8:]):
            (tmp_path / name / f"{number}.txt").write_text("\n\n".join(paragraphs))
    shutil.make_archive(str(tmp_path / "archive"), "zip", tmp_path / "papers")
    small = (*map(str, TINY), "--steps", "5")
    with_data = importlib.util.find_spec("aiohttp") and importlib.util.find_spec("pyarrow")  # of the extra [data], which make setup installs
    ran = []
    for words in commands():
        if not with_data and ({"crawl", "prepare", "corpus/"} & set(words)):
            continue
        if words[0] not in ("cllm", "torchrun"):
            continue
        if "gguf" in words and importlib.util.find_spec("gguf") is None:
            continue  # of the extra [export], which make setup installs
        if words[1] == "crawl":
            words = [f"http://{site.address}/" if each.startswith("https:") else each for each in words]
            words += ["--allow-private", site.address, "--delay", "0"]
        if "--follow" in words:
            words = [*words, "--once", "--round-bytes", "1000"]
        if words[1] == "serve":
            _try_server(words, tmp_path)
            ran.append("serve")
            continue
        if "--hours" in words:
            continue  # test_train_time.py has it, with less time
        if words[1] == "app":
            continue  # begun last, when there is something to show
        begins = "train" in words and {"books/", "corpus/", "notes/"} & set(words)
        short = ("--batch-size", 4, "--threads", 2, "--steps", 3)  # a model to start from has its sizes and vocabulary
        extra = small if begins else short if "--from" in words else ("--max-tokens", "8") if words[1] == "generate" else ()
        if words[0] == "torchrun":
            launcher = Started(*words[1:], *extra, program="from torch.distributed.run import main; main()", cwd=tmp_path)
            assert launcher.wait() == 0, f"{words}: {launcher.communicate()}"
            ran.append("torchrun")
            continue
        done = cllm(*words[1:], *extra, cwd=tmp_path)
        assert done.status == 0, f"{words}: {done.err}"
        ran.append(words[1])
    _try_app(next(words for words in commands() if words[:2] == ["cllm", "app"]), tmp_path)
    assert {"train", "generate", "serve", "evaluate", "export", "doctor", "report", "checkpoint", "torchrun"} <= set(ran)


def _try_app(words: list[str], folder: Path) -> None:
    """Starts the app, opens the address that it prints, and sees the runs of the commands before."""
    app = Started(*words[1:], "--port", 0, "--no-browser", cwd=folder)
    try:
        wait_until(lambda: re.search(r"http://127\.0\.0\.1:\d+/\S*\n", app.out), app)
        address = re.search(r"http://127\.0\.0\.1:\d+/\S*", app.out)[0]
        browser = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
        with browser.open(address, timeout=PATIENCE) as page:
            assert "<main" in page.read().decode() and "token" not in page.url
        with browser.open(page.url + "api/runs", timeout=PATIENCE) as answer:
            assert "books" in {each["name"] for each in json.load(answer)}
    finally:
        app.send_signal(signal.SIGINT)
        assert app.wait() in (0, 130), app.communicate()


def _try_server(words: list[str], folder: Path) -> None:
    """Starts the server, sends it what the README sends, and ends it."""
    server = Started(*words[1:], "--port", 0, cwd=folder)
    try:
        wait_until(lambda: re.search(r"Serving books.*\n", server.out), server)
        port = re.search(r"Serving books.*http://\S+:(\d+)", server.out)[1]
        for asked in commands():
            if asked[0] == "curl":
                asked = [each.replace(":8000", f":{port}") for each in asked]
                done = subprocess.run([*asked, "--silent", "--fail-with-body"], capture_output=True, text=True, timeout=PATIENCE)
                assert done.returncode == 0 and '"choices"' in done.stdout, done
        (example,) = (block.replace(":8000", f":{port}") for block in blocks("python") if "openai" in block)
        done = python("-c", example)
        assert done.status == 0 and done.out, done.err
    finally:
        server.send_signal(signal.SIGINT)
        assert server.wait() == 0, server.communicate()


def test_the_python_example_of_the_readme_runs(tmp_path):
    example = next(block for block in blocks("python") if "openai" not in block)
    done = python("-c", example, cwd=tmp_path)
    assert done.status == 0, done.err
    assert "torch.Size([1, 128, 4, 32])" in done.out and (tmp_path / "model.cllm").exists()


def test_make_demo_and_make_test_are_what_the_makefile_offers():
    makefile = (ROOT / "Makefile").read_text()
    for words in commands():
        if words[0] == "make":
            assert re.search(rf"^{words[1]}:", makefile, re.MULTILINE), words


def test_the_demo_configuration_trains_on_this_machines_python_sources(tmp_path):
    """make demo, but for two steps: the same data, the same file of settings."""
    import sysconfig

    left_out = "site-packages, dist-packages, test, asyncio, email, unittest, idlelib, lib2to3, encodings, tkinter"
    options = ("--config", ROOT / "examples/demo.toml", "--out", "demo", "--steps", 2, "--set", f"data.exclude={left_out}")
    done = cllm("train", sysconfig.get_path("stdlib"), *options, cwd=tmp_path)
    assert done.status == 0, done.err
    for words in ("device ", "compute ", "kernels ", "files:", "tokenizer:", "tokens:", "A sample", "cllm generate demo", "Validation:"):
        assert words in done.out, words
    assert re.search(r"step 2/2 .* tokens .* loss .* lr .* grad .* tok/s .* GB", done.err), done.err[-2000:]


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_no_path_of_a_machine_stands_in_the_project():
    names = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    home = re.compile(r"(^|[^A-Za-z0-9_.])/(home|root|work|Users)/[a-z]")
    texts = {name: (ROOT / name).read_text(errors="ignore") for name in names if name and os.path.isfile(ROOT / name)}
    assert not [name for name, content in texts.items() if home.search(content) and name != "tests/end_to_end/test_readme.py"]


def test_the_measured_table_is_what_the_script_writes():
    spec = importlib.util.spec_from_file_location("readme_table", ROOT / "profiling/readme_table.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.updated(README) == README, "run python profiling/readme_table.py"
