"""What training on 1 to 1024 GPUs would send and hold: a plan from formulae, without a GPU.

    python profiling/scale_plan.py --preset cllm-1b --gpus-per-node 8
    python profiling/scale_plan.py --preset cllm-350m --parallel ddp --json

Sources. Bytes sent by a ring: an all-gather or reduce-scatter of n bytes over s processes sends (s - 1) / s n from each, an all-reduce both of
them (Thakur, Rabenseifner & Gropp 2005; Patarasuk & Yuan 2009). What is sharded and what that sends: Rajbhandari et al. 2020 (arXiv 1910.02054),
Zhao et al. 2023 (arXiv 2304.11277). State: float32 weights, gradients and two moments of AdamW. Floating-point operations: `flops_per_token`
of the model. Speeds of links and of the GPU are arguments; their defaults are NVIDIA's data sheets of the H200 (NVLink 900 GB/s both ways) and of
ConnectX-7 (400 Gbit/s). No latency, no congestion and no overlap is modelled beyond "communication hides behind computation, or it does not".
`tests/cllm/distributed/test_scale_plan.py` holds bytes and state against what two to four processes measure.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import asdict, dataclass

from cllm.config.model import ModelConfig
from cllm.runtime import tree

FLOAT = 4  # bytes
COUNTS = tuple(2**power for power in range(11))


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model: all, those of one block, and the number of blocks. The rest is the root unit (embedding, output, last norm)."""

    parameters: int
    block: int
    num_blocks: int

    @classmethod
    def of(cls, config: ModelConfig) -> Sizes:
        import torch

        from cllm.model.model import Model

        with torch.device("meta"):
            model = Model(config)
        blocks = list(model.backbone.blocks)
        return cls(model.num_parameters(), sum(each.numel() for each in blocks[0].parameters()), len(blocks))

    @property
    def root(self) -> int:
        return self.parameters - self.block * self.num_blocks


def ring(processes: int, size: float) -> float:
    """Bytes that each process sends in an all-gather or reduce-scatter of `size` bytes."""
    return (processes - 1) / processes * size


def shards(parallel: str, processes: int, shard_size: int) -> int:
    """Over how many processes the state is cut up."""
    if parallel == "fsdp":
        return processes
    return min(shard_size, processes) if parallel == "hybrid" else 1


def state_bytes(sizes: Sizes, parallel: str, processes: int, shard_size: int = 8) -> float:
    """Weights and moments that a process holds between updates."""
    return 3 * FLOAT * sizes.parameters / shards(parallel, processes, shard_size)


def working_bytes(sizes: Sizes, parallel: str, processes: int, shard_size: int = 8) -> float:
    """Gradients, and where the state is sharded the whole weights of the root and of two blocks (one at work, one on its way), with their
    gradients. Activations are not in it: `cllm train --plan` tells those."""
    cut = shards(parallel, processes, shard_size)
    whole = 0 if cut == 1 else 2 * FLOAT * (sizes.root + min(2, sizes.num_blocks) * sizes.block)
    return FLOAT * sizes.parameters / cut + whole


def sent_bytes(
    sizes: Sizes,
    parallel: str,
    processes: int,
    rounds: int = 1,
    shard_size: int = 8,
    *,
    subtrees: float | None = None,
    gloo: bool = False,
) -> tuple[float, float]:
    """Bytes that a process sends in one update with `rounds` microbatches of its own: (inside a shard group, between copies).

    `subtrees`: of the deterministic sum, how many complete subtrees a process's leaves make up (1 where all counts are powers of two).
    `gloo`: on a CPU a reduce-scatter is an all-reduce of which each keeps its part (not in the deterministic mode, which exchanges leaves).
    """
    cut = shards(parallel, processes, shard_size)
    copies = processes // cut
    total = FLOAT * sizes.parameters
    if cut == 1:
        if subtrees is not None:
            return 0.0, ring(processes, subtrees * total) + ring(processes, total)
        return 0.0, 2 * ring(processes, total)
    # Forward and backward gather the blocks; the root stays whole between them. Gradients are summed after each microbatch.
    gathers = total + FLOAT * sizes.block * sizes.num_blocks
    sums = total * (2 if gloo else 1)
    return rounds * ring(cut, gathers + sums), rounds * 2 * ring(copies, total / cut)


def mean_subtrees(leaves: int, processes: int) -> float:
    """Complete subtrees of the deterministic sum that a process holds, on average."""
    cuts = [leaves * rank // processes for rank in range(processes + 1)]
    return sum(len(tree.subtrees(first, last)) for first, last in itertools.pairwise(cuts)) / processes


@dataclass(frozen=True)
class Row:
    gpus: int
    state_gb: float
    working_gb: float
    sent_gb: float
    compute_ms: float
    communication_ms: float
    efficiency: float
    tokens_per_second: float


def plan(config: ModelConfig, arguments: argparse.Namespace) -> list[Row]:
    """One row for each number of GPUs, each with the same work (weak scaling)."""
    sizes, rows = Sizes.of(config), []
    tokens = arguments.batch_size * arguments.seq_len * arguments.rounds
    compute = tokens * config.flops_per_token(arguments.seq_len) / (arguments.teraflops * 1e12 * arguments.utilisation)
    for gpus in COUNTS:
        size = (sizes, arguments.parallel, gpus)
        inside, between = sent_bytes(*size, arguments.rounds, arguments.gpus_per_node)
        cut = shards(arguments.parallel, gpus, arguments.gpus_per_node)
        # A ring that leaves the node is as fast as its slowest link.
        links = [arguments.node_gbs if span > arguments.gpus_per_node else arguments.gpu_gbs for span in (cut, gpus)]
        communication = inside / (links[0] * 1e9) + between / (links[1] * 1e9)
        slowest = max(compute, communication)  # hidden behind the computation as far as it goes
        rows.append(
            Row(
                gpus,
                state_bytes(*size, arguments.gpus_per_node) / 1e9,
                working_bytes(*size, arguments.gpus_per_node) / 1e9,
                (inside + between) / 1e9,
                1e3 * compute,
                1e3 * communication,
                compute / slowest,
                gpus * tokens / slowest,
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="cllm-1b")
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--parallel", choices=("ddp", "fsdp", "hybrid"), default="hybrid")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences of a microbatch")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=1, help="microbatches of one GPU in one update")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--gpu-gbs", type=float, default=450.0, help="GB/s that a GPU sends inside a node (NVLink of the H200: 450 each way)")
    parser.add_argument("--node-gbs", type=float, default=50.0, help="GB/s that a GPU sends to another node (400 Gbit/s)")
    parser.add_argument("--teraflops", type=float, default=989.0, help="peak of one GPU in bf16, dense (H200: 989)")
    parser.add_argument("--utilisation", type=float, default=0.4, help="share of the peak that computation reaches (an assumption)")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    config = ModelConfig.from_dict({**ModelConfig.preset(arguments.preset).to_dict(), "vocab_size": arguments.vocab_size})
    rows = plan(config, arguments)
    if arguments.json:
        print(json.dumps({"settings": vars(arguments), "rows": [asdict(row) for row in rows]}))
        return
    print(f"{arguments.preset}, {arguments.parallel}: a plan, not a measurement. Memory and bytes are those of one GPU; bytes of one update.")
    print(f"{'GPUs':>5} {'state GB':>9} {'working GB':>11} {'sent GB':>8} {'compute ms':>11} {'network ms':>11} {'efficiency':>11} {'tokens/s':>12}")
    for row in rows:
        print(
            f"{row.gpus:>5} {row.state_gb:>9.2f} {row.working_gb:>11.2f} {row.sent_gb:>8.2f} {row.compute_ms:>11.1f} {row.communication_ms:>11.1f} "
            f"{100 * row.efficiency:>9.0f} % {row.tokens_per_second:>12,.0f}"
        )


if __name__ == "__main__":
    main()
