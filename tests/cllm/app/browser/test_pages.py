"""Every tab for everybody: by keyboard, with a screen reader, in light and dark, on a phone, and with many runs."""

import hashlib
import shutil
from pathlib import Path

import pytest
from app_browser import PATIENCE, TABS, go, open_tab, settle

expect = pytest.importorskip("playwright.sync_api").expect
expect.set_options(timeout=PATIENCE)

FOLDER = Path(__file__).parent
AXE = (FOLDER / "vendor" / "axe.min.js").read_text()
SERIOUS = """async () => {
  const { violations } = await axe.run({ resultTypes: ["violations"] });
  const shown = (node) => `${node.target.join(" ")} ${node.html.slice(0, 120)}`;
  const serious = violations.filter((each) => ["serious", "critical"].includes(each.impact));
  return serious.map((each) => `${each.id}: ${each.nodes.slice(0, 3).map(shown).join(" | ")}`);
}"""
SIZES = """performance.getEntriesByType("resource").filter((each) => /\\.(js|css|svg)$/.test(each.name)).map((each) => each.encodedBodySize)"""
WIDE = "document.documentElement.scrollWidth"


def test_axe_is_the_published_file():
    assert hashlib.sha256(AXE.encode()).hexdigest() in (FOLDER / "vendor" / "README.md").read_text()


def test_axe_finds_nothing_serious_on_any_tab_in_light_and_dark(visit, shared_app):
    page = visit(shared_app)
    page.evaluate(AXE)

    def look(name):
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            settle(page)
            assert page.evaluate(SERIOUS) == [], (name, scheme)

    for name in TABS:
        open_tab(page, name)
        look(name)
    for address in ("#/training/runs/demo", "#/models/runs/demo"):
        go(page, address)
        page.get_by_role("heading", name="runs/demo", exact=True).wait_for()
        look(address)


def test_tabs_by_keyboard_and_the_focus_returns_after_a_dialog(visit, shared_app):
    page = visit(shared_app)
    page.get_by_role("tab", name="Home").focus()
    for name in [*TABS[1:], "Home"]:
        page.keyboard.press("ArrowRight")
        expect(page.get_by_role("tab", name=name, exact=True)).to_be_focused()
        expect(page.get_by_role("tab", name=name, exact=True)).to_have_attribute("aria-selected", "true")
        expect(page.get_by_role("tabpanel", name=name)).to_be_visible()
    page.keyboard.press("End")
    expect(page.get_by_role("tabpanel", name="System")).to_be_visible()
    page.keyboard.press("Home")
    opener = page.get_by_role("button", name="Choose a folder")
    opener.focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_be_hidden()
    expect(opener).to_be_focused()


def test_no_tab_is_wider_than_a_phone_and_there_is_little_to_load(visit, shared_app):
    page = visit(shared_app, width=390, height=800)
    for name in TABS:
        open_tab(page, name)
        settle(page)
        assert page.evaluate(WIDE) <= 390, name
    for address in ("#/training/runs/demo", "#/models/runs/demo", "#/training?compare=runs/demo&compare=runs/demo"):
        go(page, address)
        settle(page)
        assert page.evaluate(WIDE) <= 390, address
    loaded = page.evaluate(SIZES)
    assert 0 < sum(loaded) < 400_000


def test_two_hundred_runs_are_listed_at_once(launch, visit, trained, tmp_path):
    workspace = tmp_path / "many"
    for number in range(200):
        folder = workspace / "runs" / f"run-{number:03}"
        folder.mkdir(parents=True)
        for name in ("config.toml", "metrics.jsonl", "environment.jsonl"):
            shutil.copy(trained / "runs" / "demo" / name, folder / name)
    running = launch(workspace)
    page = visit(running)
    expect(page.get_by_role("link", name="runs/run-199", exact=True)).to_be_visible()
    assert page.get_by_role("link", name="runs/run-").count() >= 200
