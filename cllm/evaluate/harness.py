"""EleutherAI's lm-evaluation-harness on a CLLM model: importing this module registers the model "cllm".

    import lm_eval, cllm.evaluate.harness
    lm_eval.simple_evaluate(model="cllm", model_args="checkpoint=runs/demo", tasks=["my_task"])

or `cllm evaluate runs/demo --tasks my_task --task-path tasks/`. Numbers follow the harness's own rules for causal models: the context loses its
beginning when it is too long, an empty context is the end-of-text token, and a rolling log-likelihood gives every window all the context that
fits. It needs the package lm_eval (extra [eval]).
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cllm import runtime
from cllm.config.sampling import SAMPLING
from cllm.data.tokens.batch import IGNORE
from cllm.generate.decoding import generate
from cllm.runtime.errors import DataError, UserError
from cllm.runtime.progress import say

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model

    _missing = ""
except ImportError as missing:  # the module can still be imported; its first use says what to install
    TemplateLM, _missing = object, f"lm-evaluation-harness cannot be used ({missing}). Install it: pip install 'cllm[eval]'"

    def register_model(*names: str) -> Any:
        return lambda model: model


if TYPE_CHECKING:
    from cllm.data.tokens.tokenizer import Tokenizer
    from cllm.model.model import Model

MAX_GEN_TOKENS = 256  # the harness's default
_SAMPLING = tuple(name for name in SAMPLING if name != "temperature")


@register_model("cllm")
class CLLM(TemplateLM):
    """A checkpoint (any path that `cllm.load` takes), or a model with its tokenizer, as a model of the harness."""

    def __init__(
        self,
        checkpoint: str = "",
        *,
        model: Model | None = None,
        tokenizer: Tokenizer | None = None,
        batch_size: int | str | None = 8,
        device: str | None = None,
        weights: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:
        _check_installed()
        super().__init__()
        if model is None:
            model, tokenizer = _load(checkpoint, weights, device)
        if tokenizer is None:
            raise UserError("a model needs its tokenizer to be evaluated: CLLM(model=model, tokenizer=tokenizer).")
        self.model, self.text = model, tokenizer  # `tokenizer` would be taken for one of transformers'
        # "auto" is the harness's word for "as many as fit"
        self.batch_size = batch_size if isinstance(batch_size, int) else int(batch_size) if batch_size and batch_size.isdigit() else 8
        self.max_length = model.config.max_seq_len
        self._prefix = self._start_token()

    @property
    def eot_token_id(self) -> int:
        """What an empty context becomes: end-of-text, or a line end where the tokenizer has none (`cllm train` samples from there too)."""
        return self._prefix

    @property
    def tokenizer_name(self) -> str:
        """Part of the key under which the harness caches requests."""
        return f"cllm-{self.text.hash}"

    def _start_token(self) -> int:
        if self.text.eot_id is not None:
            return self.text.eot_id
        try:
            return int(self.text.encode("\n")[0])
        except (UserError, IndexError):
            raise UserError("this tokenizer has neither an end-of-text token nor a line end, so a text without a context cannot be scored.") from None

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Text to ids; CLLM's tokenizers add nothing at the beginning."""
        return list(self.text.encode(string))

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        pairs = [(context, continuation) for _, context, continuation in requests]
        results = self._score(pairs, "scoring continuations")
        for (key, _, _), result in zip(requests, results):
            self.cache_hook.add_partial("loglikelihood", key, result)
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Nats (negative) of whole texts, each token predicted once."""
        texts = [request.args[0] for request in requests]
        results = [nats for nats, _ in self._score([([self.prefix_token_id], self.tok_encode(text)) for text in texts], "scoring texts")]
        for request, result in zip(requests, results):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, result)
        return results

    @torch.no_grad()
    def _score(self, pairs: Sequence[tuple[list[int], list[int]]], label: str) -> list[tuple[float, bool]]:
        """For each (context, continuation): log-likelihood of the continuation in nats, and whether greedy decoding would write it."""
        windows = [(index, *window) for index, pair in enumerate(pairs) for window in _windows(*pair, self.max_length)]
        windows.sort(key=lambda window: -len(window[1]))  # batches of similar length, the largest first
        num_tokens = sum(len(inputs) for _, inputs, _ in windows)  # which, unlike windows, take about the same time each
        done = 0
        nats, greedy = [0.0] * len(pairs), [True] * len(pairs)
        device = self.model.embedding_weight.device
        with runtime.progress.Progress(num_tokens, label) as line:
            for first in range(0, len(windows), self.batch_size):
                batch = windows[first : first + self.batch_size]
                shape = len(batch), len(batch[0][1])
                tokens, targets = torch.zeros(shape, dtype=torch.int64), torch.full(shape, IGNORE)
                for row, (_, inputs, wanted) in enumerate(batch):  # filled up on the right, which causal attention never sees
                    tokens[row, : len(inputs)] = torch.tensor(inputs)
                    targets[row, len(inputs) - len(wanted) : len(inputs)] = torch.tensor(wanted)
                _, stats = self.model.loss(tokens.to(device), targets.to(device), return_stats=True)
                losses = stats.losses.reshape(shape).double().sum(dim=1).tolist()
                hits = stats.correct.reshape(shape).sum(dim=1).tolist()
                for (index, _, wanted), loss, hit in zip(batch, losses, hits):
                    nats[index] -= loss
                    greedy[index] = greedy[index] and hit == len(wanted)
                done += sum(len(inputs) for _, inputs, _ in batch)
                line.update(done, f"{first + len(batch):,} of {len(windows):,} windows")
        return list(zip(nats, greedy))

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Continuations of each context up to a stop text, greedy unless the task asks for sampling."""
        results = []
        for request in runtime.progress.track(requests, len(requests), "writing continuations"):
            context, options = request.args
            text = self._continue(context, dict(options))
            self.cache_hook.add_partial("generate_until", request.args, text)
            results.append(text)
        return results

    def _continue(self, context: str, options: dict[str, Any]) -> str:
        until = options.pop("until", None) or ()
        max_tokens = int(options.pop("max_gen_toks", MAX_GEN_TOKENS))
        do_sample, temperature = options.pop("do_sample", None), float(options.pop("temperature", 0.0))
        if do_sample and temperature == 0.0:
            temperature = 1.0
        sampling = {name: options.pop(name) for name in _SAMPLING if name in options}
        if options:
            raise UserError(f"the task asks for {', '.join(sorted(options))}, which CLLM's generation does not have. Known: {', '.join(_SAMPLING)}.")
        # Room for the continuation, so that the context need not slide; but never less than half of it.
        room = max(self.max_length - max_tokens, self.max_length // 2, 1)
        start = (self.tok_encode(context) or [self.prefix_token_id])[-room:]
        stop = [until] if isinstance(until, str) else [text for text in until if text]
        return generate(
            self.model, self.text, start, max_tokens=max_tokens, temperature=0.0 if do_sample is False else temperature, stop=stop, **sampling
        )[0].text


def _windows(context: list[int], continuation: list[int], max_length: int) -> Iterator[tuple[list[int], list[int]]]:
    """(inputs, targets of the last inputs): each token of the continuation once, with all the context that max_length inputs hold."""
    tokens, first = [*context, *continuation], len(context)
    while first < len(tokens):
        end = min(len(tokens), first + max_length)
        yield tokens[max(0, end - 1 - max_length) : end - 1], tokens[first:end]
        first = end


def _check_installed() -> None:
    if _missing:
        raise UserError(_missing)


def _load(checkpoint: str, weights: str | None, device: str | None) -> tuple[Any, Any]:
    from cllm.checkpoint.model_file import load
    from cllm.runtime.device import resolve

    if not checkpoint:
        raise UserError('say which model: model_args="checkpoint=runs/demo".')
    place, _ = resolve(device or "auto")
    model, tokenizer = load(checkpoint, say, weights)
    return model.to(place), tokenizer


def check_request(tasks: list[str], task_path: Path | None) -> None:
    """UserError for what can be refused before a model is loaded: no harness, no folder of tasks, no task."""
    _check_installed()
    if task_path is not None and not task_path.is_dir():
        raise UserError(f"--task-path must be a folder of task files (YAML), got {task_path}.")
    if not tasks:
        raise UserError("no task is named. Give some, as in --tasks my_task,other_task.")


def run_tasks(model: Model, tokenizer: Tokenizer, tasks: list[str], task_path: Path | None = None, batch_size: int = 8) -> dict[str, dict[str, Any]]:
    """Figures of each task, {task: {"acc,none": 0.5, ...}}. Data may be downloaded unless HF_HUB_OFFLINE=1 was set, as `cllm evaluate` does.

    Raises UserError for an unknown task, DataError for a task whose data is not here.
    """
    check_request(tasks, task_path)
    with runtime.progress.stage("reading lm-evaluation-harness and its tasks"):
        try:
            import lm_eval
            from lm_eval.tasks import TaskManager
        except ImportError as error:  # a part of it that only tasks need
            raise UserError(f"lm-evaluation-harness cannot run tasks ({error}). Install it: pip install 'cllm[eval]'") from error
        manager = TaskManager(include_path=None if task_path is None else str(task_path))
    for name in tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=3)
            meant = f" Did you mean {', '.join(near)}?" if near else ""
            raise UserError(f"unknown task {name!r}.{meant} Your own tasks come from --task-path FOLDER.")
    try:
        found = lm_eval.simple_evaluate(
            model=CLLM(model=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=list(tasks),
            task_manager=manager,
            bootstrap_iters=1000,
            log_samples=False,
        )
    except OSError as error:  # what datasets raises for files that are not here and for hubs that it may not ask
        if os.environ.get("HF_HUB_OFFLINE") != "1":
            raise
        words = " ".join(str(error).split())[:300]
        raise DataError(f"the data of {', '.join(tasks)} is not on this machine: {words} Set HF_HUB_OFFLINE=0 to let it be downloaded.") from error
    assert found is not None  # only other ranks of a distributed run get None
    return {name: {key: value for key, value in figures.items() if key != "alias"} for name, figures in found["results"].items()}
