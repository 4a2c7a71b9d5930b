"""A training loop in plain Python: the same pieces that `cllm train` uses, in the order in which things happen.

    python examples/train_loop.py TEXT [--steps 200]

TEXT is a file or a folder of text. The model goes to model.cllm, and a sample of it is printed.
"""

import argparse
from pathlib import Path

from cllm import Model, ModelConfig, TrainStep, runtime, save
from cllm.data import Batches, prepare
from cllm.evaluate import evaluate
from cllm.generate import generate

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("text", type=Path)
parser.add_argument("--steps", type=int, default=200)
parser.add_argument("--out", type=Path, default=Path("model.cllm"))
options = parser.parse_args()

# Text to tokens. The folder keeps them: a second run reads what the first one packed.
dataset = prepare(options.text, options.out.with_suffix(".data"), vocab_size=512)

# A small Llama-shaped model. The seed decides its first weights.
config = ModelConfig(vocab_size=dataset.tokenizer.vocab_size, embed_dim=64, num_layers=2, num_heads=4, max_seq_len=64)
model = Model(config, seed=0)

# bf16 is the precision of activations; weights and optimizer state stay in float32.
step = TrainStep(model, precision="bf16", learning_rate=3e-3, grad_clip=1.0)

# Batch number i depends on the data, the seed and i alone.
batches = Batches(dataset.train, seq_len=64, batch_size=8, seed=0)

with runtime.use(threads=2):  # any number of threads gives the same bits
    for number in range(options.steps):
        batch = batches.batch(number)
        loss = step(batch.tokens, batch.targets)
        if number % 50 == 0 or number == options.steps - 1:
            print(f"step {number:4}  loss {float(loss):.3f}  gradient norm {step.last.gradient_norm:.2f}")
    print(f"validation: {evaluate(model, dataset.val, seq_len=64)}")
    sample = generate(model, dataset.tokenizer, "The ", max_tokens=40, temperature=0.7, seed=0)[0]

save(model, options.out, tokenizer=dataset.tokenizer)
print(f"The {sample.text}")
