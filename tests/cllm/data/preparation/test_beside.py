"""What documents are judged by beside themselves: the lines of their site, text for evaluation, examples of good text, languages, secrets."""

import json
import zipfile

import pytest
from here import Here
from made import prose, recipe

from cllm.data.clean.rules import Rules
from cllm.data.preparation import boilerplate
from cllm.data.preparation.plan import prepare
from cllm.data.preparation.rows import COLUMNS, read_rows, writing
from cllm.report.prepared import prepared_page
from cllm.runtime.errors import DataError, UserError

pytest.importorskip("pyarrow", reason="the data extra is not installed")
MENU, FOOTER = "Home | News | Contact us today", "Copyright 2026 The Harbour Gazette"


def page(number, site="gazette.example"):
    text = f"{MENU}\n\n{prose(number, 6)}\n{FOOTER}"
    return {**dict.fromkeys(COLUMNS, ""), "text": text, "url": f"https://{site}/{number}", "kind": "html", "id": f"{number:016x}"}


def counted(tmp_path, pages, parts):
    """The counts of three pieces, merged in so many parts."""
    inputs = []
    for piece in range(3):
        with writing(tmp_path / f"{piece}.parquet") as out:
            for row in pages[piece::3]:
                out.add(row)
        boilerplate.count(str(tmp_path / str(piece)), [str(tmp_path / f"{piece}.parquet")])
        inputs.append(str(tmp_path / f"{piece}.lines"))
    for part in range(parts):
        boilerplate.merge(str(tmp_path / f"merged-{part}"), part, parts, inputs, 5)
    return [str(tmp_path / f"merged-{part}.lines") for part in range(parts)]


@pytest.mark.parametrize("parts", [1, 4])
def test_lines_that_many_pages_of_a_site_have_are_taken_out(tmp_path, parts):
    pages = [page(number) for number in range(12)] + [page(number, "small.example") for number in range(100, 103)]
    pages.append({**page(200), "kind": "text"})
    found = boilerplate.Boilerplate(counted(tmp_path, pages, parts))
    for row in pages:
        text, dropped = found.without(row["text"], boilerplate.site_of(row) or "nowhere", Rules())
        is_of_large = row["url"].startswith("https://gazette") and row["kind"] == "html"
        assert dropped == (2 if is_of_large else 0) and (MENU in text) is not is_of_large
        assert prose(int(row["id"], 16), 6).split("\n")[0] in text


def test_no_page_is_cleaned_by_nothing(tmp_path):
    assert boilerplate.Boilerplate([]).without("a line\n", "a.example", Rules()) == ("a line\n", 0)
    assert boilerplate.Boilerplate(counted(tmp_path, [], 2)).without("a line\n", "a.example", Rules()) == ("a line\n", 0)


@pytest.fixture
def folder(tmp_path):
    source = tmp_path / "texts"
    source.mkdir()
    for number in range(12):
        (source / f"{number:02}.txt").write_text(prose(number))
    return source


def because(source, out, how):
    prepared = prepare([str(source)], out, how, Here())
    return {row["path"]: row["dropped_because"] for place in prepared.paths() for row in read_rows(place)}


def test_documents_that_hold_text_for_evaluation_are_dropped(folder, tmp_path):
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "questions.jsonl").write_text('{"text": "' + " ".join(prose(3).split()[20:40]) + '"}\n')
    found = because(folder, tmp_path / "out", recipe(exclude=[str(tests)]))
    assert [path for path, reason in found.items() if reason] == ["03.txt"]
    assert found["03.txt"].startswith("max_evaluation_overlap")
    (tests / "questions.jsonl").write_text('{"text": "' + " ".join(prose(4).split()[20:40]) + '"}\n')
    found = because(folder, tmp_path / "out", recipe(exclude=[str(tests)]))
    assert [path for path, reason in found.items() if reason] == ["04.txt"]
    (tests / "questions.jsonl").write_text('{"text": "Too short to tell."}\n')
    with pytest.raises(DataError, match="has no 8 words in a row"):
        because(folder, tmp_path / "out", recipe(exclude=[str(tests)]))


def test_text_for_evaluation_stands_in_files_of_any_kind(folder, tmp_path):
    tests = tmp_path / "tests"
    tests.mkdir()
    part = [" ".join(prose(number).split()[20:40]) for number in range(7)]
    asked = [{"question": part[0], "answer": part[1]}, {"question": "Who was it?", "answer": "Nobody."}]
    (tests / "asked.jsonl").write_text("".join(json.dumps(each) + "\n" for each in asked))
    chat = {"messages": [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": part[2]}]}
    (tests / "chats.jsonl").write_text(json.dumps(chat) + "\n")
    (tests / "choices.json").write_text(json.dumps([{"id": 1, "choices": [part[3], "no"], "licence": part[6]}]))
    with zipfile.ZipFile(tests / "more.zip", "w") as archive:
        archive.writestr(
            "page.html", f"<html><body><article><p>{part[4].replace(' ', ' <i>', 1).replace(' ', '</i> ', 2)}</p></article></body></html>"
        )
    (tests / "words.jsonl").write_text(json.dumps({"tokens": part[5].split()}) + "\n")
    (tests / "broken.pdf").write_bytes(b"%PDF-1.4\n")
    prepared = prepare([str(folder)], tmp_path / "out", recipe(exclude=[str(tests)]), Here())
    dropped = [row["path"] for place in prepared.paths(kept=False) for row in read_rows(place)]
    assert dropped == [f"{number:02}.txt" for number in range(6)]
    read = prepared.summary["evaluation"]
    assert read["places"] == [str(tests)] and [path for path, _ in read["unread"]] == ["broken.pdf"]
    page = prepared_page(prepared.summary)
    assert "These could not be read, and had no effect" in page and "broken.pdf" in page


@pytest.mark.parametrize("given", [{"exclude": ["empty"]}, {"like": "empty"}])
def test_an_empty_folder_beside_the_documents_is_told_before_they_are_read(folder, tmp_path, monkeypatch, given):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"--(exclude|like) empty: there are no files in it"):
        because(folder, tmp_path / "out", recipe(**given))
    assert not (tmp_path / "out/.ledger/extract").exists()


def test_documents_unlike_the_examples_are_dropped(folder, tmp_path):
    good = tmp_path / "good"
    good.mkdir()
    steps = "Stir the flour with the butter and the sugar. Bake it in a hot oven. Serve the cake with cream and berries. It keeps for a week. "

    def cake(number):
        return f"Cake number {number}. {steps}" + " ".join(f"Add {number + k} eggs." for k in range(8))

    for number in range(12):
        (good / f"{number}.txt").write_text(cake(2 * number))
        (folder / f"cake{number}.txt").write_text(cake(2 * number + 1))
    found = because(folder, tmp_path / "out", recipe(filter=False, dedup=False, like=str(good)))
    assert {path for path, reason in found.items() if not reason} == {f"cake{number}.txt" for number in range(12)}
    assert {reason.partition(":")[0] for reason in found.values()} == {"", "min_quality"}


def test_languages_secrets_and_single_rules(folder, tmp_path):
    (folder / "key.txt").write_text(prose(50) + "\n-----BEGIN RSA PRIVATE KEY-----\n" + "MIIEowIBAAKCAQEA" * 20 + "\n-----END RSA PRIVATE KEY-----\n")
    german = "Der Hund und die Katze gingen durch den Wald, und das Wetter war mit der Zeit besser geworden. "
    (folder / "german.txt").write_text("".join(german.replace("Wald", f"Wald von Ort {k}") for k in range(12)))
    how = {"languages": "de", "gopher_max_duplicate_ngrams": "off", "gopher_max_top_ngrams": "off"}
    found = because(folder, tmp_path / "out", recipe(rules=how))
    assert not found["german.txt"] and "private_key" in found["key.txt"]
    assert found["00.txt"].startswith("languages: it is in ")
    per_source = recipe(rules={"gopher_min_words": "9999", "texts:gopher_min_words": "8888"})
    assert because(folder, tmp_path / "out", per_source)["00.txt"].endswith("fewer than 8,888")
