"""Pictures of every tab of `cllm app`, in light and dark, on a phone and on a wide screen, from a workspace with a run that was really trained.

    python docs/_ext/screenshots.py shots/                      # NAME-light-1440.png, NAME-dark-390.png, ...
    python docs/_ext/screenshots.py shots/ --workspace mine/    # of a workspace that is there already
    python docs/_ext/screenshots.py docs/_static --docs         # the pictures of README and of docs/app.md alone

Needs Chromium and the extra `browser`.
"""

import argparse
import pydoc_data.topics
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

PAGES = {
    "home": "#/home", "data": "#/data", "training": "#/training", "run": "#/training/runs/demo",
    "compare": "#/training?compare=runs/demo&compare=runs/small",
    "llm": "#/llm/runs/demo", "models": "#/models", "model": "#/models/runs/demo", "crawler": "#/crawler", "system": "#/system",
}  # fmt: skip
WIDTHS = {1440: 900, 390: 844}  # of a wide screen and of a phone, with their heights, in CSS pixels
QUIET = ("--no-sandbox", "--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run", "--disable-gpu")
SHAPE = ("--embed-dim", "64", "--num-heads", "2", "--seq-len", "64", "--batch-size", "4", "--vocab-size", "512", "--set", "log.layers_every=5")
DOCS = {"run": "app-training.png", "llm": "app-llm.png", "models": "app-models.png"}
DOCS_SIZE = (1200, 900)
READY = """() => {
  const shown = document.querySelector("[role=tabpanel]:not([hidden])");
  return shown?.querySelector("h1") && !shown.querySelector(".spinner");
}"""
SETTLED = 1500  # milliseconds after which a tab that has fetched what it shows has drawn it


def make_workspace(folder: Path) -> None:
    """A folder of real text, and two runs that learnt from it."""
    (folder / "books").mkdir(parents=True)
    (folder / "books" / "reference.txt").write_text("\n\n".join(pydoc_data.topics.topics.values()))
    for name, layers, steps in (("demo", "4", "300"), ("small", "2", "200")):
        words = ("train", "books", "--out", f"runs/{name}", "--num-layers", layers, "--steps", steps, "--sample-every", "50", *SHAPE)
        subprocess.run([sys.executable, "-m", "cllm", *words], cwd=folder, check=True)


def say_something(page: Any) -> None:
    """A text of the model, token by token, with what else could have stood in one place."""
    page.get_by_label("max-tokens", exact=True).fill("60")
    page.get_by_label("seed", exact=True).fill("1")
    page.get_by_label("Text to go on from").fill("The value of an expression")
    page.get_by_role("button", name="Continue").click()
    page.get_by_role("button", name="Probabilities").click(timeout=300_000)
    page.locator(".token-text .token").nth(8).hover()


def take(folder: Path, out: Path, names: list[str], docs: bool) -> None:
    """Starts the app in a workspace and writes a picture of each of the pages; docs: those of the documentation, as much as a wide screen shows."""
    from playwright.sync_api import sync_playwright

    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise SystemExit("screenshots: Chromium is not installed. On Debian and Ubuntu: apt install chromium")
    out.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "cllm", "app", "--no-browser", "--port", "0"]
    app = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
    try:
        assert app.stdout is not None
        address = next(found[0] for line in app.stdout if (found := re.search(r"http://\S+token=\S+", line)))
        with sync_playwright() as driver:
            browser = driver.chromium.launch(executable_path=chromium, args=list(QUIET))
            for scheme in ("light",) if docs else ("light", "dark"):
                for width, height in (DOCS_SIZE,) if docs else WIDTHS.items():
                    page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
                    page.goto(address)
                    for name in names:
                        page.evaluate("address => { location.hash = address; }", PAGES[name])
                        page.wait_for_timeout(SETTLED / 3)
                        page.wait_for_function(READY)
                        if name == "run":
                            page.locator("main canvas:visible").first.wait_for(timeout=300_000)  # its curves
                        if docs and name == "llm":
                            say_something(page)
                        page.wait_for_timeout(SETTLED)
                        page.screenshot(path=out / (DOCS[name] if docs else f"{name}-{scheme}-{width}.png"), full_page=not docs)
                    page.close()
            browser.close()
    finally:
        app.terminate()
        app.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the pictures")
    parser.add_argument("--workspace", type=Path, help="workspace to show; by default one is made, which trains for a minute")
    parser.add_argument("--pages", nargs="+", choices=PAGES, default=list(PAGES), help="only these")
    parser.add_argument("--docs", action="store_true", help="the pictures of the documentation under their names there")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        workspace = given.workspace or Path(made) / "workspace"
        if given.workspace is None:
            make_workspace(workspace)
        take(workspace, given.out, list(DOCS) if given.docs else given.pages, given.docs)


if __name__ == "__main__":
    main()
