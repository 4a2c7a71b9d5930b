"""A server under load for minutes: `cllm serve` in a process of its own, 64 clients, one in a hundred requests hostile or left early.

    python profiling/serve_soak.py                           # 10 minutes, a model of random weights with 4 layers of 128
    python profiling/serve_soak.py --minutes 1 --clients 16

Before the load every question is asked once alone; under load each answer has to be the same text, so `wrong` counts tokens that others have
changed and `lost` counts requests without an answer. Memory and open files are those of the server's process; `growth` is what the second half of
the time has added. `refusal` is how long a malformed request waits for its 4xx while all others are being answered. `overhead` is the time of a
request through HTTP over the time of the same request in the engine, both alone, interleaved, before the load.
"""

import argparse
import asyncio
import json
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import plots
import psutil
import torch
from report import add_output_options, finish, print_table, run

from cllm import Model, ModelConfig, runtime, save
from cllm.config.sampling import Sampling
from cllm.data.tokens.tokenizer import Tokenizer
from cllm.generate.engine import Engine
from cllm.generate.request import Request

WORDS = "the river was wide and slow that year and nobody in the village knew where it came from or where it went".split()  # noqa: SIM905
HOSTILE = (
    b"{", b'{"prompt": NaN}', b"[" * 100_000, b'{"prompt": "a", "n": 1000000}', b'{"prompt": "a", "max_tokens": 1e9}', b'{"prompt": 7}',
    json.dumps({"prompt": "a", "stop": ["x"] * 10_000}).encode(), json.dumps({"prompt": "a" * 9_000_000}).encode(), b'{"prompt": "a", "prompt": "b"}',
    json.dumps({"prompt": "a", "logprobs": 1_000_000}).encode(), b"\xff\xfe\x00", b'{"prompt": "\\ud800"}',
)  # fmt: skip
SAMPLE_SECONDS = 1.0


def questions(number: int, seed: int) -> list[dict[str, Any]]:
    """Requests of many lengths and kinds: greedy and sampled, some with a common beginning."""
    draw = random.Random(seed)
    found = []
    for index in range(number):
        words = draw.choices(WORDS, k=draw.randrange(2, 60))
        prompt = " ".join((WORDS[:20] if index % 3 == 0 else []) + words)
        found.append({"prompt": prompt, "max_tokens": draw.randrange(1, 48), "temperature": draw.choice((0, 0.8)), "seed": index, "logprobs": 1})
    return found


def write_model(place: Path) -> None:
    tokenizer = Tokenizer.train([" ".join(WORDS) * 50], vocab_size=300)
    config = ModelConfig(vocab_size=tokenizer.vocab_size, embed_dim=128, num_layers=4, num_heads=4, max_seq_len=256, tie_embeddings=False)
    save(Model(config, seed=0), place, tokenizer=tokenizer)


class Server:
    """`cllm serve` in a process of its own."""

    def __init__(self, model: Path, threads: int | None) -> None:
        command = [sys.executable, "-m", "cllm", "serve", str(model), "--port", "0"] + ([] if threads is None else ["--threads", str(threads)])
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        assert self.process.stdout is not None
        while not (found := re.search(r"http://127\.0\.0\.1:(\d+)", line := self.process.stdout.readline())):
            if not line:
                raise SystemExit("the server has ended before it answered")
        self.port = int(found[1])
        self._seen = psutil.Process(self.process.pid)

    def memory(self) -> int:
        return int(self._seen.memory_info().rss)

    def open_files(self) -> int:
        return int(self._seen.num_fds())

    def close(self) -> None:
        self.process.terminate()
        self.process.wait(60)


async def ask(port: int, body: bytes, leave_after: float | None = None) -> tuple[int, Any]:
    """(status, object); leave_after: seconds after which the client is gone without a word -> (0, None)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    try:
        kind = "Host: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close"
        head = f"POST /v1/completions HTTP/1.1\r\n{kind}\r\nContent-Length: {len(body)}\r\n\r\n"
        try:
            writer.write(head.encode() + body)
            await writer.drain()
        except ConnectionError:
            pass  # a body that is too large is answered before it is read to its end
        if leave_after is not None:
            await asyncio.sleep(leave_after)
            return 0, None
        answer = await reader.read()
    finally:
        writer.close()
    head_, _, content = answer.partition(b"\r\n\r\n")
    status = int(head_.split(b" ", 2)[1])
    if b"chunked" in head_.lower():
        content = b"".join(content.split(b"\r\n")[1::2])
    return status, json.loads(content)


def texts_of(reply: Any) -> tuple[Any, ...]:
    """What must not depend on anybody else: the text and the log-probability of each of its tokens."""
    choice = reply["choices"][0]
    return choice["text"], choice["finish_reason"], tuple(choice["logprobs"]["token_logprobs"])


async def client(port: int, number: int, asked: list[tuple[bytes, tuple[Any, ...]]], until: float, seen: dict[str, Any]) -> None:
    draw = random.Random(number)
    while time.monotonic() < until:
        body, expected = draw.choice(asked)
        kind = draw.random()
        begun = time.perf_counter()
        try:
            if kind < 0.005:
                status, _ = await ask(port, draw.choice(HOSTILE))
                seen["refusals"].append(time.perf_counter() - begun)
                seen["count"]["not refused"] += not 400 <= status < 500
                continue
            if kind < 0.01:
                await ask(port, body, draw.uniform(0, 0.3))
                seen["count"]["left"] += 1
                continue
            status, reply = await ask(port, body)
        except (OSError, ValueError, IndexError, asyncio.IncompleteReadError):
            seen["count"]["lost"] += 1
            continue
        if status == 429:
            seen["count"]["told to wait"] += 1
            await asyncio.sleep(1)
        elif status != 200:
            seen["count"]["lost"] += 1
        else:
            seen["seconds"].append(time.perf_counter() - begun)
            seen["count"]["answered"] += 1
            seen["count"]["tokens"] += reply["usage"]["completion_tokens"]
            seen["count"]["wrong"] += texts_of(reply) != expected


async def soak(server: Server, options: argparse.Namespace) -> dict[str, Any]:
    asked = []
    for question in questions(options.questions, seed=1):
        body = json.dumps(question).encode()
        status, reply = await ask(server.port, body)
        if status != 200:
            raise SystemExit(f"a question was refused: {reply}")
        asked.append((body, texts_of(reply)))
    seen: dict[str, Any] = {"count": Counter(), "seconds": [], "refusals": []}
    until = time.monotonic() + 60 * options.minutes
    clients = [asyncio.create_task(client(server.port, number, asked, until, seen)) for number in range(options.clients)]
    memory, files = [], []
    while time.monotonic() < until:
        await asyncio.sleep(SAMPLE_SECONDS)
        memory.append(server.memory())
        files.append(server.open_files())
    await asyncio.gather(*clients)
    await asyncio.sleep(1)
    count, half = seen["count"], len(memory) // 2
    ordered = sorted(seen["seconds"])
    return {
        "work": f"{options.clients} clients, {options.minutes:g} minutes",
        **{name: count[name] for name in ("answered", "wrong", "lost", "told to wait", "left", "not refused", "tokens")},
        "tokens_per_second": count["tokens"] / (60 * options.minutes),
        "seconds_median": statistics.median(ordered),
        "seconds_99": ordered[int(0.99 * (len(ordered) - 1))],
        "refused": len(seen["refusals"]),
        "refusal_median": statistics.median(seen["refusals"]) if seen["refusals"] else None,
        "refusal_worst": max(seen["refusals"], default=None),
        "memory_bytes": memory[-1],
        "memory_growth_bytes": max(memory[half:]) - max(memory[:half]),
        "open_files_most": max(files),
        "open_files_after": server.open_files(),
    }


async def overhead(server: Server, model_path: Path, rounds: int) -> dict[str, Any]:
    """Seconds of one greedy request of 128 tokens through HTTP and in an engine of this process, in turn."""
    from cllm import load

    model, tokenizer = load(model_path)
    model.pack_()
    engine = Engine(model, vocab_size=tokenizer.vocab_size)
    prompt = " ".join(WORDS)
    tokens, seconds = tokenizer.encode(prompt), {"http": [], "engine": []}  # type: dict[str, list[float]]
    body = json.dumps({"prompt": prompt, "max_tokens": 128, "temperature": 0}).encode()
    for round_ in range(rounds + 1):
        begun = time.perf_counter()
        await ask(server.port, body)
        between = time.perf_counter()
        engine.submit(Request(tokens, 128, Sampling(temperature=0), on_token=lambda _, __: True))
        while engine.step():
            pass
        if round_:  # the first one warms up
            seconds["http"].append(between - begun)
            seconds["engine"].append(time.perf_counter() - between)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    return {"work": "128 tokens alone", **medians, "overhead": medians["http"] / medians["engine"] - 1}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=15, help="of the comparison with the engine")
    parser.add_argument("--threads", type=int)
    add_output_options(parser)
    options = parser.parse_args()
    plots.check(options.plot)
    with tempfile.TemporaryDirectory(prefix="cllm-soak-") as folder, runtime.use(threads=options.threads), torch.no_grad():
        model = Path(folder) / "soak.cllm"
        write_model(model)
        server = Server(model, options.threads)
        try:
            alone = asyncio.run(overhead(server, model, options.rounds))
            load = asyncio.run(soak(server, options))
        finally:
            server.close()
    rows = [alone, load]
    print_table(("of", "value"), [(name, f"{value:.4g}" if isinstance(value, float) else str(value)) for row in rows for name, value in row.items()])
    finish(
        options,
        rows,
        lambda path: plots.bars(path, "One request of 128 tokens", ["alone"], {each: [alone[each]] for each in ("engine", "http")}, "seconds"),
        options.threads,
    )


if __name__ == "__main__":
    run(main)
