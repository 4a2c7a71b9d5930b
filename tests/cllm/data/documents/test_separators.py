"""Documents in one text: cut at markers that stand as separators, and nowhere else."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cllm.data.documents.separators import MARKERS, Splitter, parse, passing, recognise
from cllm.runtime.errors import UserError

END = "<|endoftext|>"


def cut(text, separator=None, guarded=True, size=None):
    """The documents of a text that comes in chunks of this size."""
    size = size or max(1, len(text))

    def chunks():
        return (text[i : i + size] for i in range(0, len(text), size))

    separator = recognise(chunks()) if separator is None else separator
    if not separator:
        return [text]
    return ["".join(document) for document in Splitter(separator, guarded).documents(chunks())]


@pytest.mark.parametrize(
    "text",
    [
        f"One day.\n{END}\nThe end.\n{END}\n",
        f"One day.\n\n{END}\n\nThe end.\n",
        f"{END}\nOne day.\n{END}\n{END}\nThe end.\n",
        f"One day.{END}The end.{END}\n",
        f"One day. {END} The end. {END} ",
        f"One day.\n{END}The end.\n{END}",
        f"One day.{END}\nThe end.{END}\n",
        f'"One day."{END}\n"The end."{END}\n',
        f"one day{END}the end{END}",
        "One day.\n</s>\nThe end.\n</s>\n",
        "One day.\n  <eos>  \nThe end.\n",
    ],
)
def test_markers_between_texts_are_cut_at(text):
    assert [document.strip(' \n"').lower().rstrip(".") for document in cut(text)] == ["one day", "the end"]


@pytest.mark.parametrize(
    "text",
    [
        f"GPT-2 writes {END} when a text is over. Then it stops.\n",
        f"GPT-2 writes {END} when a text is over. {END} is a token, and {END} ends a text.\n",
        f"The token is called\n{END} and marks the end; so is\n{END} in this one.\n",
        f"The end of a text is marked by\n\n    `{END}`\n\nand by nothing else.\n",
        f"This is the marker:\n\n{END}\n\nIt ends a text.\n",
        f"An example:\n```\nOne day.\n{END}\nThe end.\n{END}\n```\nSo it is written.\n",
        f'eot = "{END}"\nother = "{END}"\nprint({END})\ntokens[{END}] = 0\n',
        f"('{END}', '{END}')",
        "This is <s>wrong</s> right, and this <s>too</s>\n",
        "<s> the first sentence . </s>\n<s> the second one . </s>\n",
        "<s>\nthe first sentence .\n</s>\n<s>\nthe second one .\n</s>\n",
        f'markers = ["{END}","{END}"]',
        f"A letter that ends here.{END}Nobody knows why the marker stands there once.\n",
        "plain text\n",
    ],
)
def test_a_text_that_mentions_a_marker_is_not_cut(text):
    assert cut(text) == [text]


def test_one_mention_among_many_separators_is_kept_as_text():
    stories = [f"Story {n} is over.\n" for n in range(30)]
    stories[7] = f"The token {END} was said to be the last one.\n"
    assert cut(f"{END}\n".join(stories)) == stories


def test_a_colon_or_an_open_block_of_code_in_one_of_many_documents_changes_nothing():
    stories = [f"Story {n} is over.\n" for n in range(40)]
    stories[3], stories[5] = "And then he said:\n", "```\ncode that nobody closed\n"
    assert cut(f"{END}\n".join(stories)) == stories


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    pieces=st.lists(st.sampled_from([END, "</s>", "<s>", "```", "\n", "\n", " ", "a", "B", ".", '"', ":", "word ", END[:7], "x" * 90]), max_size=25),
    size=st.integers(1, 40),
    separator=st.sampled_from([None, END, "\n\n", "a"]),
)
@example(pieces=["a.", END], size=3, separator=None)
def test_how_the_text_arrives_does_not_matter_and_no_word_is_lost(pieces, size, separator):
    text = "".join(pieces)
    guarded = separator is None
    whole = cut(text, separator, guarded)
    assert cut(text, separator, guarded, size) == whole
    used = separator or recognise([text])
    kept = "".join("".join(whole).replace(used, "").split()) if used else "".join(whole)
    assert kept == ("".join(text.replace(used, "").split()) if used else text)
    seen = []
    assert "".join(passing((text[i : i + size] for i in range(0, len(text), size)), MARKERS, seen)) == text
    assert bool(seen) == any(marker in text for marker in MARKERS)
    if not guarded:
        assert all(used not in document for document in whole)


def test_the_lines_of_a_document_stay_as_they_are():
    assert cut(f"  one\n\ttwo  \n{END}\n\n    three\n\nfour \n") == ["  one\n\ttwo\n", "    three\n\nfour \n"]
    assert cut("a\n\n\n\nb\n\nc", "\n\n\n", guarded=False) == ["a", "b\n\nc"]
    assert cut("a---b--c", "---", guarded=False) == ["a", "b--c"]
    assert cut(f" \n{END}\n \n", END) == []


def test_a_separator_is_given_with_escapes():
    assert parse("auto") == "auto" and parse("none") == "none"
    assert parse("\\n\\n\\n") == parse("\n\n\n") == parse("\\r\\n\\n\\r") == "\n\n\n"
    assert parse("\\t\\x41\\u00e9\\\\n\\d") == "\tA\u00e9\\n\\d"
    with pytest.raises(UserError, match="must not be empty"):
        parse("")
