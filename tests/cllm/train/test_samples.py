from served_model import make_model

from cllm.train.samples import sample_text


def test_a_sample_ends_when_its_time_is_over_and_is_the_same_until_then():
    model, tokenizer = make_model()
    whole, cut = (sample_text(model, tokenizer, None, seed=2, **more) for more in ({}, {"seconds": 0.0}))
    assert len(cut) < len(whole) and whole.startswith(cut)
    assert sample_text(model, tokenizer, None, seed=2, seconds=600.0) == whole
