"""The text of a file to continue, in whatever charset and with whatever mark a text editor has put before it."""

import codecs

import pytest

from cllm.cli.options import load_tokenizer, read_text
from cllm.runtime.errors import CLLMError, DataError, UserError

TEXT = "Es war einmal ein K\u00f6nig, der hatte drei T\u00f6chter; die j\u00fcngste war sch\u00f6n.\n"


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (TEXT.encode(), ""),
        (codecs.BOM_UTF8 + TEXT.encode(), ""),
        (codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"), ""),
        (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), ""),
        (TEXT.replace("\n", "\r\n").encode(), ""),
        (TEXT.encode("cp1252"), "p.txt from cp1252 (a guess), for example: 'Es war einmal"),
    ],
)
def test_a_prompt_is_the_text_that_was_written(content, told, tmp_path, capsys):
    (tmp_path / "p.txt").write_bytes(content)
    assert read_text(tmp_path / "p.txt", "auto") == TEXT
    err = capsys.readouterr().err
    assert told in err and bool(told) == bool(err)


@pytest.mark.parametrize(
    ("make", "words"), [(None, "cannot be read: no such file"), ("folder", "cannot be read: is a directory"), (b"\0\1\2", "is no text")]
)
def test_what_is_no_text_is_named(make, words, tmp_path):
    if isinstance(make, bytes):
        (tmp_path / "p").write_bytes(make)
    elif make:
        (tmp_path / "p").mkdir()
    with pytest.raises(DataError, match=rf"{tmp_path}/p {words}"):
        read_text(tmp_path / "p", "auto")


def test_the_charset_of_a_prompt_can_be_said(tmp_path, capsys):
    (tmp_path / "p.txt").write_bytes(TEXT.encode("cp437"))
    assert read_text(tmp_path / "p.txt", "cp437") == TEXT and not capsys.readouterr().err
    with pytest.raises(UserError, match="charset that Python knows, got 'cp43'"):
        read_text(tmp_path / "p.txt", "cp43")


def test_the_tokenizer_of_a_model_file_is_found(tmp_path):
    from cllm import Model, ModelConfig, Tokenizer, save

    tokenizer = Tokenizer.train(["some words to learn from"], vocab_size=300, kind="char")
    model = Model(ModelConfig(vocab_size=64, embed_dim=16, num_layers=1, num_heads=1))
    save(model, tmp_path / "with.cllm", tokenizer)
    save(model, tmp_path / "without.cllm")
    tokenizer.save(tmp_path / "tokenizer.json")
    assert [load_tokenizer(tmp_path / name).hash for name in ("with.cllm", "tokenizer.json", "")] == [tokenizer.hash] * 3
    with pytest.raises(CLLMError, match=r"without\.cllm holds no tokenizer"):
        load_tokenizer(tmp_path / "without.cllm")
