"""What a person does who never saw a shell: choose a folder, train, watch, talk, export. By clicks, on real text."""

import re
import signal
import zipfile
from pathlib import Path

import pytest
from app_browser import PATIENCE, open_tab, start_app

expect = pytest.importorskip("playwright.sync_api").expect
expect.set_options(timeout=PATIENCE)


def test_from_a_folder_by_clicks_to_a_model_that_other_programs_read(page, app, tmp_path):
    page.get_by_role("button", name="Talk to the sample model").click()  # before there is anything of one's own
    expect(page.locator(".composer").get_by_role("button", name="Continue")).to_be_visible()
    expect(page.get_by_label("Model", exact=True).locator("option:checked")).to_contain_text("models/sample.cllm")
    open_tab(page, "Home")
    page.get_by_role("button", name="Choose a folder").click()
    picker = page.get_by_role("dialog", name="Choose a folder of text")
    picker.get_by_role("button", name="books").click()
    picker.get_by_role("button", name="Choose this folder").click()
    expect(page.get_by_text("Chosen: books (1 file")).to_be_visible()
    page.get_by_role("button", name="Train", exact=True).click()
    page.get_by_role("link", name="Watch it learn").click()
    expect(page.get_by_role("heading", name="runs/books", exact=True)).to_be_visible()

    page.reload()  # in the middle: the page is only a reader
    expect(page.get_by_text("30 of 30")).to_be_visible()  # the step, which came by live events
    expect(page.get_by_text("finished", exact=True)).to_be_visible()
    expect(page.get_by_role("group", name="Loss.")).to_be_visible()
    expect(page.get_by_role("region", name="Samples, the newest first")).to_contain_text("Step 30")

    open_tab(page, "Home")
    page.get_by_role("link", name="Talk to it").click()
    page.get_by_role("button", name="Chat", exact=True).click()
    page.get_by_label("max-tokens", exact=True).fill("12")
    page.get_by_label("Message", exact=True).fill("What is a statement?")
    page.get_by_role("button", name="Send").click()
    expect(page.get_by_text(re.compile(r"^\d+ tokens · "))).to_be_visible()
    expect(page.get_by_role("button", name="Regenerate")).to_be_visible()
    page.get_by_role("button", name="Probabilities").click()
    expect(page.locator("article.assistant").get_by_role("button", name=re.compile(r", [\d.]+ %$")).first).to_be_visible()

    open_tab(page, "Home")
    page.get_by_role("link", name="Export it").click()
    expect(page.get_by_text(re.compile(r"tokens to learn from, .* held out"))).to_be_visible()
    page.get_by_role("button", name="Export", exact=True).click()
    page.get_by_role("dialog", name="Export a model").get_by_role("button", name="Export").click()
    with page.expect_download() as waiting:
        page.get_by_role("link", name="Download").click()
    waiting.value.save_as(tmp_path / "model.zip")
    # What came down is what `cllm export` has written, byte for byte. That transformers loads it is tested where exports are.
    exported = app.workspace / "exports" / "books-hf"
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        found = {Path(name).name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    assert found == {each.name: each.read_bytes() for each in exported.iterdir()} and {"config.json", "model.safetensors"} <= found.keys()


def test_a_training_goes_on_while_the_app_is_killed_and_the_page_finds_it_again(visit, app):
    page = visit(app)
    open_tab(page, "Training")
    for name, value in {"data": "books", "out": "runs/long", "steps": "10000000", "embed-dim": "32", "num-layers": "1", "num-heads": "2",
                        "seq-len": "32", "batch-size": "2", "vocab-size": "300", "checkpoint-every": "5000000"}.items():  # fmt: skip
        field = page.get_by_label(name, exact=True)
        if not field.is_visible():
            page.get_by_label("Find an option").fill(name)
        field.fill(value)
    page.get_by_label("Find an option").fill("")
    page.get_by_role("button", name="Start", exact=True).click()
    page.get_by_role("link", name="Watch runs/long").click()
    expect(page.get_by_text("of 10,000,000")).to_be_visible()

    page.watched.expected = ["Failed to load resource", "ERR_"]
    app.end(signal.SIGKILL)
    expect(page.get_by_text("The connection to the app is lost")).to_be_visible()
    again = start_app(app.workspace, app.port)
    app.process = again.process
    expect(page.get_by_text("The connection to the app is lost")).to_be_hidden()
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    before = _step(page)
    page.wait_for_function(
        "before => Number(document.querySelector('.figures dd').textContent.split(' ')[0].replaceAll(',', '')) > before", arg=before
    )
    page.get_by_role("button", name="Pause").click()
    expect(page.get_by_role("button", name="Resume")).to_be_visible()
    assert list((app.workspace / "runs" / "long" / "checkpoints").glob("step-*")), "a pause ends in a checkpoint"


def _step(page):
    return int(page.locator(".figures dd").first.text_content().split(" ")[0].replace(",", ""))


def test_a_wrong_value_is_told_beside_its_field(visit, shared_app):
    page = visit(shared_app)
    open_tab(page, "Training")
    page.get_by_role("button", name="Start", exact=True).click()
    expect(page.get_by_label("data", exact=True)).to_be_focused()
    page.get_by_label("data", exact=True).fill("books")
    page.get_by_label("steps", exact=True).fill("many")
    page.watched.expected = ["status of 400"]
    page.get_by_role("button", name="Start", exact=True).click()
    steps = page.get_by_label("steps", exact=True)
    expect(steps).to_have_attribute("aria-invalid", "true")
    expect(steps).to_be_focused()
    described = steps.get_attribute("aria-describedby").split()[0]
    assert "steps" in page.locator(f"#{described}").text_content()


def test_the_plan_comes_before_the_start_keeps_to_the_time_that_is_given_and_changes_nothing(visit, shared_app):
    page = visit(shared_app)
    before = [shared_app.request("GET", f"/api/{each}") for each in ("jobs", "runs")]
    open_tab(page, "Training")
    time = page.get_by_label("How long may it take?")
    page.get_by_role("button", name="A quick look").click()
    expect(page.get_by_label("steps", exact=True)).to_have_value("30")
    time.select_option("1 hour")
    expect(page.get_by_label("steps", exact=True)).to_have_value("")
    expect(page.get_by_label("hours", exact=True)).to_have_value("1")
    time.select_option("as long as the settings say")
    expect(page.get_by_label("hours", exact=True)).to_have_value("")
    page.get_by_label("data", exact=True).fill("books")
    for name, value in (("embed-dim", "32"), ("num-layers", "1"), ("batch-size", "4")):  # without a section to open first
        page.get_by_label(name, exact=True).fill(value)
    page.get_by_label("minutes", exact=True).fill("40")  # of which reading takes little on the busiest machine
    expect(time.locator("option:checked")).to_contain_text("“minutes” say")
    page.get_by_role("button", name="Show the plan").click()
    plan = page.get_by_role("region", name="Plan")
    expect(plan.get_by_text("It fits")).to_be_visible()
    expect(plan.get_by_text("at most 40 min, by the clock")).to_be_visible()
    expect(plan.get_by_text("bits per byte on the validation text")).to_be_visible()
    assert [shared_app.request("GET", f"/api/{each}") for each in ("jobs", "runs")] == before
    page.get_by_role("button", name="A small model").click()
    expect(page.get_by_label("data", exact=True)).to_have_value("books")
    expect(page.get_by_label("minutes", exact=True)).to_have_value("")
    expect(plan.get_by_text("The settings have changed since this plan")).to_be_visible()
