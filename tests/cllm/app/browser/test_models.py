"""The Models tab: models are exported, brought in, averaged, verified, deleted and taken back, each with a click."""

import pytest
from app_browser import PATIENCE, open_tab

expect = pytest.importorskip("playwright.sync_api").expect
expect.set_options(timeout=PATIENCE)


@pytest.fixture
def page(visit, shared_app):
    page = visit(shared_app)
    open_tab(page, "Models")
    return page


def done(page, title):
    """The card of a job that is done."""
    card = page.get_by_role("article", name=title).first
    expect(card.get_by_text("done", exact=True)).to_be_visible()
    return card


def test_an_export_takes_the_place_of_nothing_and_comes_back_as_a_folder(page, shared_app):
    exported = page.get_by_role("dialog", name="Export a model")
    page.get_by_role("button", name="Export runs/demo", exact=True).click()
    expect(exported.get_by_label("out", exact=True)).to_have_value("exports/demo-hf")
    exported.get_by_role("button", name="Export").click()
    done(page, "export runs/demo")
    expect(page.get_by_role("link", name="exports/demo-hf", exact=True)).to_be_visible()

    page.get_by_role("button", name="Export runs/demo", exact=True).click()
    out = exported.get_by_label("out", exact=True)
    expect(out).to_have_value("exports/demo-2-hf")
    out.fill("exports/demo-hf")
    page.watched.expected = ["status of 400"]
    exported.get_by_role("button", name="Export").click()
    expect(exported.get_by_text("exports/demo-hf exists already. Choose another name")).to_be_visible()
    expect(out).to_be_focused()
    page.keyboard.press("Escape")

    page.get_by_role("button", name="Import").click()
    brought = page.get_by_role("dialog", name="Import a model")
    brought.get_by_role("button", name="Import").click()
    expect(brought.get_by_text("Choose a .cllm file or a folder first.")).to_be_visible()
    folder = brought.get_by_label("or a Hugging Face folder")
    folder.set_input_files(shared_app.workspace / "books")
    brought.get_by_role("button", name="Import").click()
    expect(brought.get_by_text("There is no config.json in this folder.")).to_be_visible()
    folder.set_input_files(shared_app.workspace / "exports" / "demo-hf")
    brought.get_by_role("button", name="Import").click()
    expect(page.get_by_text("The model is here as models/demo-hf.")).to_be_visible()
    page.get_by_role("button", name="Inspect").click()
    expect(page.get_by_role("heading", name="models/demo-hf", exact=True)).to_be_visible()
    expect(page.get_by_text("Hugging Face folder")).to_be_visible()
    expect(page.get_by_role("link", name="Talk to it")).to_be_visible()

    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog", name="Delete this model?").get_by_role("button", name="Delete").click()
    expect(page.get_by_role("link", name="runs/demo", exact=True)).to_be_visible()  # back to the list
    expect(page.get_by_role("link", name="models/demo-hf", exact=True)).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(page.get_by_role("link", name="models/demo-hf", exact=True)).to_be_visible()


def test_checkpoints_are_averaged_and_the_mean_is_verified_and_comes_in_again(page, shared_app):
    page.get_by_role("button", name="Average", exact=True).click()
    expect(page.get_by_text("Tick a run, whose newest checkpoints are then averaged")).to_be_visible()
    page.get_by_label("Average runs/demo").check()
    page.get_by_role("button", name="Average", exact=True).click()
    dialog = page.get_by_role("dialog", name="Average checkpoints")
    dialog.get_by_label("last", exact=True).fill("2")
    dialog.get_by_role("button", name="Average").click()
    done(page, "checkpoint average runs/demo").get_by_role("link", name="Inspect").click()
    expect(page.get_by_role("heading", name="exports/demo-average.cllm", exact=True)).to_be_visible()
    expect(page.get_by_role("region", name="Shape")).to_contain_text("embed_dim")
    expect(page.get_by_role("cell", name="model.embed_tokens.weight")).to_be_visible()
    page.get_by_role("button", name="Verify").click()
    expect(page.get_by_text("Every byte is as it was written.")).to_be_visible()

    open_tab(page, "Models")
    page.get_by_role("button", name="Import").click()
    brought = page.get_by_role("dialog", name="Import a model")
    brought.get_by_label("A .cllm file").set_input_files(shared_app.workspace / "exports" / "demo-average.cllm")
    brought.get_by_role("button", name="Import").click()
    expect(page.get_by_text("The model is here as models/imported-")).to_be_visible()


def test_a_model_that_is_damaged_says_so_and_hides_no_other(page, shared_app):
    (shared_app.workspace / "broken.cllm").write_bytes(b"no model")
    page.reload()
    row = page.get_by_role("row").filter(has=page.get_by_role("link", name="broken.cllm", exact=True))
    expect(row.get_by_text("damaged")).to_be_visible()
    expect(page.get_by_role("link", name="runs/demo", exact=True)).to_be_visible()
    page.get_by_role("button", name="Delete broken.cllm").click()
    page.get_by_role("dialog", name="Delete this model?").get_by_role("button", name="Delete").click()
    expect(page.get_by_role("link", name="broken.cllm", exact=True)).to_have_count(0)
    page.locator("summary", has_text="Trash").click()
    page.get_by_role("button", name="Take back broken.cllm").click()
    expect(page.get_by_role("link", name="broken.cllm", exact=True)).to_be_visible()
    (shared_app.workspace / "broken.cllm").unlink()
