"""What runs on devices that are not there, in processes that `test_device.py` starts.

A scenario ends where nothing waited for a GPU but what may, nothing mixed devices, no work raced, and the results are those of a CPU.
"""

import math
import sys
import threading
from pathlib import Path

import torch
from gpu_emulation import device
from gpu_emulation.device import DeviceError
from gpu_emulation.streams import RaceError

from cllm import Model, ModelConfig, TrainStep, runtime
from cllm.data import IGNORE, Batch

torch.set_num_threads(1)
GPU = device.install()

LLAMA = {"vocab_size": 37, "embed_dim": 16, "num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "ffn_dim": 24, "max_seq_len": 16}
GPT2 = {"vocab_size": 37, "embed_dim": 16, "num_layers": 1, "num_heads": 2, "ffn_dim": 24, "max_seq_len": 16, "norm": "layer"}

# Who may wait for the GPU, and why.
PREPARING = {
    "torch.nn.modules.module.Module.to": "a model moves",
    "cllm.model.model.Model.rotary_tables": "made once for each device",
    "cllm.kernels.dropout.Dropout.of": "made once for a run",
    "cllm.train.step_graph.DeviceStep.__init__": "made once for a run",
    "gpu_emulation.device.install.<locals>.graph.__enter__": "a capture begins",
}
STEP = "cllm.train.step_graph.DeviceStep._read"  # at the end of a step
EVALUATION = {  # the sums of a batch
    "cllm.evaluate.loss.evaluate_part",
    "cllm.evaluate.documents.score_documents",
    "cllm.evaluate.classes.report_classes",
}
CHECKPOINT = {"cllm.checkpoint.writer.CheckpointWriter._copy", "cllm.train.step_graph.DeviceStep.state"}
STEPS = "cllm.generate.engine.Engine.step"  # the logits of each step go to the host
TOKEN = "cllm.generate.decoding._Run.pieces"  # each token goes to the host


def microbatches(seed, packed):
    generator = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(2):
        tokens, targets = (torch.randint(0, 37, (2, 8), generator=generator) for _ in range(2))
        targets[0, :2] = IGNORE
        made.append(Batch(tokens, targets, torch.tensor([0, 5, 5, 8, 16], dtype=torch.int32) if packed else None))
    return made


def same_training(sizes, place, packed, **options):
    """Two steps on a GPU, each with two microbatches and with those of the next one made ahead, against the same steps on a CPU."""
    here, there = Model(ModelConfig(**sizes)), Model(ModelConfig(**sizes)).to(place)
    assert there.embedding_weight.device == torch.device(place)
    reference = TrainStep(here, learning_rate=1e-2, optimizer=options.get("optimizer", "adamw"), dropout=options.get("dropout", 0.0))
    step = TrainStep(there, learning_rate=1e-2, **options)
    coming = microbatches(0, packed)
    exact = 2e-5 if options.get("precision", "fp32") == "fp32" else 2e-2
    for number in range(2):
        following = microbatches(number + 1, packed)
        before = GPU.waits[STEP]
        found = step.run(coming, ahead=lambda following=following: following)
        assert GPU.waits[STEP] == before + 1, "a step waits once"
        with runtime.use(backend="torch"):
            expected = reference.run(coming)
        assert math.isclose(found.loss, expected.loss, rel_tol=exact), (found, expected)
        assert math.isclose(found.gradient_norm, expected.gradient_norm, rel_tol=10 * exact), (found, expected)
        coming = following
    return there, here


def refused(error, words, call):
    """Whether `call` is refused with these words."""
    try:
        call()
    except error as refusal:
        assert words in str(refusal), refusal
    else:
        raise AssertionError(f"nothing says {words!r}")


def rules(folder):
    """What the devices do not forgive, and what they do."""
    GPU.waiting_allowed |= {"gpu_emulation.scenarios.rules.<locals>.send", "gpu_emulation.scenarios.rules.<locals>.copy"}

    def send(*values):
        return torch.tensor(values, device="cuda:0")

    x, y = send(1.0, 2.0), send(3.0, 4.0)
    other = torch.ones(2, device="cuda:1")
    refused(DeviceError, "cuda:0 and cuda:1", lambda: x + other)
    refused(DeviceError, "cpu and cuda:0", lambda: x * torch.ones(2))
    for look in (bool, float, torch.nonzero, lambda each: each.tolist(), lambda each: each.cpu(), lambda each: each[each > 1]):
        refused(DeviceError, "waits for the GPU", lambda look=look: look(x[:1]))
    refused(DeviceError, "waits for the GPU", lambda: torch.tensor([1.0]).to("cuda:0"))
    refused(TypeError, "numpy", lambda: x.numpy())

    side, other_x = torch.cuda.Stream("cuda:0"), send(1.0)
    with torch.cuda.stream(side):
        assert (other_x + 1).values.tolist() == [2.0]  # the host waited for it, so that it is there
    x.add_(0.0)
    with torch.cuda.stream(side):
        refused(RaceError, "does not wait for", lambda: y.add_(x))
        side.wait_stream(torch.cuda.default_stream("cuda:0"))
        y.add_(x)
    refused(RaceError, "does not wait for", lambda: y + 1)
    done = side.record_event()
    torch.cuda.current_stream("cuda:0").wait_event(done)
    y.add_(1.0)

    buffer = torch.zeros(2).pin_memory()
    x.copy_(buffer, non_blocking=True)
    refused(RaceError, "of the host does not wait for", lambda: buffer.fill_(1.0))
    send(0.0)  # which the host waits for, and so for what came before it
    buffer.fill_(1.0)

    graph, spare = torch.cuda.CUDAGraph(), torch.cuda.Stream("cuda:0")
    GPU.waiting_allowed |= set(PREPARING)
    with torch.cuda.graph(graph, stream=spare):
        refused(DeviceError, "during a capture", lambda: x.sum().item())
        refused(DeviceError, "not pinned", lambda: x.copy_(torch.zeros(2), non_blocking=True))
        made = x * 2
    graph.replay()
    assert made.values.tolist() == [0.0, 0.0]

    for mode, told in (("thread_local", ["copied"]), ("global", ["another thread uses the GPU during a capture"])):
        said = []

        def copy(said=said):
            try:
                y.cpu()  # as a thread does that writes a checkpoint
                said.append("copied")
            except DeviceError as refusal:
                said.append(str(refusal))

        with torch.cuda.graph(torch.cuda.CUDAGraph(), stream=spare, capture_error_mode=mode):
            thread = threading.Thread(target=copy)
            thread.start()
            thread.join()
        assert said == told, (mode, said)


def train_llama(folder):
    """The second GPU, while the first one is current."""
    GPU.waiting_allowed |= {*PREPARING, STEP}
    same_training(LLAMA | {"qk_norm": True, "bigram_rows": 23, "trigram_rows": 29}, "cuda:1", packed=True, dropout=0.2)
    assert GPU.contexts == {1}, f"memory is used on {GPU.contexts}"


def train_gpt2(folder):
    GPU.waiting_allowed |= {*PREPARING, STEP}
    same_training(GPT2, "cuda:0", packed=False, precision="bf16", optimizer="schedule_free")
    assert GPU.contexts == {0}, f"memory is used on {GPU.contexts}"


def train_muon(folder):
    """Its matrices by products, the rest as AdamW's."""
    GPU.waiting_allowed |= {*PREPARING, STEP}
    same_training(LLAMA, "cuda:1", packed=True, optimizer="muon", ema=0.9)
    assert GPU.contexts == {1}, f"memory is used on {GPU.contexts}"


def answers_of(model, backend):
    """The tokens of two requests that an engine has at once, and the number of its steps."""
    from cllm.generate.engine import Engine
    from cllm.generate.request import Request
    from cllm.model.pages import page_bytes

    engine = Engine(model, vocab_size=12, memory=4 * page_bytes(model.config, model.compute_dtype))
    tokens, steps = [], 0
    for prompt in ([1, 2, 3, 1, 2], [5]):
        engine.submit(Request(prompt, 3, on_token=lambda _, chosen: tokens.append(chosen.token) or True))
    with runtime.use(backend=backend):
        while engine.step():
            steps += 1
    return tokens, steps


def use_the_model(folder):
    """Evaluation, generation, an engine and the evaluation harness, on the second GPU while the first one is current."""
    from cllm.data.pipeline import prepare
    from cllm.evaluate.loss import evaluate
    from cllm.generate import generate

    (folder / "text.txt").write_text("one two three four five six seven\n" * 40)
    dataset = prepare(folder / "text.txt", folder / "tokens", tokenizer="char", val_fraction=0.1)
    sizes = LLAMA | {"vocab_size": dataset.tokenizer.vocab_size}
    GPU.waiting_allowed |= {*PREPARING, *EVALUATION, TOKEN}
    here, there = Model(ModelConfig(**sizes)), Model(ModelConfig(**sizes)).to("cuda:1")
    ours = evaluate(there, dataset.val, 16, 4)
    with runtime.use(backend="torch"):
        theirs = evaluate(here, dataset.val, 16, 4)
    assert math.isclose(ours.loss, theirs.loss, rel_tol=1e-5) and ours.num_targets == theirs.num_targets
    all_filters = {"temperature": 0.9, "top_k": 8, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.95, "frequency_penalty": 0.5, "logit_bias": {1: -3.0}}
    for sampling in ({"temperature": 0.0}, all_filters, {"temperature": 0.8, "repetition_penalty": 1.2}):
        texts = []
        for model, settings in ((there, {}), (here, {"backend": "torch"})):
            with runtime.use(**settings):
                texts.append([each.text for each in generate(model, dataset.tokenizer, "one t", max_tokens=3, samples=2, **sampling)])
        assert texts[0] == texts[1], sampling
    GPU.waiting_allowed |= {STEPS}
    answers = [answers_of(there, None), answers_of(here, "torch")]
    assert answers[0] == answers[1] and GPU.waits[STEPS] == answers[0][1], "an engine waits once a step"
    assert GPU.contexts == {1}, f"memory is used on {GPU.contexts}"


def harness(folder):
    from cllm.data.pipeline import prepare
    from cllm.evaluate.harness import CLLM

    (folder / "text.txt").write_text("one two three\n" * 40)
    tokenizer = prepare(folder / "text.txt", folder / "tokens", tokenizer="char").tokenizer
    sizes = LLAMA | {"vocab_size": tokenizer.vocab_size}
    GPU.waiting_allowed |= {*PREPARING, TOKEN, "cllm.evaluate.harness.CLLM._score"}
    here, there = (CLLM(model=Model(ModelConfig(**sizes)).to(place), tokenizer=tokenizer) for place in ("cpu", "cuda:1"))
    pairs = [(tokenizer.encode("one "), tokenizer.encode("two")), (tokenizer.encode("on"), tokenizer.encode("e three two one"))]
    with runtime.use(backend="torch"):
        expected = here._score(pairs, "scoring"), here._continue("one", {"until": ["w"], "max_gen_toks": 3})
    for ours, theirs in zip(there._score(pairs, "scoring"), expected[0]):
        assert math.isclose(ours[0], theirs[0], rel_tol=1e-5) and ours[1] == theirs[1]
    assert there._continue("one", {"until": ["w"], "max_gen_toks": 3}) == expected[1]
    assert GPU.contexts == {1}, f"memory is used on {GPU.contexts}"


def rivals(folder):
    sys.path.insert(0, str(Path(__file__).parents[2] / "profiling"))
    from peers import SHAPES, PlainGPT, make_batch

    shape = SHAPES["tiny"]
    GPU.waiting_allowed |= {*PREPARING}
    tokens, targets = (each.pin_memory().to("cuda:0", non_blocking=True) for each in make_batch(shape))
    loss = PlainGPT(shape).to("cuda:0")(tokens, targets)
    loss.backward()
    GPU.waiting_allowed |= {"gpu_emulation.scenarios.rivals"}
    assert abs(loss.item() - math.log(shape.vocab_size)) < 0.2


def command_line(folder):
    """A run through the commands, on the GPU that they choose."""
    from cllm.cli import main
    from cllm.runtime import ceiling, gpu
    from cllm.train import samples

    samples.SAMPLE_TOKENS = 3
    gpu.RATE_SIZE, gpu.COPY_BYTES = 32, 1024
    known = ceiling.Ceilings(100.0, 100.0, 10.0)
    ceiling.ceilings = lambda: known  # measuring the CPU takes its time
    (folder / "text.txt").write_text("one two three four five six seven\n" * 12)
    (folder / "other.txt").write_text("seven six one two\n")
    GPU.free_memory[1] = 14 << 30
    GPU.waiting_allowed |= {*PREPARING, STEP, *EVALUATION, TOKEN, *CHECKPOINT, "cllm.runtime.gpu.measured_rates.<locals>.fastest"}
    sizes = {"embed-dim": 16, "num-layers": 1, "num-heads": 2, "ffn-dim": 24, "seq-len": 16, "batch-size": 2, "steps": 2, "tokenizer": "char"}
    tiny = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    commands = [
        ["train", str(folder / "text.txt"), "--out", str(folder / "run"), *tiny, "--device", "cuda"],
        ["evaluate", str(folder / "run"), str(folder / "other.txt"), "--device", "cuda"],
        ["generate", str(folder / "run"), "--prompt", "one ", "--max-tokens", "2", "--device", "cuda"],
        ["generate", str(folder / "run"), "--prompt", "one ", "--max-tokens", "2", "--weights", "int8"],
        ["generate", str(folder / "run"), "--prompt", "one ", "--max-tokens", "2", "--kv-cache", "int8"],
    ]
    for command in commands:
        sys.argv = ["cllm", *command]
        try:
            main()
        except SystemExit as ended:
            assert not ended.code, (command, ended.code)
    assert GPU.contexts == {1}, f"memory is used on {GPU.contexts}"


def run(folder, *scenarios):
    """Runs some of the functions above, each in a folder of its own."""
    for name in scenarios:
        own = Path(folder) / name
        own.mkdir()
        globals()[name](own)
    print("ran", *scenarios)
