"""The Training tab: what waits for the device, what fails before it has begun, and several runs on one chart."""

import re

import pytest
from app_browser import PATIENCE, TINY, go, open_tab

expect = pytest.importorskip("playwright.sync_api").expect
expect.set_options(timeout=PATIENCE)

ENDLESS = {name.removeprefix("--"): value for name, value in zip(TINY[::2], TINY[1::2], strict=True)} | {"data": "books", "steps": 10_000_000}


def test_trainings_wait_for_the_device_and_begin_when_it_is_free(page, app):
    for name in ("first", "second"):
        app.request("POST", "/api/jobs", {"command": "train", "options": ENDLESS | {"out": f"runs/{name}"}})
    open_tab(page, "Training")
    cards = [page.get_by_role("article").filter(has=page.get_by_role("link", name=f"Watch runs/{name}", exact=True)) for name in ("first", "second")]
    expect(cards[0].get_by_text("running", exact=True)).to_be_visible()
    expect(cards[1].get_by_text("queued", exact=True)).to_be_visible()
    expect(cards[1].get_by_text("waits until the device is free")).to_be_visible()
    expect(cards[0].get_by_text(re.compile("training .* loss"))).to_be_visible()  # it has taken steps, and leaves a checkpoint
    cards[0].get_by_role("button", name="Pause").click()
    expect(cards[0].get_by_text("paused", exact=True)).to_be_visible()
    expect(cards[1].get_by_text("running", exact=True)).to_be_visible()
    cards[0].get_by_role("button", name="Resume").click()
    expect(cards[0].get_by_text("queued", exact=True)).to_be_visible()
    cards[1].get_by_role("button", name="Stop").click()
    expect(cards[1]).to_have_count(0)  # it stands among the runs
    expect(cards[0].get_by_text("running", exact=True)).to_be_visible()
    cards[0].get_by_role("link", name="Watch runs/first").click()
    expect(page.get_by_role("button", name="Pause")).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Continue")).to_be_visible()


def test_a_training_that_fails_before_there_is_a_run_says_why_and_can_be_tried_again(visit, shared_app):
    page = visit(shared_app)
    open_tab(page, "Training")
    page.get_by_label("data", exact=True).fill("nowhere")
    page.get_by_label("steps", exact=True).fill("7")
    page.get_by_role("button", name="Start", exact=True).click()
    page.get_by_role("link", name="Watch it").click()
    expect(page.get_by_role("heading", name="runs/nowhere", exact=True)).to_be_visible()
    expect(page.get_by_role("alert").filter(has_text="nowhere")).to_contain_text("error")
    expect(page.get_by_text("failed", exact=True)).to_be_visible()
    expect(page.get_by_text("There is no run in")).to_have_count(0)
    expect(page.get_by_role("region", name="Newest figures")).to_have_count(0)
    page.get_by_role("link", name="Log").click()
    expect(page.get_by_label("Log", exact=True)).to_contain_text("nowhere")
    page.go_back()
    expect(page.get_by_role("alert").filter(has_text="nowhere")).to_contain_text("error")
    page.get_by_role("link", name="Change and try again").click()
    expect(page.get_by_label("data", exact=True)).to_have_value("nowhere")
    expect(page.get_by_label("steps", exact=True)).to_have_value("7")
    go(page, "#/training/runs/never")
    expect(page.get_by_role("alert").filter(has_text="There is no run in runs/never.")).to_be_visible()


def test_runs_are_compared_on_one_chart(visit, shared_app):
    page = visit(shared_app)
    open_tab(page, "Training")
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_text("Tick at least two runs")).to_be_visible()
    for name in ("runs/demo", "runs/other"):
        page.get_by_label(f"Compare {name}", exact=True).check()
    page.get_by_role("button", name="Compare", exact=True).click()
    curves = page.get_by_role("region", name="Curves")
    told = curves.locator(".visually-hidden")  # what a screen reader is told of the chart
    losses = r"runs/demo: [\d.]+ at step 40. runs/other: [\d.]+ at step 20"
    expect(told).to_have_text(re.compile(losses))
    expect(curves.locator("canvas")).to_be_visible()
    expect(page.get_by_role("region", name="Differences of the runs")).to_contain_text("optim.learning_rate")
    page.get_by_label("What is drawn").select_option(label="Learning rate")
    expect(told).to_have_text(re.compile(r"runs/other: \S+ at step 20"))
    curves.get_by_role("button", name="Tokens").click()
    expect(told).to_have_text(re.compile(r"runs/demo: \S+ at tokens [\d.]+ k"))
    page.get_by_label("What is drawn").select_option(label="Validation loss")
    curves.get_by_role("button", name="Logarithmic").click()
    expect(told).to_have_text(re.compile(r"runs/demo: [\d.]+ at tokens"))
    curves.get_by_role("button", name="runs/other").click()
    expect(curves.get_by_role("button", name="runs/other")).to_have_attribute("aria-pressed", "false")
