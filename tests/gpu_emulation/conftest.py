import importlib

import pytest


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """The branches that the model takes on a GPU. All kernels but AdamW's are plain torch: the step is under test here."""
    from cllm import kernels, runtime

    loss = importlib.import_module("cllm.kernels.linear_cross_entropy")  # the package holds a function of that name
    monkeypatch.setattr(loss, "_is_final_unit_gradient", lambda gradient: False)
    monkeypatch.setattr("cllm.model.layers.tied_embedding", lambda tokens, weight, dtype: (kernels.embedding(tokens, weight, dtype), weight))
    with runtime.use(backend="torch"):
        yield
