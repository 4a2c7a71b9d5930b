"""What the processes of the pool are asked to do."""

import hashlib
import time
from pathlib import Path

import torch.distributed as dist
from command import PATIENCE

from cllm.config.model import ModelConfig
from cllm.config.train import TrainConfig
from cllm.data import Dataset
from cllm.model.model import Model
from cllm.monitor.stop_signals import Interrupted
from cllm.train.trainer import Trainer

SETTINGS = {"steps": 6, "seq_len": 16, "batch_size": 3, "grad_accum": 4, "learning_rate": 1e-2, "eval_every": 3, "checkpoint_every": 2,
            "precision": "fp32", "threads": 1, "tensorboard": False, "classes": False, "layers_every": 0,
            "grad_clip": 0.5, "watchdog_seconds": 0.0}  # fmt: skip


def weights_hash(model):
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def train(world, data, out, settings=None, sizes=None, seed=0, stop_after=None):
    """One run; (hash of the weights or None, step, training loss, validation loss)."""
    dataset = Dataset.open(data)
    sizes = {"embed_dim": 16, "num_layers": 2, "num_heads": 2, "max_seq_len": 32, **(sizes or {})}
    model = Model(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, **sizes), seed=seed)
    trainer = Trainer(model, dataset, TrainConfig(**{**SETTINGS, **(settings or {})}), out=Path(out))
    if stop_after is not None:
        record = trainer._record

        def recording(result):
            record(result)
            if trainer.step == stop_after:
                raise Stopped

        trainer._record = recording
        try:
            trainer.fit()
        except Stopped:
            return None
        raise AssertionError("the run was not stopped")
    result = trainer.fit()
    whole = trainer.whole_model()
    return None if whole is None else weights_hash(whole), result.step, result.train_loss, result.validation.loss


class Stopped(Exception):
    pass


def stopped_while_evaluating(world, data, out, parallel):
    """A run in which the last process alone gets a SIGTERM, in its second evaluation; what each of them ends with."""
    import os
    import signal

    import cllm.train.evaluations as evaluations

    evaluate_part, calls = evaluations.evaluate_part, 0

    def signalled(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == 2 and world.rank == world.size - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate_part(*args, **kwargs)

    evaluations.evaluate_part = signalled
    try:
        train(world, data, out, {"deterministic": True, "parallel": parallel})
    except Interrupted as error:
        return str(error)
    finally:
        evaluations.evaluate_part = evaluate_part


def model_of(data, embed_dim=32, num_layers=2):
    dataset = Dataset.open(data)
    sizes = {"embed_dim": embed_dim, "num_layers": num_layers, "num_heads": 2, "max_seq_len": 32}
    return dataset, Model(ModelConfig(vocab_size=dataset.tokenizer.vocab_size, **sizes))


def step_of(world, data, parallel, deterministic=False, embed_dim=32, batch_size=8, shard_size=None):
    """A step as the Trainer makes it, and the microbatches of its first update."""
    from cllm.distributed.sharding import Sharding
    from cllm.distributed.share import Share
    from cllm.train.build import make_step

    dataset, model = model_of(data, embed_dim)
    config = TrainConfig(**{**SETTINGS, "batch_size": batch_size, "grad_accum": 1, "parallel": parallel, "deterministic": deterministic,
                            "shard_size": shard_size})  # fmt: skip
    share = Share.of(config, world)
    return make_step(model, config, world, share, Sharding.of(config, world)), share.microbatches(dataset.train.batches(16, batch_size), 0)


def state_bytes(world, data, parallel):
    step, _ = step_of(world, data, parallel)
    optimizer = {name: tensor for name, tensor in step.state_dict().items() if tensor.dim()}
    return sum(tensor.numel() * tensor.element_size() for tensors in (step.weights(), optimizer) for tensor in tensors.values())


def tcp_bytes_sent():
    """Bytes that each of this process's TCP connections has sent, as the kernel counts them (struct tcp_info, tcpi_bytes_sent)."""
    import os
    import socket
    import struct

    sent = {}
    for name in os.listdir("/proc/self/fd"):
        try:
            connection = os.readlink(f"/proc/self/fd/{name}")
            if not connection.startswith("socket:"):
                continue
            with socket.socket(fileno=os.dup(int(name))) as each:
                if each.family not in (socket.AF_INET, socket.AF_INET6) or each.type != socket.SOCK_STREAM:
                    continue
                info = each.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                sent[connection] = struct.unpack_from("Q", info, 200)[0]
        except OSError:
            continue
    return sent


def settled(read):
    """What `read` gives once it gives the same twice, a little apart: on a busy machine what was handed to the kernel waits to be sent."""
    found = read()
    for _ in range(100):
        time.sleep(0.05)
        last, found = found, read()
        if found == last:
            break
    return found


def update_bytes(world, data, parallel, deterministic=False, shard_size=None):
    """Bytes that one update sends, and the sizes of the model: (bytes, parameters, parameters of a block, blocks)."""
    step, microbatches = step_of(world, data, parallel, deterministic, embed_dim=96, batch_size=8, shard_size=shard_size)
    blocks = list(step.model.backbone.blocks)
    block = sum(each.numel() for each in blocks[0].parameters())
    step.run(microbatches)
    world.sums([0.0])
    before = settled(tcp_bytes_sent)
    world.sums([0.0])
    for _ in range(4):
        step.run(microbatches)
    world.sums([0.0])
    # Connections of an earlier job may be closed at any time: only those that are open at the end count.
    sent = sum(count - before.get(connection, 0) for connection, count in settled(tcp_bytes_sent).items())
    return sent / 4, sum(each.numel() for each in step.model.parameters()), block, len(blocks)


def hang_up(world, woken):
    """What the first process hears when the second hangs up, which stays with all its references until the file `woken` is there."""
    from cllm.distributed.failure import _library_message, close_connections, is_peer_error

    group = dist.group.WORLD
    world.sums([0.0])
    if world.rank == 1:
        close_connections()
        until = time.monotonic() + PATIENCE
        while not woken.exists() and time.monotonic() < until:
            time.sleep(0.02)
        return group is not None and woken.exists()
    try:
        world.sums([0.0])
    except RuntimeError as error:
        woken.touch()
        return is_peer_error(error), _library_message(error)
    return None


def not_answered(world):
    """What the first process hears after half a second without an answer from the second."""
    from datetime import timedelta

    from cllm.distributed.failure import _library_message, is_peer_error

    impatient = dist.new_group(timeout=timedelta(seconds=PATIENCE))
    world.sums([0.0], impatient)  # connections are made with that patience: on a busy machine half a second is not enough for them
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.5), impatient)
    heard = None
    if world.rank == 0:
        try:
            world.sums([0.0], impatient)
        except RuntimeError as error:
            heard = is_peer_error(error), _library_message(error)
    world.sums([0.0])
    return heard
