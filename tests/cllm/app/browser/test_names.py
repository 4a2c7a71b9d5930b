"""Names are text: they may hold markup, commas, quotes, signs that turn the direction of writing, and be as long as a file system allows."""

import json
import shutil

import pytest
from app_browser import PATIENCE, TABS, open_tab, settle, start_app

expect = pytest.importorskip("playwright.sync_api").expect
expect.set_options(timeout=PATIENCE)

WIDE = "document.documentElement.scrollWidth"
SHOWN = "names => names.every((name) => [...document.querySelectorAll('td a')].some((link) => link.textContent === name))"
COMMA = "a,b"
HOSTILE = (
    "<script>window.harm=1<\u2215script>",
    "<img src=x onerror=window.harm=1>",
    "a..%2f..%2fetc",
    "' \" & ${harm} {{harm}}",
    "x" * 200,
    "\u202eevil\u202c \u200b",
    COMMA,
)


@pytest.fixture(scope="module")
def hostile(driver, trained, tmp_path_factory):
    """An app on a workspace with a run, a folder and a file of each of these names; the first run also says 10 kB of markup."""
    workspace = tmp_path_factory.mktemp("hostile")
    for name in HOSTILE:
        shutil.copytree(trained / "runs" / "demo", workspace / "runs" / name)
        (workspace / name).mkdir()
        (workspace / name / f"{name[:100]}.txt").write_text("text")
    first = workspace / "runs" / HOSTILE[0]
    long = "<script>window.harm=1</script>" * 350
    fault = {"kind": "event", "step": 40, "event": long[:2000], "action": "wait", "text": long, "fault_step": 40, "data": 1, "documents": [long]}
    with (first / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(fault) + "\n")
    with (first / "samples.txt").open("a") as file:
        file.write(f"=== step 41\n{long}\n</pre><script>window.harm=1</script>\n\n")
    running = start_app(workspace)
    yield running
    running.end()


@pytest.mark.parametrize("width", [390, 1280])
def test_names_that_mean_harm_stay_text(visit, hostile, width):
    page = visit(hostile, width=width)
    for name in TABS:
        open_tab(page, name)
        settle(page)
        assert page.evaluate(WIDE) <= width, name
    open_tab(page, "Home")
    page.wait_for_function(SHOWN, arg=[f"runs/{name}" for name in HOSTILE])
    page.get_by_role("button", name="Choose a folder").click()
    expect(page.get_by_role("dialog").get_by_text(HOSTILE[1])).to_be_visible()
    page.keyboard.press("Escape")
    page.get_by_role("link", name=f"runs/{HOSTILE[0]}", exact=True).first.click()
    expect(page.get_by_role("heading", name=f"runs/{HOSTILE[0]}", exact=True)).to_be_visible()
    expect(page.get_by_role("region", name="Samples, the newest first")).to_contain_text("window.harm=1")
    expect(page.get_by_role("region", name="Faults")).to_contain_text("window.harm=1")
    assert page.evaluate(WIDE) <= width
    assert page.evaluate("window.harm") is None and page.locator("script:not([src]), main img").count() == 0


def test_runs_with_commas_are_followed_and_compared(visit, hostile):
    page = visit(hostile)
    open_tab(page, "Training")
    for name in (COMMA, HOSTILE[1]):
        page.get_by_role("row").filter(has=page.get_by_role("link", name=f"runs/{name}", exact=True)).get_by_role("checkbox").check()
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_role("columnheader", name=f"runs/{COMMA}", exact=True)).to_be_visible()
    expect(page.get_by_role("columnheader", name=f"runs/{HOSTILE[1]}", exact=True)).to_be_visible()
    open_tab(page, "Home")
    page.get_by_role("link", name=f"runs/{COMMA}", exact=True).first.click()
    expect(page.get_by_role("heading", name=f"runs/{COMMA}", exact=True)).to_be_visible()
    expect(page.get_by_text("40 of 40")).to_be_visible()
    metrics = hostile.workspace / "runs" / COMMA / "metrics.jsonl"
    with metrics.open("a") as file:
        for step in (41, 42):
            file.write(json.dumps({"kind": "train", "step": step, "tokens": 128 * step, "seconds": 1.0, "loss": 3.0}) + "\n")
    expect(page.get_by_text("42 of 40")).to_be_visible()
