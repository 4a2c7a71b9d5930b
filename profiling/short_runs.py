"""Short trainings whose last loss is compared. A loss does not depend on how busy the machine is, and what is finished is not trained again."""

import json
import sys
from pathlib import Path

from cllm import Model, TrainConfig
from cllm.data.pipeline import Dataset, prepare
from cllm.evaluate.loss import evaluate
from cllm.train.trainer import Trainer

# A run of nothing but updates: no evaluation, sample or checkpoint on the way.
PLAINLY = {"eval_every": 10**6, "checkpoint_every": 10**6, "keep": 1, "classes": False, "layers_every": 0, "tensorboard": False, "eval_budget": 1e-3}


def text_of(source: str, work: Path) -> tuple[str, Dataset]:
    """(name, the packed text) of NAME=PATH[:TOKENIZER], kept in `work`."""
    name, _, path = source.partition("=")
    file, _, tokenizer = path.partition(":")
    return name, prepare(file, work / f"data-{name}", tokenizer=tokenizer or "bpe")


def trained(place: Path, dataset: Dataset, config: TrainConfig) -> dict[str, float]:
    """Vocabulary, parameters and the loss on the whole validation split of one run, or what `place` holds of it."""
    kept = place / "result.json"
    if not kept.exists():
        model = Model(config.model_config(-(-dataset.tokenizer.vocab_size // 64) * 64), seed=config.train.seed)
        Trainer(model, dataset, config, out=place, tokenizer=dataset.tokenizer).fit()
        assert config.train.seq_len is not None
        loss = evaluate(model, dataset.val, config.train.seq_len, 64).loss
        kept.write_text(json.dumps({"vocabulary": model.config.vocab_size, "parameters": model.config.num_parameters(), "loss": loss}))
        print(f"{place.name}: {loss:.4f}", file=sys.stderr)
    found: dict[str, float] = json.loads(kept.read_text())
    return found
