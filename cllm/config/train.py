"""Every setting of a training run: its type, default, limits and one sentence of help, where each value came from, and TOML in and out.

Layers, later ones win: default < preset < file < flag < --set. What is still open after that (None) is derived by a printed rule in `resolve`.
Keys are unique over all sections, so that `learning_rate` and `optim.learning_rate` name the same setting.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import math
import operator
import tomllib
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm.config.model import ModelConfig
from cllm.config.schedule import KINDS, BatchRamp
from cllm.runtime.errors import UserError
from cllm.train.optimizers.base import OPTIMIZERS

DEFAULT_PRESET = "cllm-5m"


def setting(default: Any, help: str, *, above=None, at_least=None, below=None, at_most=None, choices=None, example=None, result=True) -> Any:
    """A field with help and limits. `result=False` marks what cannot change the weights (threads, logging): a resume may change it."""
    limits = {"above": above, "at_least": at_least, "below": below, "at_most": at_most, "choices": choices}
    return dataclasses.field(default=default, metadata={"help": help, "example": example, "result": result, **limits})


@dataclass(frozen=True)
class DataSection:
    path: str = setting("", "Folder or file to learn from, or a folder of packed tokens.", result=False)
    tokenizer: str = setting("bpe", "Tokenizer: bpe or char (trained on the data), or the path of a tokenizer.json.")
    vocab_size: int | None = setting(None, "Tokens of a new BPE tokenizer; chosen by the amount of text when open.", at_least=257, example=4096)
    val_fraction: float = setting(0.1, "Share of the documents kept for validation.", at_least=0.0, below=1.0, example=0.1)
    exclude: str = setting("", "Files and folders below path that are left out, separated by commas.")
    document_mask: bool = setting(True, "A token sees only its own document, never the one packed before it.")
    shuffle: str = setting(
        "epoch", "Order of the windows: epoch (each once per epoch), random (drawn with replacement) or none.", choices=("epoch", "random", "none")
    )


@dataclass(frozen=True)
class TrainSection:
    steps: int | None = setting(None, "Optimizer updates; derived from epochs when open.", at_least=1, example=1000)
    epochs: float | None = setting(None, "Passes over the training tokens; used when steps is open.", above=0.0, example=1)
    seq_len: int = setting(256, "Tokens of one training sequence.", at_least=1, example=256)
    batch_size: int = setting(16, "Sequences of one microbatch, that is of one forward pass.", at_least=1, example=16)
    grad_accum: int = setting(1, "Microbatches whose gradients are summed for one update.", at_least=1, example=1)
    precision: str = setting(
        "auto", "Numbers of the forward and backward; weights and optimizer stay float32.", choices=("auto", "fp32", "bf16", "fp16")
    )
    device: str = setting("auto", "Where to train: a GPU where there is one, or as asked.", choices=("auto", "cpu", "cuda"), result=False)
    recompute: str = setting(
        "auto", "What the backward computes again to save memory: auto is the least that fits.",
        choices=("auto", "none", "feed_forward", "blocks"), result=False,
    )  # fmt: skip
    threads: int | None = setting(None, "Upper limit of worker threads; any number gives the same bits.", at_least=1, example=2, result=False)
    seed: int = setting(0, "Seed of the initial weights and of the order of the data.", at_least=0, at_most=2**63 - 1, example=0)
    eval_every: int | None = setting(None, "Steps between evaluations of the whole validation split.", at_least=1, example=200, result=False)
    checkpoint_every: int | None = setting(None, "Steps between checkpoints.", at_least=1, example=200, result=False)
    keep: int = setting(2, "Newest checkpoints kept on disk; the best one is kept as well.", at_least=1, example=2, result=False)
    keep_every: int = setting(0, "Checkpoints of every so many steps are kept for good; 0 for none.", at_least=0, example=10000, result=False)
    async_checkpoint: bool = setting(True, "Write checkpoints while training goes on, from a copy of weights and moments.", result=False)
    sample_every: int = setting(0, "Steps between generated samples in samples.txt; 0 never generates.", at_least=0, example=500, result=False)
    patience: int = setting(0, "Stop after so many evaluations without a better validation loss; 0 never stops early.", at_least=0, example=5)
    restore_best: bool = setting(False, "End with the weights of the best evaluation instead of the last ones.", result=False)
    batch_ramp: int = setting(0, "Steps in which the microbatches of one update rise from 1 to grad_accum.", at_least=0, example=500)
    on_nonfinite: str = setting(
        "stop", "When a loss or gradient is NaN or infinite: stop, leave the step out, or go back to the last checkpoint and take other data.",
        choices=("stop", "skip", "rollback"), result=False,
    )  # fmt: skip
    on_spike: str = setting("warn", "When the loss jumps far above the last steps'.", choices=("warn", "stop", "rollback"), result=False)
    spike_sigmas: float = setting(
        12.0, "How many usual deviations above the median of the last 64 losses are a jump; 0 never.", at_least=0.0, example=12, result=False
    )
    on_gradient: str = setting("warn", "When the gradient explodes or vanishes.", choices=("warn", "stop", "rollback"), result=False)
    on_stall: str = setting("wait", "When nothing moves for log.watchdog_seconds: wait, or end the process.", choices=("wait", "stop"), result=False)
    parallel: str = setting(
        "ddp", "How several processes share the work: ddp (each holds the model), fsdp (sharded over all) or hybrid (sharded inside a node).",
        choices=("ddp", "fsdp", "hybrid"), result=False,
    )  # fmt: skip
    shard_size: int | None = setting(
        None, "Processes that hold one copy of the state in hybrid mode; the processes of one node when open.", at_least=1, example=8, result=False
    )
    deterministic: bool = setting(False, "Same bits for any number of processes and any cut of an update's sequences into microbatches.")
    unit: int = setting(1, "Sequences of one leaf of the deterministic sum, that is of one forward pass then.", at_least=1, example=4)
    timeout: float = setting(600.0, "Seconds that a process waits for the others before it ends.", above=0.0, example=600, result=False)
    overfit_one_batch: bool = setting(False, "Train on the first batch only: a set-up that works drives its loss below 0.1.")


@dataclass(frozen=True)
class OptimSection:
    optimizer: str = setting(
        "adamw",
        "adamw, muon (AdamW for embeddings and vectors), lion or schedule_free (AdamW without a decay of the learning rate).",
        choices=OPTIMIZERS,
    )
    learning_rate: float | None = setting(None, "Highest learning rate.", above=0.0, example="3e-4")
    min_lr: float | None = setting(None, "Learning rate at the end of the schedule, and the lowest at any time.", at_least=0.0, example="3e-5")
    warmup: int | None = setting(None, "Steps in which the learning rate rises to its highest value.", at_least=0, example=100)
    schedule: str = setting("cosine", "Shape of the decay after the warm-up.", choices=KINDS)
    plateau_factor: float = setting(0.5, "What the plateau schedule multiplies the learning rate with.", above=0.0, below=1.0, example=0.5)
    plateau_patience: int = setting(3, "Evaluations without a better loss before the plateau schedule acts.", at_least=1, example=3)
    weight_decay: float = setting(0.1, "Decoupled decay of matrices and embeddings; biases and norms have none.", at_least=0.0, example=0.1)
    beta1: float = setting(0.9, "Decay of the mean of gradients; Lion's share of it in a step.", at_least=0.0, below=1.0, example=0.9)
    beta2: float = setting(
        0.95, "Decay of AdamW's mean of squared gradients, and of Lion's momentum (0.99 when not given).", at_least=0.0, below=1.0, example=0.95
    )
    momentum: float = setting(0.95, "Decay of Muon's mean of gradients.", at_least=0.0, below=1.0, example=0.95)
    ema: float = setting(
        0.0, "Decay of an average of the weights, which is then evaluated and exported; 0 keeps none.", at_least=0.0, below=1.0, example=0.999
    )
    eps: float = setting(1e-8, "AdamW's guard against division by zero.", above=0.0, example="1e-8")
    grad_clip: float = setting(1.0, "Largest norm of the gradient of all weights together; 0 does not clip.", at_least=0.0, example=1.0)
    z_loss: float = setting(0.0, "Weight of the squared log-sum-exp that keeps logits small.", at_least=0.0, example="1e-4")
    label_smoothing: float = setting(0.0, "Probability mass that the target gives to all tokens alike.", at_least=0.0, below=1.0, example=0.1)


@dataclass(frozen=True)
class FinetuneSection:
    start_from: str = setting("", "Model to start from: a run, a .cllm file or a Hugging Face folder (--from); empty starts from nothing.")
    lora_rank: int = setting(0, "Rank of LoRA adapters, which alone are trained; 0 trains all weights.", at_least=0, example=8)
    lora_alpha: float = setting(0.0, "Adapters are multiplied by lora_alpha / lora_rank; 0 is twice the rank.", at_least=0.0, example=16)
    lora_targets: str = setting("all", "Matrices that get adapters: all of the blocks, or those of attention.", choices=("all", "attention"))


@dataclass(frozen=True)
class LogSection:
    metrics_every: int = setting(1, "Steps between two rows of metrics.jsonl.", at_least=1, example=1, result=False)
    layers_every: int = setting(
        50, "Steps between rows about each layer's gradient norm and update; 0 never.", at_least=0, example=50, result=False
    )  # fmt: skip
    classes: bool = setting(True, "With each evaluation: precision, recall and confusion of classes of tokens, calibration.", result=False)
    activations: bool = setting(False, "With each evaluation: the residual stream's mean, spread and largest value per block.", result=False)
    prometheus_port: int = setting(
        0, "Port of this machine where Prometheus finds the newest numbers; 0 none.", at_least=0, at_most=65535, example=9400, result=False
    )  # fmt: skip
    noise_scale_every: int = setting(0, "Steps between measurements of the gradient noise scale; 0 never.", at_least=0, example=10, result=False)
    tensorboard: bool = setting(True, "Write TensorBoard events where tensorboardX is installed.", result=False)
    watchdog_seconds: float = setting(300.0, "Print all threads' stacks when nothing moves for so long; 0 never.", at_least=0.0, result=False)


def _field_docs(schema: type) -> dict[str, str]:
    """The sentence under each field of a class, read from its source; empty where the source is not at hand."""
    try:
        body = ast.parse(inspect.getsource(schema)).body[0]
    except (OSError, SyntaxError):
        return {}
    assert isinstance(body, ast.ClassDef)
    pairs = zip(body.body, body.body[1:])
    return {
        each.target.id: " ".join(text.value.value.split())
        for each, text in pairs
        if isinstance(each, ast.AnnAssign)
        and isinstance(each.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def _model_section() -> type:
    """[model]: a preset, and every field of ModelConfig, open (None) until given. The vocabulary comes from the tokenizer."""
    hints, docs = typing.get_type_hints(ModelConfig), _field_docs(ModelConfig)
    preset_help = f"Named sizes to start from; {DEFAULT_PRESET} when no size is given."
    fields: list[tuple[str, Any, Any]] = [("preset", str | None, setting(None, preset_help))]
    fields += [
        (each.name, hints[each.name] | None, setting(None, docs.get(each.name, f"See ModelConfig.{each.name}.")))
        for each in dataclasses.fields(ModelConfig)
        if each.name != "vocab_size"
    ]
    return dataclasses.make_dataclass("ModelSection", fields, frozen=True)


ModelSection: Any = _model_section()
SECTIONS: dict[str, Any] = {
    "model": ModelSection, "data": DataSection, "train": TrainSection, "optim": OptimSection, "log": LogSection, "finetune": FinetuneSection,
}  # fmt: skip
FIELDS: dict[str, dataclasses.Field] = {f"{name}.{each.name}": each for name, section in SECTIONS.items() for each in dataclasses.fields(section)}
_HINTS: dict[str, Any] = {f"{name}.{key}": hint for name, section in SECTIONS.items() for key, hint in typing.get_type_hints(section).items()}
_MODEL_DEFAULTS = {f"model.{each.name}": each.default for each in dataclasses.fields(ModelConfig) if each.default is not dataclasses.MISSING}
_SHORT = {key.partition(".")[2]: key for key in FIELDS}
assert len(_SHORT) == len(FIELDS), "keys must be unique over all sections"


_FLAGS = {"start_from": "from"}  # a word of Python's own, which no field can be called


def full_key(key: str, source: str = "") -> str:
    """The `section.key` of a key with or without its section or written as a flag; UserError with the nearest name for an unknown one."""
    plain = key.removeprefix("--").replace("-", "_")
    if plain in FIELDS:
        return plain
    if plain in _SHORT:
        return _SHORT[plain]
    near = difflib.get_close_matches(plain, [*FIELDS, *_SHORT], n=1)
    hint = f" Did you mean {near[0]!r}?" if near else f" Sections: {', '.join(SECTIONS)}."
    raise UserError(f"unknown setting {key!r}{_from(source)}.{hint}")


def _from(source: str) -> str:
    return f" (from {source})" if source and source != "default" else ""


_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_LIMITS = {"above": (">", operator.gt), "at_least": (">=", operator.ge), "below": ("<", operator.lt), "at_most": ("<=", operator.le)}


def _checked(key: str, value: Any, source: str) -> Any:
    """The value in its declared type and inside its limits, or a UserError that says what was expected."""
    each, hint = FIELDS[key], _HINTS[key]
    name, meta = each.name, each.metadata
    accepted = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    advice = f" Use a value like {meta['example']}." if meta["example"] is not None else ""
    if value is None and type(None) in accepted:
        return None
    if isinstance(value, Path) and str in accepted:
        value = str(value)
    if type(value) is int and float in accepted and int not in accepted:
        value = float(value)
    if not any(type(value) is kind for kind in accepted if kind is not type(None)):
        words = " or ".join(_WORDS[kind] for kind in accepted if kind is not type(None))
        raise UserError(f"{name} must be {words}, got {value!r}{_from(source)}.{advice}")
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} must be a finite number, got {value!r}{_from(source)}.{advice}")
    for limit, (sign, fits) in _LIMITS.items():
        if meta[limit] is not None and not fits(value, meta[limit]):
            raise UserError(f"{name} must be {sign} {meta[limit]}, got {value!r}{_from(source)}.{advice}")
    if meta["choices"] and value not in meta["choices"]:
        near = difflib.get_close_matches(str(value), meta["choices"], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UserError(f"{name} must be one of {', '.join(meta['choices'])}, got {value!r}{_from(source)}.{hint}")
    return value


@dataclass(frozen=True, init=False)
class TrainConfig:
    """The settings of a run: `TrainConfig(steps=100, learning_rate=1e-3)`, or from layers with `TrainConfig.from_layers`."""

    model: Any
    data: DataSection
    train: TrainSection
    optim: OptimSection
    log: LogSection
    finetune: FinetuneSection
    sources: Mapping[str, str] = dataclasses.field(compare=False, repr=False)

    def __init__(self, *, sources: Mapping[str, str] | None = None, **values: Any) -> None:
        flat: dict[str, Any] = {}
        for key, value in values.items():
            if key in SECTIONS:
                items = value.items() if isinstance(value, Mapping) else dataclasses.asdict(value).items()
                flat.update({full_key(f"{key}.{name}", (sources or {}).get(key, "")): item for name, item in items})
            else:
                flat[full_key(key)] = value
        known = dict(sources or {})
        for key in FIELDS:
            known.setdefault(key, "argument" if key in flat and flat[key] != FIELDS[key].default else "default")
        for name, section in SECTIONS.items():
            mine = {key.partition(".")[2]: _checked(key, value, known[key]) for key, value in flat.items() if key.startswith(name + ".")}
            object.__setattr__(self, name, section(**mine))
        object.__setattr__(self, "sources", types.MappingProxyType({key: known[key] for key in FIELDS}))
        self._check_together()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sources": dict(self.sources)}

    def _check_together(self) -> None:
        """Limits that tie two settings together."""
        rate, low, steps, warmup = self.optim.learning_rate, self.optim.min_lr, self.train.steps, self.optim.warmup
        if rate is not None and low is not None and low > rate:
            origin = _from(self.sources["optim.min_lr"])
            raise UserError(f"min_lr must be <= learning_rate ({rate:g}), got {low:g}{origin}. Leave it open for learning_rate / 10.")
        if steps is not None and self.train.epochs is not None and not self.sources["train.steps"].startswith("derived"):
            raise UserError(f"steps and epochs exclude each other, got steps = {steps} and epochs = {self.train.epochs:g}. Give one of them.")
        if steps is not None and warmup is not None and warmup > steps:
            origin = _from(self.sources["optim.warmup"])
            raise UserError(f"warmup must be <= steps ({steps}), got {warmup}{origin}. Leave it open for a tenth of the steps.")
        for key in ("train.batch_ramp", "log.noise_scale_every"):
            if self[key] and self.train.grad_accum < 2:
                origin = _from(self.sources[key])
                raise UserError(f"{key} needs grad_accum of at least 2, got {self.train.grad_accum}{origin}. Set --grad-accum, or {key}=0.")
        if self.optim.ema and self.optim.optimizer == "schedule_free":
            raise UserError("optim.ema and the optimizer schedule_free exclude each other: schedule_free evaluates an average of its own.")

    # -- reading -----------------------------------------------------------------------------------------------------------

    def flat(self) -> dict[str, Any]:
        """`section.key` -> value, in the order of the schema."""
        return {key: getattr(getattr(self, key.partition(".")[0]), key.partition(".")[2]) for key in FIELDS}

    def __getitem__(self, key: str) -> Any:
        section, _, name = full_key(key).partition(".")
        return getattr(getattr(self, section), name)

    def describe(self) -> list[tuple[str, Any, str, str]]:
        """Rows (key, value, source, help): the effective configuration as it is printed."""
        return [(key, value, self.sources[key], FIELDS[key].metadata["help"]) for key, value in self.flat().items()]

    def differences(self, other: TrainConfig) -> list[str]:
        """One line for each setting that changes the weights and differs. What was derived here is left out: its inputs are compared instead."""
        # A run written before a setting existed ran with its default.
        here, there = ({key: _MODEL_DEFAULTS.get(key) if value is None else value for key, value in each.flat().items()} for each in (self, other))
        same_steps = self.train.steps == other.train.steps  # then it does not matter whether they were said in epochs
        measured = {"train.eval_every"} if self.optim.schedule == "plateau" else set()  # evaluations then set the learning rate
        return [
            f"{key}: {there[key]!r} there, {value!r} here{_from(self.sources[key])}"
            for key, value in here.items()
            if (FIELDS[key].metadata["result"] or key in measured)
            and value != there[key]
            and not self.sources[key].startswith("derived")
            and not (key == "train.epochs" and same_steps)
        ]

    # -- making ------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_layers(cls, *, file: str | Path | None = None, flags: Mapping[str, Any] | None = None, sets: Iterable[str] = ()) -> TrainConfig:
        """Defaults, then the TOML file, then flags (None = not given), then `section.key=value` texts; later ones win."""
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        layer_of: dict[str, int] = {}

        def put(layer: int, key: str, value: Any, source: str) -> None:
            key = full_key(key, source)
            # Whoever gives steps in a later layer replaces the epochs of an earlier one, and the other way round.
            other = {"train.steps": "train.epochs", "train.epochs": "train.steps"}.get(key)
            if other and layer_of.get(other, layer) < layer:
                values.pop(other), sources.pop(other)
            values[key], sources[key], layer_of[key] = _checked(key, value, source), source, layer

        if file is not None:
            for key, value in read_toml(file).items():
                put(0, key, value, f"file {file}")
        for key, value in (flags or {}).items():
            if value is not None:
                put(1, key, value, "DATA" if key == "data.path" else "--" + _FLAGS.get(key, key.rpartition(".")[2]).replace("_", "-").lstrip("-"))
        for text in sets:
            key, equals, value = text.partition("=")
            if not equals:
                raise UserError(f"--set needs section.key=value, got {text!r}. Write for example --set optim.beta2=0.99")
            put(2, key.strip(), _parse_value(value.strip()), f"--set {key.strip()}")
        return cls(sources=sources, **values)

    @classmethod
    def from_toml(cls, path: str | Path) -> TrainConfig:
        return cls.from_layers(file=path)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], sources: Mapping[str, str] | None = None) -> TrainConfig:
        """From what `to_dict` gave (a checkpoint's state)."""
        return cls(sources={key: source for key, source in (sources or {}).items() if key in FIELDS}, **values)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return {name: {key: value for key, value in dataclasses.asdict(getattr(self, name)).items() if value is not None} for name in SECTIONS}

    def replace(self, source: str, **values: Any) -> TrainConfig:
        """A copy with other values, all from `source`."""
        changed = {full_key(key): value for key, value in values.items()}
        return TrainConfig(sources={**self.sources, **dict.fromkeys(changed, source)}, **{**self.flat(), **changed})

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The model that these settings describe: the preset's sizes, then what [model] gives, with room for seq_len tokens."""
        given = {name: value for name, value in dataclasses.asdict(self.model).items() if value is not None and name != "preset"}
        preset = self.preset
        base = {} if preset is None else ModelConfig.preset(preset).to_dict()
        # What the preset derived from a size that is overridden here is derived anew.
        if {"embed_dim", "num_heads"} & given.keys():
            base.pop("head_dim", None)
        if "num_heads" in given:
            base.pop("num_kv_heads", None)
        if "embed_dim" in given:
            base.pop("ffn_dim", None)
        if "max_seq_len" not in given:
            base["max_seq_len"] = max(self.train.seq_len, base.get("max_seq_len", 0))
        elif given["max_seq_len"] < self.train.seq_len:
            origin = _from(self.sources["train.seq_len"])
            raise UserError(f"seq_len must be <= max_seq_len ({given['max_seq_len']}), got {self.train.seq_len}{origin}.")
        return ModelConfig.from_dict({**base, **given, "vocab_size": vocab_size})

    @property
    def preset(self) -> str | None:
        """The preset that gives the sizes: the named one, or the default one when [model] names no size at all."""
        sizes = ("embed_dim", "num_layers", "norm")
        return self.model.preset or (DEFAULT_PRESET if all(getattr(self.model, name) is None for name in sizes) else None)

    def resolve(self, model: ModelConfig, num_train_tokens: int) -> TrainConfig:
        """Every open value filled by its rule, which becomes the value's source; the model's sizes filled from `model`."""
        config = self._with_habits()
        described = self._describes(model)
        preset = ModelConfig.preset(self.preset).to_dict() if described and self.preset else {}
        for name, value in model.to_dict().items():
            key = f"model.{name}"
            if key in FIELDS and value is not None and config[key] != value:
                origin = "the model" if not described else "derived: from the sizes that were given"
                config = config.replace(f"preset {self.preset}" if value == preset.get(name) else origin, **{key: value})

        def derive(key: str, value: Any, rule: str) -> None:
            nonlocal config
            if config[key] is None:
                config = config.replace(f"derived: {rule}", **{key: value})

        tokens_per_microbatch = config.train.seq_len * config.train.batch_size
        tokens_per_step = tokens_per_microbatch * config.train.grad_accum
        ramp = BatchRamp(config.train.grad_accum, config.train.batch_ramp)
        if config.train.epochs is not None:
            passes = ramp.steps_for(math.ceil(config.train.epochs * num_train_tokens / tokens_per_microbatch))
            derive("train.steps", max(1, passes), f"epochs x {num_train_tokens:,} tokens / {tokens_per_step:,} tokens per step")
        parameters = model.num_parameters()
        wanted = min(20 * parameters, 4 * num_train_tokens)
        rule = "20 tokens per parameter (Hoffmann et al. 2022), at most 4 epochs (Muennighoff et al. 2023)"
        derive("train.steps", max(1, ramp.steps_for(math.ceil(wanted / tokens_per_microbatch))), rule)
        assert config.train.steps is not None
        steps = config.train.steps
        derive("train.eval_every", min(max(1, steps // 10), 1000), "a tenth of the steps, at most 1000")
        derive("train.checkpoint_every", config.train.eval_every, "eval_every")
        # Kaplan et al. 2020, equation D.1, fitted for Adam on 1 K to 1 B parameters; it would turn negative beyond 10 B.
        rate = max(1e-4, 0.003239 - 0.0001395 * math.log(parameters))
        rule = "0.003239 - 0.0001395 ln(parameters) (Kaplan et al. 2020)"
        if config.optim.optimizer == "lion":
            rate, rule = rate / 5, f"{rule} / 5 (3 to 10 times below AdamW's: Chen et al. 2023)"
        derive("optim.learning_rate", float(f"{rate:.3g}"), rule)
        assert config.optim.learning_rate is not None
        derive("optim.min_lr", config.optim.learning_rate / 10, "learning_rate / 10")
        derive("optim.warmup", min(steps // 10, 1000), "a tenth of the steps, at most 1000")
        if config.train.precision == "auto":
            precision, reason = _fastest_precision(config.train.device)
            config = config.replace(f"derived: {reason}", precision=precision)
        return config

    def _with_habits(self) -> TrainConfig:
        """The defaults that go with the optimizer where nothing was given."""
        config = self
        if self.optim.optimizer == "lion" and self.sources["optim.beta2"] == "default":
            config = config.replace("derived: Lion's own (Chen et al. 2023)", beta2=0.99)
        if self.optim.optimizer == "schedule_free" and self.sources["optim.schedule"] == "default":
            config = config.replace("derived: schedule_free averages instead of decaying", schedule="constant")
        return config

    def _describes(self, model: ModelConfig) -> bool:
        """Whether [model] is where this model's sizes come from, or a program built it on its own."""
        try:
            return self.model_config(model.vocab_size) == model
        except UserError:
            return False

    def adopt(self, stored: TrainConfig) -> TrainConfig:
        """On resume, what was derived here takes the stored run's value (a different machine may derive otherwise)."""
        config, there = self, stored.flat()
        for key, value in self.flat().items():
            if self.sources[key].startswith("derived") and FIELDS[key].metadata["result"] and value != there[key]:
                config = config.replace("derived: stored in the run", **{key: there[key]})
        return config

    def to_toml(self) -> str:
        """A file that `from_toml` reads back to the same values, with the help and the source of each as comments."""
        lines = []
        for name, section in SECTIONS.items():
            lines.append(f"[{name}]")
            for each in dataclasses.fields(section):
                key, value = f"{name}.{each.name}", getattr(getattr(self, name), each.name)
                if key == "train.epochs" and self.train.steps is not None:
                    value = None  # steps already hold what the epochs came to
                if value is None and name == "model":
                    continue
                source = "" if self.sources[key] == "default" else f" [{self.sources[key]}]"
                comment = f"  # {each.metadata['help']}{source}".replace("\n", " ")
                lines.append(f"{each.name} = {_toml_value(value)}{comment}" if value is not None else f"# {each.name} ={comment}")
            lines.append("")
        return "\n".join(lines)


def _fastest_precision(asked: str) -> tuple[str, str]:
    """bf16 where the device multiplies bf16 tiles in hardware (on vector units alone bf16 is no faster than fp32); fp16 on older GPUs; else fp32."""
    from cllm.runtime import compiler
    from cllm.runtime.device import resolve
    from cllm.runtime.gpu import gpu_of

    device, _ = resolve(asked)
    if device.type == "cuda":
        gpu = gpu_of(device)
        old = gpu.vendor == "nvidia" and gpu.arch < 80
        return ("fp16", "this GPU multiplies fp16 tiles, not bf16") if old else ("bf16", "this GPU multiplies bf16 tiles in hardware")
    if "amx_bf16" in compiler.cpu_features():
        return "bf16", "this machine multiplies bf16 tiles in hardware"
    return "fp32", "this machine gains nothing from bf16"


def _parse_value(text: str) -> Any:
    """The text of --set as a TOML value; a bare word is text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    escapes = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}
    return '"' + "".join(escapes.get(c, c if ord(c) >= 32 and ord(c) != 127 else f"\\u{ord(c):04x}") for c in str(value)) + '"'


def read_toml(path: str | Path) -> dict[str, Any]:
    """`section.key` -> value of a TOML file with sections, at most two levels deep."""
    try:
        with open(path, "rb") as file:
            tree = tomllib.load(file)
    except OSError as error:
        raise UserError(f"cannot read the configuration {str(path)!r}: {error.strerror or error}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{str(path)!r} is not valid TOML: {error}.") from error
    values: dict[str, Any] = {}
    for section, content in tree.items():
        if section not in SECTIONS or not isinstance(content, dict):
            near = difflib.get_close_matches(section, SECTIONS, n=1)
            hint = f" Did you mean [{near[0]}]?" if near else f" Put it under one of [{'], ['.join(SECTIONS)}]."
            raise UserError(f"{str(path)!r}: unknown section {section!r}.{hint}")
        for key, value in content.items():
            if isinstance(value, dict):
                raise UserError(f"{str(path)!r}: [{section}.{key}] is too deep: a configuration has sections and keys, nothing below.")
            values[full_key(f"{section}.{key}", f"file {path}")] = value
    return values
