"""`cllm pack` and `cllm train` on structured text: what a user is told, the first time and from the cache."""

import json

from command import TINY, cllm

from cllm.data.tokens.tokenizer import Tokenizer

SENTENCE = "The small garden repaired the old river at night; the {}th bridge found the lazy teacher."


def test_what_was_found_and_left_out_is_told_again_from_the_cache_and_no_name_acts_on_the_terminal(tmp_path):
    Tokenizer.train([SENTENCE * 9], 320).save(tmp_path / "t.json")
    data = tmp_path / "data"
    data.mkdir()
    rows = "".join(f'{n};"{SENTENCE.format(n)}";"other {SENTENCE}"\n' for n in range(30))
    (data / "table\x1b[31m.csv").write_text(f"id;body;notes\n{rows}")
    (data / "stories.txt").write_text("\n\n\n".join(SENTENCE.format(n) for n in range(30)))
    (data / "lines.jsonl").write_text("".join(json.dumps({"body": f"half a face \ud83d {n}"}) + "\n" for n in range(9)) + "broken\n")
    (data / "photo\x1b]0;x\x07.png").write_bytes(b"x")
    command = ("pack", data, "--tokenizer", tmp_path / "t.json", "--out", tmp_path / "out", "--text-field", "body", "--separator", "\\n\\n\\n")
    first = cllm(*command)
    assert first.status == 0 and "\x1b" not in first.out + first.err and "\x07" not in first.out + first.err
    told = [line.strip() for line in first.out.splitlines()]
    expected = [
        "table\\x1b[31m.csv: 30 rows, text from column 'body'",
        "lines.jsonl: 9 records, text from field 'body'",
        "stories.txt: 30 documents, cut at '\\n\\n\\n'",
        "left out 2:",
        "1 binary (.png): photo\\x1b]0;x\\x07.png",
        "1 record that is not valid JSON: lines.jsonl:10",
    ]
    assert [line for line in expected if line not in told] == []
    assert told[0].startswith("files: 3 files, 69 documents")
    again = cllm(*command)
    assert again.out == first.out.replace("(done)", "(cached)")
    packed = cllm("pack", tmp_path / "out", "--tokenizer", tmp_path / "t.json", "--out", tmp_path / "unused")
    assert packed.status == 0 and [line for line in expected[3:] if line not in [each.strip() for each in packed.out.splitlines()]] == []


def test_a_choice_that_is_not_certain_names_the_setting_and_the_setting_settles_it(tmp_path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"de": SENTENCE.format(n), "en": SENTENCE.format(-n)}) + "\n" for n in range(60)))
    command = ("train", tmp_path / "a.jsonl", "--out", tmp_path / "run", *TINY, "--steps", 1)
    ran = cllm(*command)
    assert ran.status == 1 and "several fields hold text (de, en); choose one with data.text_field" in ran.err.replace("(en, de)", "(de, en)")
    ran = cllm(*command, "--set", "data.text_field=en", "--set", "data.separator=; the")
    assert ran.status == 0 and "a.jsonl: 60 records, text from field 'en', cut into 120 documents" in ran.out
    ran = cllm(*command, "--set", "data.separator=", "--out", tmp_path / "other")  # in the run's own folder the other settings are refused first
    assert ran.status == 2 and "separator must not be empty" in ran.err
