"""The System tab: the machine as `cllm doctor` sees it, benchmarks, and the logs of the app and its jobs."""

import re

import pytest
from app_browser import PATIENCE, open_tab

expect = pytest.importorskip("playwright.sync_api").expect
expect.set_options(timeout=PATIENCE)


@pytest.fixture
def page(visit, shared_app):
    page = visit(shared_app)
    open_tab(page, "System")
    return page


def test_the_machine_and_what_each_operation_runs_on(page):
    expect(page.get_by_text(re.compile(r"What each of the \d+ operations runs on"))).to_be_visible()
    page.get_by_text("What each of the").click()
    expect(page.get_by_role("cell", name="matmul", exact=True)).to_be_visible()
    expect(page.get_by_text("Measured peak, fp32")).to_be_visible()
    expect(page.get_by_role("term").filter(has_text="safetensors")).to_be_visible()
    open_tab(page, "Home")
    expect(page.get_by_text(re.compile(r"FLOP/s in fp32, .*FLOP/s in bf16, .*B/s copying$"))).to_be_visible()


def test_a_benchmark_is_begun_told_of_in_its_log_and_stopped(page):
    page.get_by_label("benchmark", exact=True).select_option("scaling")
    page.get_by_role("button", name="Measure").click()
    card = page.get_by_role("article", name="bench scaling").first
    expect(card.get_by_text("running", exact=True)).to_be_visible()
    card.get_by_role("button", name="Stop").click()
    expect(card.get_by_text("stopped", exact=True)).to_be_visible()
    card.get_by_role("link", name="Log").click()
    expect(page.get_by_label("Log of").locator("option:checked")).to_contain_text("bench scaling")
    expect(page.get_by_label("Log of")).to_be_in_viewport()
    log = page.get_by_label("Log", exact=True)
    page.get_by_label("Log of").select_option("the app")
    expect(log).to_contain_text('"event":"job"')
