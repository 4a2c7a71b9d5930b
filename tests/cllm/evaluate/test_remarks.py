"""Comments and docstrings in Python code, which `cllm review` does not rank."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cllm.config.model import ModelConfig
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.evaluate.remarks import remarks_in
from cllm.evaluate.review import review_text
from cllm.model.model import Model

CODE = 'x = "a # b"  # caf\u00e9, a note\n\ndef f(y):\n    """Doc\n    string."""\n    # alone\n    return "\u00e9", y  # end\n'


def test_remarks_are_comments_and_strings_that_are_statements():
    content = np.frombuffer(CODE.encode(), dtype=np.uint8)
    found = content[remarks_in(CODE)].tobytes().decode()
    assert found == '# caf\u00e9, a note"""Doc\n    string."""# alone# end'


@given(st.text("ab #\"'\n\u00e9(\\", max_size=40))
def test_every_byte_has_an_answer_whatever_the_text(text):
    assert remarks_in(text).shape == (len(text.encode()),)


@pytest.mark.parametrize(("name", "numbers"), [("a.py", [1, 3, 7]), ("a.txt", [1, 3, 4, 5, 6, 7])])
def test_lines_of_remarks_are_ranked_only_where_the_text_is_no_python(name, numbers):
    tokenizer = Tokenizer.train([CODE * 3], vocab_size=320)
    model = Model(ModelConfig(vocab_size=tokenizer.vocab_size, embed_dim=32, num_layers=1, num_heads=2, max_seq_len=64), seed=4)
    lines = review_text(model, tokenizer, CODE, name)
    assert [line.number for line in lines] == numbers
    if name == "a.py":  # the surprise of a line is looked for in its code
        assert all(line.column <= line.text.rfind("#") for line in lines if "#" in line.text)
