"""The Data tab as a person uses it: files are uploaded, prepared and looked at, and lead to training."""

import pydoc_data.topics
import re
from urllib.parse import urlencode

import pytest
from app_browser import PATIENCE, go, open_tab
from growing_site import Site

expect = pytest.importorskip("playwright.sync_api").expect
expect.set_options(timeout=PATIENCE)

NAME = "<img src=x onerror=alert(1)>"
TOPICS = list(pydoc_data.topics.topics.items())


@pytest.fixture
def documents():
    """Files as a person has them: good ones, copies, stubs, one that is broken, and one with a hostile name."""
    files = [(f"{name}.txt", text.encode()) for name, text in TOPICS[:8]]
    files += [("copy.txt", files[0][1]), ("stub.txt", b"Nothing here."), ("broken.pdf", b"%PDF-1.4 broken"), (f"{NAME}.txt", TOPICS[9][1].encode())]
    return [{"name": name, "mimeType": "application/octet-stream", "buffer": content} for name, content in files]


def test_files_are_uploaded_prepared_and_lead_to_training(page, app, documents):
    open_tab(page, "Data")
    page.get_by_role("heading", name="Make a data set").wait_for()
    page.get_by_role("button", name="Make the data set").click()
    page.get_by_text("Nothing is chosen yet").wait_for()
    page.locator("input[type=file]").set_input_files(documents)
    page.locator(".sources li").nth(len(documents) - 1).wait_for()
    page.get_by_label(re.compile("^out")).fill("data/mine")
    page.get_by_role("button", name="Make the data set").click()
    page.get_by_role("link", name="Look at it").click()
    page.get_by_role("heading", name="mine").wait_for()
    page.get_by_role("heading", name="Left out and why").wait_for()
    for text in ("exact duplicate", "broken", "1 equal, 0 nearly equal"):
        page.get_by_text(text).first.wait_for()
    page.get_by_label("Dropped because of").select_option("exact duplicate")
    page.locator(".sample", has_text="exact duplicate").first.wait_for()
    assert page.locator("main img").count() == 0
    page.get_by_role("link", name="Train on it").click()
    page.get_by_role("tab", name="Training", selected=True).wait_for()
    assert page.get_by_label(re.compile("^data")).first.input_value() == "data/mine"


def test_own_files_become_text_to_train_on_by_one_click_on_home(page, app):
    """Texts as they are; documents after their text was extracted, which leaves out none of them. What came before is not learnt again."""
    files = page.get_by_label("Files of this computer")
    files.set_input_files([{"name": f"My letter {n}.txt", "mimeType": "text/plain", "buffer": TOPICS[n][1].encode()} for n in (1, 2)])
    page.get_by_text("Chosen: uploads/My-letter-1 (2 files").wait_for()
    expect(page.get_by_role("button", name="Train", exact=True)).to_be_focused()
    page_of_html = {"name": "My letter 1.html", "mimeType": "text/html", "buffer": b"<p>A short page.</p>"}
    files.set_input_files(page_of_html)
    page.get_by_text("The text of these documents is extracted").wait_for()
    expect(page.get_by_role("button", name="Train", exact=True)).to_be_disabled()
    page.get_by_text("Chosen: data/My-letter-1-2").wait_for()
    assert [(each["path"], each["kept"]) for each in app.request("GET", "/api/datasets")] == [("data/My-letter-1-2", 1)]
    page.get_by_role("link", name="All options").click()
    expect(page.get_by_label("data", exact=True)).to_have_value("data/My-letter-1-2")


def test_an_upload_is_cancelled_and_leaves_nothing(visit, shared_app):
    page = visit(shared_app)
    open_tab(page, "Data")
    page.get_by_role("heading", name="Make a data set").wait_for()
    client = page.context.new_cdp_session(page)
    client.send("Network.enable")
    client.send("Network.emulateNetworkConditions", {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 20_000})
    page.locator("input[type=file]").set_input_files({"name": "large.txt", "mimeType": "text/plain", "buffer": b"word " * 400_000})
    page.get_by_text(re.compile(r"large.txt: .* of 2 MB")).wait_for()
    page.get_by_role("button", name="Cancel the upload").click()
    page.get_by_text("Stopped: 0 files of 1 came in.").wait_for()
    assert not list(shared_app.workspace.glob("uploads/*"))


def test_a_crawl_is_learnt_in_rounds_and_gets_more_addresses(page, app):
    """A switch on its page, and the Training tab for the size of the model; what came, what was learnt and whether it was kept stands on the page."""
    small = {"embed-dim": 32, "num-layers": 1, "num-heads": 2, "seq-len": 32, "batch-size": 4, "vocab-size": 320, "threads": 2, "steps": 10}
    with Site() as site:
        site.published = 8
        options = {"urls": [f"http://{site.address}/"], "out": "crawls/site", "delay": 0, "revisit": 0, "allow-private": [site.address]}
        app.request("POST", "/api/jobs", {"command": "crawl", "options": options})
        go(page, "#/crawler/crawls/site")
        page.get_by_role("button", name="Go on", exact=True).wait_for()
        switch = page.get_by_role("switch", name="Go on learning")
        switch.click()
        dialog = page.get_by_role("dialog", name="Go on learning")
        assert dialog.get_by_label("out", exact=True).input_value() == "runs/site-followed"
        dialog.get_by_role("link", name="use the Training tab").click()
        page.get_by_role("tab", name="Training", selected=True).wait_for()
        assert page.locator("dialog").count() == 0
        page.get_by_label("data", exact=True).wait_for()
        given = {"data": "crawls/site", "out": "runs/site", "follow": 1, "round-bytes": 1000, "look-every": 1} | small
        go(page, f"#/training?{urlencode(given)}")
        expect(page.get_by_label("out", exact=True)).to_have_value("runs/site")
        page.get_by_role("button", name="Start", exact=True).click()
        page.get_by_role("link", name="Watch it").wait_for()

        go(page, "#/crawler/crawls/site")
        rounds = page.get_by_role("row").filter(has=page.get_by_role("cell", name="accepted"))
        expect(rounds).to_have_count(1)
        expect(rounds).to_contain_text(re.compile(r"8 documents|\d documents"))
        expect(switch).to_be_checked()
        page.get_by_role("link", name="Watch runs/site").click()
        expect(page.get_by_role("region", name="Rounds")).to_contain_text("the first round")
        page.get_by_role("link", name="Training of the newest round").click()
        expect(page.get_by_text("10 of 10")).to_be_visible()
        go(page, "#/crawler/crawls/site")
        expect(switch).to_be_checked()
        switch.click()
        expect(switch).not_to_be_checked()
        page.get_by_role("button", name="Add addresses").click()
        page.get_by_label("Addresses to begin from").fill(f"http://{site.address}/article/7\nno address")
        page.watched.expected = ["status of 400"]
        page.get_by_role("dialog").get_by_role("button", name="Start").click()
        page.get_by_role("dialog").get_by_text("an address that begins with http").wait_for()
        site.published = 9
        page.get_by_label("Addresses to begin from").fill(f"http://{site.address}/article/8")
        page.get_by_role("dialog").get_by_role("button", name="Start").click()
        page.get_by_text("Article 8").first.wait_for()
        switch.click()  # on again, as it was
        expect(switch).to_be_checked()
        (job,) = (each for each in app.request("GET", "/api/jobs") if each["command"] == "train")
        assert job["options"].items() >= small.items() and job["state"] == "running"


def test_a_crawl_is_begun_by_the_form_watched_and_paused(page, app):
    """Its page is opened at once, before there is a folder; and one that may not be done says why."""
    with Site() as site:
        site.published = len(site.articles)  # at 3 seconds a page the crawl outlasts every wait
        for allowed in ("", site.address):
            open_tab(page, "Crawler")
            page.get_by_label("urls", exact=True).fill(f"http://{site.address}/")
            page.get_by_label("out", exact=True).fill("crawls/a,b" if allowed else "crawls/refused")
            page.get_by_text("More options").click()
            page.get_by_label("delay", exact=True).fill("3")
            page.get_by_label("allow-private", exact=True).fill(allowed)
            page.get_by_label("sitemaps", exact=True).select_option("no")
            page.get_by_role("button", name="Start", exact=True).click()
            if not allowed:
                page.get_by_text("is not a public address").first.wait_for()
        page.get_by_role("heading", name="a,b", exact=True).wait_for()
        options = app.request("GET", "/api/jobs")[0]["options"]
        assert options["sitemaps"] is False and "feeds" not in options
        page.locator("summary", has_text=re.compile("Index|Article")).first.wait_for()
        page.get_by_role("button", name="Pause").click()
        page.get_by_role("button", name="Resume").wait_for()
        page.get_by_role("button", name="Stop").click()
        page.get_by_role("button", name="Go on").wait_for()
