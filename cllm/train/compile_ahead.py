"""Compiles the kernels of a training to come while its text is read: `start` in the process that trains, the rest in the one that it starts.

That one takes a step of the model with the sizes and settings of the run, cut down to two layers, evaluates it and goes on with a text, all with
launches that do nothing (`runtime/compile_ahead.py`).
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cllm import runtime
from cllm.runtime import compile_ahead

if TYPE_CHECKING:
    from cllm.config.model import ModelConfig
    from cllm.config.train import TrainConfig
    from cllm.model.model import Model

LAYERS = 2
VOCABULARY = 1024  # where there is no tokenizer yet


def start(config: TrainConfig, sizes: ModelConfig | None) -> None:
    """For a run with these settings, in a process of its own, if there are no compiled kernels on this machine yet.

    sizes: those of the model that is trained further; None for a new one.
    """
    from cllm.runtime.device import resolve

    if resolve(config.train.device)[0].type != "cpu" or not is_cold():
        return
    if sizes is None:
        sizes = config.model_config(VOCABULARY)
    compile_ahead.start(__name__, json.dumps({"config": config.to_dict(), "sizes": sizes.to_dict()}))


def is_cold() -> bool:
    """Whether the matrix product, which every training needs, is not compiled yet. To find out whether all is would take longer than most of it."""
    from cllm.kernels import numba

    folder = runtime.compiler.folder_of(str(Path(numba.__file__).with_name("gemm_kernel.py")))
    return folder is not None and not any(Path(folder).glob("gemm_kernel._task-*.nbi"))


def main() -> None:
    import torch

    from cllm.config.model import ModelConfig
    from cllm.config.train import TrainConfig
    from cllm.data.tokens.batch import Batch
    from cllm.kernels.numba import copies
    from cllm.kernels.numba.launch import Kernel
    from cllm.model.model import Model
    from cllm.runtime.workers import only_list
    from cllm.train.build import make_step

    given = json.load(sys.stdin)
    sizes = ModelConfig.from_dict(given["sizes"])
    sizes = dataclasses.replace(sizes, num_layers=min(sizes.num_layers, LAYERS))
    config = TrainConfig.from_dict(given["config"]).resolve(sizes, num_train_tokens=1 << 20)
    settings = config.train
    torch.set_num_threads(1)  # a process with other threads cannot be forked
    tokens = torch.zeros(settings.batch_size, settings.seq_len, dtype=torch.int64)
    batch = Batch(tokens, tokens)
    with runtime.use(threads=settings.threads), compile_ahead.listing():
        only_list()
        step = make_step(Model(sizes, seed=0), config)
        step.run([batch])
        for each in vars(copies).values():  # for the step that is recorded, which compares what launches have computed
            if isinstance(each, Kernel):
                each.entry()
        with torch.no_grad():
            step.model.loss(tokens, tokens, return_stats=True)
            _go_on_with_a_text(step.model)


def _go_on_with_a_text(model: Model) -> None:
    """What samples need, and `cllm generate` after the training."""
    from cllm.generate import compiled_draw
    from cllm.model.pages import PAGE, Part

    compile_ahead.is_postponed(compiled_draw.compile_draw)
    pool = model.make_pool(1)
    page = pool.take()
    for num_tokens in (1, min(PAGE, model.config.max_seq_len)):  # a token of an answer, and a prompt
        model.step(pool, [Part([0] * num_tokens, 0, [page], 1)])


if __name__ == "__main__":
    main()
