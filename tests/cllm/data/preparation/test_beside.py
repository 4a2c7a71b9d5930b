"""What documents are judged by beside themselves: the lines of their site, text for evaluation, examples of good text, languages, secrets."""

import pytest
from here import Here
from made import prose, recipe

from cllm.data.clean.rules import Rules
from cllm.data.preparation import boilerplate
from cllm.data.preparation.plan import prepare
from cllm.data.preparation.rows import COLUMNS, read_rows, writing
from cllm.runtime.errors import DataError

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


def test_documents_unlike_the_examples_are_dropped(folder, tmp_path):
    good = tmp_path / "good"
    good.mkdir()
    steps = "Stir the flour with the butter and the sugar. Bake it in a hot oven. Serve the cake with cream and berries. It keeps for a week. "

    def cake(number):
        return f"Cake number {number}. {steps}" + " ".join(f"Add {number + k} eggs." for k in range(8))

    for number in range(12):
        (good / f"{number}.txt").write_text(cake(number))
    (folder / "cake.txt").write_text(cake(5) + " That is all.")
    found = because(folder, tmp_path / "out", recipe(filter=False, like=str(good)))
    assert not found["cake.txt"] and sum(reason.startswith("min_quality") for reason in found.values()) >= 10


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
