"""The LLM tab: what is said is streamed, stopped, edited, branched, taken apart into tokens, compared and kept."""

import json
import re

import pytest
from app_browser import PATIENCE, go
from command import wait_for

expect = pytest.importorskip("playwright.sync_api").expect
expect.set_options(timeout=PATIENCE)

ENDLESS = 1_000_000  # tokens, nearly the most that may be asked for: an answer that outlasts every wait


@pytest.fixture
def talk(visit, shared_app):
    """talk(mode, **options) -> a page with a new conversation with runs/demo and these options."""

    def talk(mode, **options):
        page = visit(shared_app)
        go(page, "#/llm/runs/demo")
        page.get_by_role("button", name=mode, exact=True).click()
        page.get_by_text("More about answers").click()
        for name, value in options.items():
            page.get_by_label(name.replace("_", "-"), exact=True).fill(str(value))
        return page

    return talk


def say(page, text):
    page.locator(".composer textarea").fill(text)
    page.locator(".composer").get_by_role("button", name=re.compile("Send|Continue")).click()


def written(article):
    """Waits until an answer is complete."""
    expect(article.get_by_role("button", name="Regenerate")).to_be_visible()
    expect(article).to_have_attribute("aria-busy", "false")


def kept(app, page, answers):
    """The messages of a page's conversation as they lie on the disk, when so many answers of it are complete there."""
    found = []

    def look():
        found[:] = app.request("GET", f"/api/conversations/{page.url.partition('conversation=')[2]}")["threads"][0]["nodes"].values()
        return sum("reason" in each for each in found) == answers

    wait_for(look)
    return found


def test_chat_regenerate_edit_and_branches(talk):
    page = talk("Chat", max_tokens=6, min_tokens=2)
    question, answer = page.locator("article.user"), page.locator("article.assistant")
    say(page, "The first question?")
    written(answer)
    answer.get_by_role("button", name="Regenerate").click()
    expect(answer.get_by_text("2/2")).to_be_visible()
    written(answer)
    answer.get_by_role("button", name="Earlier version").click()
    expect(answer.get_by_text("1/2")).to_be_visible()

    question.get_by_role("button", name="Edit").click()
    question.get_by_label("Text of the message").fill("The second question?")
    question.get_by_role("button", name="Send").click()
    expect(question.get_by_text("2/2")).to_be_visible()
    expect(question).to_contain_text("The second question?")
    written(answer)
    expect(answer.get_by_text("/2")).to_have_count(0)
    question.get_by_role("button", name="Earlier version").click()
    expect(question).to_contain_text("The first question?")
    expect(answer.get_by_text("1/2")).to_be_visible()

    page.reload()  # all of it was kept
    expect(question).to_contain_text("The first question?")
    expect(answer.get_by_text("1/2")).to_be_visible()
    answer.get_by_role("button", name="Delete this message and what follows").click()
    expect(answer.get_by_text("/2")).to_have_count(0)
    written(answer)
    question.get_by_role("button", name="Delete this message and what follows").click()
    expect(question).to_contain_text("The second question?")


def test_a_stream_is_stopped_and_keeps_what_had_come(talk):
    page = talk("Completion", max_tokens=ENDLESS, min_tokens=ENDLESS)
    answer = page.locator("article.assistant")
    say(page, "The")
    expect(answer.locator(".message-figures")).to_have_text(re.compile(r"^[\d,]{2,} tokens · "))
    expect(answer.get_by_role("button", name="Regenerate")).to_have_count(0)
    page.get_by_role("button", name="Stop", exact=True).click()
    expect(answer.locator(".message-figures")).to_contain_text("stopped")
    text = answer.locator(".message-text").text_content()
    assert len(text) > 5
    expect(answer.get_by_role("button", name="Regenerate")).to_be_visible()
    assert answer.locator(".message-text").text_content() == text


def test_who_only_hears_the_page_is_not_told_of_an_answer_that_failed(talk):
    page = talk("Completion", max_tokens=4)
    answers = "**/v1/completions"
    body = '{"error": {"message": "The model is gone.", "type": "server_error", "param": null, "code": null}}'
    page.watched.expected.append("500 (Internal Server Error)")
    page.route(answers, lambda route: route.fulfill(status=500, content_type="application/json", body=body))
    say(page, "The")
    expect(page.get_by_role("status").filter(has_text="There is no answer.")).to_have_count(1)
    page.unroute(answers)
    page.locator("article.assistant").get_by_role("button", name="Regenerate").click()
    expect(page.get_by_role("status").filter(has_text="The answer is complete.")).to_have_count(1)


def test_a_text_longer_than_the_context_is_gone_on_with_from_its_end(talk):
    page = talk("Completion", max_tokens=2, min_tokens=2)
    say(page, "The value of an expression is computed before it is used. " * 30)
    written(page.locator("article.assistant"))
    seen = page.locator(".gauge").get_by_text(re.compile(r"^66 of 64 tokens .*: the model sees only the end of the text$"))
    expect(seen).to_be_visible()
    say(page, "")
    written(page.locator("article.assistant").nth(1))
    expect(seen).to_be_visible()


def test_another_token_is_chosen_and_the_answer_goes_on_from_it(talk, shared_app):
    page = talk("Completion", max_tokens=6, min_tokens=6, temperature=0)
    answer = page.locator("article.assistant")
    tokens = answer.locator(".token-text .token")
    say(page, "The value of")
    written(answer)
    answer.get_by_role("button", name="Probabilities").click()
    expect(tokens).to_have_count(6)
    expect(tokens.first).to_have_class(re.compile(r"surprise-\d"))
    tokens.nth(2).hover()
    answer.get_by_role("group", name="Alternatives", exact=True).get_by_role("button", name=re.compile("^Go on with .* %$|1 in")).first.click()
    expect(answer.get_by_text("2/2")).to_be_visible()
    written(answer)

    answer.get_by_role("button", name="Probabilities").click()  # the same by keyboard
    expect(tokens).to_have_count(9)
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(answer.get_by_role("group", name="Alternatives", exact=True).get_by_role("button").first).to_be_focused()
    page.keyboard.press("Enter")
    expect(answer.get_by_text("3/3")).to_be_visible()
    written(answer)

    first, second, third = (each for each in kept(shared_app, page, 3) if each["role"] == "assistant")
    names = [[token[0] for token in each["tokens"]] for each in (first, second, third)]
    assert names[1][:2] == names[0][:2] and names[1][2] != names[0][2] and len(names[1]) == 9
    assert names[1][2] in [name for name, _ in first["tokens"][2][2]]
    assert names[2][:1] == names[1][:1] and names[2][1] != names[1][1] and len(names[2]) == 8


def test_a_text_is_coloured_by_its_surprise(talk, shared_app):
    page = talk("Completion")
    page.get_by_role("button", name="Surprise of a text").click()
    page.get_by_role("button", name="Measure").click()
    expect(page.get_by_text("There is no text yet")).to_be_visible()
    text = "The value of an expression is computed. Qx!zz"
    page.get_by_label("Text", exact=True).fill(text)
    page.get_by_role("button", name="Measure").click()
    expect(page.get_by_text("Perplexity", exact=True)).to_be_visible()
    found = shared_app.request("POST", "/api/llm/surprise", {"model": "runs/demo", "text": text})
    shown = page.locator(".surprise-result .token-text .token")
    expect(shown).to_have_count(len(found["tokens"]))
    assert "".join(shown.all_text_contents()) == text
    levels = [int(re.search(r"surprise-(\d)", each.get_attribute("class"))[1]) for each in shown.all()]
    bits = [-token["logprob"] / 0.6931 for token in found["tokens"]]
    assert levels == [sum(each >= limit for limit in (1, 3, 6, 10)) for each in bits] and len(set(levels)) > 1
    shown.nth(3).focus()
    expect(page.get_by_role("group", name="Alternatives", exact=True)).to_contain_text(f"{bits[3]:.1f} bits")


def test_two_models_answer_side_by_side(talk):
    page = talk("Completion", max_tokens=5, min_tokens=5)
    page.get_by_role("button", name="Compare with another model").click()
    page.get_by_label("Second model").select_option("runs/other")
    expect(page.get_by_label("Conversation 2").get_by_text("loaded in")).to_be_visible()
    say(page, "A name is")
    for number, model in enumerate(("runs/demo", "runs/other"), 1):
        side = page.get_by_label(f"Conversation {number}")
        written(side.get_by_role("article", name=f"Answer of {model}"))
        expect(side.get_by_role("article", name="Text")).to_contain_text("A name is")
    page.get_by_role("button", name="Close the comparison").click()
    expect(page.get_by_label("Conversation 2")).to_have_count(0)
    expect(page.get_by_role("article", name="Answer of runs/demo")).to_be_visible()


def test_a_model_that_is_still_being_loaded_is_not_answered_for_by_the_one_before_it(talk):
    page = talk("Completion", max_tokens=2, min_tokens=2)
    held = []
    page.route("**/api/llm/load", lambda route: held.append(route))
    page.get_by_label("Model", exact=True).select_option("runs/other")
    wait_for(lambda: page.wait_for_timeout(10) or held)
    say(page, "A name is")
    expect(page.get_by_text("still being loaded")).to_be_visible()
    expect(page.locator(".composer textarea")).to_have_value("A name is")
    held[0].continue_()
    page.unroute("**/api/llm/load")
    expect(page.get_by_text("still being loaded")).to_have_count(0)
    say(page, "A name is")
    written(page.get_by_role("article", name="Answer of runs/other"))
    expect(page.get_by_role("article", name="Answer of runs/demo")).to_have_count(0)


def test_conversations_are_found_exported_renamed_deleted_and_brought_back(talk, tmp_path):
    page = talk("Completion", max_tokens=2)
    say(page, "Blue elephants")
    written(page.locator("article.assistant"))
    listed = page.locator(".conversations li")
    search = page.get_by_label("Search the conversations")
    search.fill("no such words at all")
    expect(page.get_by_text("No conversation has these words.")).to_be_visible()
    search.fill("elephants")
    expect(listed).to_have_count(1)

    dialog = page.get_by_role("dialog", name="Conversation")
    listed.get_by_role("button", name="More about Blue elephants").click()
    files = {}
    for kind in ("JSON", "Markdown"):
        with page.expect_download() as waiting:
            dialog.get_by_role("button", name=f"Export as {kind}").click()
        files[kind] = tmp_path / waiting.value.suggested_filename
        waiting.value.save_as(files[kind])
    assert [each.name for each in files.values()] == ["Blue elephants.json", "Blue elephants.md"]
    assert "Blue elephants" in files["Markdown"].read_text() and len(json.loads(files["JSON"].read_text())["threads"][0]["nodes"]) == 2
    dialog.get_by_label("Title").fill("Grey elephants")
    dialog.get_by_role("button", name="Rename").click()
    expect(listed.get_by_role("button", name="More about Grey elephants")).to_be_visible()

    listed.get_by_role("button", name="More about Grey elephants").click()
    dialog.get_by_role("button", name="Delete").click()
    expect(page.get_by_text("No conversation has these words.")).to_be_visible()
    page.get_by_role("button", name="Undo").click()
    expect(listed.get_by_role("button", name="More about Grey elephants")).to_be_visible()
    page.locator(".conversation-box input[type=file]").set_input_files(files["JSON"])
    expect(listed).to_have_count(2)
    expect(page.locator("article.user")).to_contain_text("Blue elephants")
    page.locator(".conversation-box input[type=file]").set_input_files(files["Markdown"])
    expect(page.get_by_text("This file is no conversation")).to_be_visible()
