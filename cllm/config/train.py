"""`TrainConfig`: the settings of one run, where each value came from, and the rules by which open ones are filled.

Layers, later ones win: default < preset < file < flag < --set. What is still open after that (None) is derived by a printed rule in `resolve`.
"""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cllm.config.evaluation_plan import least_eval_every
from cllm.config.model import ModelConfig
from cllm.config.pace import Pace
from cllm.config.presets import architecture
from cllm.config.schedule import BatchRamp
from cllm.config.schema import (
    DEFAULT_PRESET,
    MODEL_DEFAULTS,
    SECTIONS,
    SETTINGS,
    DataSection,
    FinetuneSection,
    LogSection,
    OptimSection,
    TrainSection,
    full_key,
)
from cllm.config.setting import origin
from cllm.config.toml import read_toml, write_toml
from cllm.runtime.errors import UserError

_INSTEAD = {"train.steps": "train.epochs", "train.epochs": "train.steps", "train.hours": "train.minutes", "train.minutes": "train.hours"}
TENTH = "a tenth of the steps, at most 1000"


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
        for key in SETTINGS:
            known.setdefault(key, "argument" if key in flat and flat[key] != SETTINGS[key].default else "default")
        for name, section in SECTIONS.items():
            mine = {key.partition(".")[2]: SETTINGS[key].checked(value, known[key]) for key, value in flat.items() if key.startswith(name + ".")}
            object.__setattr__(self, name, section(**mine))
        object.__setattr__(self, "sources", types.MappingProxyType({key: known[key] for key in SETTINGS}))
        self._check_together()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sources": dict(self.sources)}

    def _check_together(self) -> None:
        """Limits that tie two settings together."""
        rate, low, steps, warmup = self.optim.learning_rate, self.optim.min_lr, self.train.steps, self.optim.warmup
        if rate is not None and low is not None and low > rate:
            given_by = origin(self.sources["optim.min_lr"])
            raise UserError(f"min_lr must be <= learning_rate ({rate:g}), got {low:g}{given_by}. Leave it out for learning_rate / 10.")
        if steps is not None and self.train.epochs is not None and not self.sources["train.steps"].startswith("derived"):
            raise UserError(f"steps and epochs exclude each other, got steps = {steps} and epochs = {self.train.epochs:g}. Give one of them.")
        if self.train.hours is not None and self.train.minutes is not None:
            raise UserError(f"hours and minutes exclude each other, got {self.train.hours:g} and {self.train.minutes:g}. Give one of them.")
        if self.seconds is not None and self.train.pace is None and steps is not None and not self.sources["train.steps"].startswith("derived"):
            given_by = origin(self.sources["train.steps"])
            raise UserError(f"steps and {self._budget_name} exclude each other, got steps = {steps}{given_by}. Give one of them.")
        if self.train.pace is not None:
            Pace.of_text(self.train.pace)  # raises
        if steps is not None and warmup is not None and warmup > steps and self.seconds is None:
            given_by = origin(self.sources["optim.warmup"])
            raise UserError(f"warmup must be <= steps ({steps}), got {warmup}{given_by}. Leave it out for a tenth of the steps.")
        for key in ("train.batch_ramp", "log.noise_scale_every"):
            if self[key] and self.train.grad_accum < 2:
                given_by = origin(self.sources[key])
                raise UserError(f"{key} needs grad_accum of at least 2, got {self.train.grad_accum}{given_by}. Set --grad-accum, or {key}=0.")
        if self.optim.ema and self.optim.optimizer == "schedule_free":
            raise UserError("optim.ema and the optimizer schedule_free exclude each other: schedule_free evaluates an average of its own.")

    # -- reading -----------------------------------------------------------------------------------------------------------

    @property
    def seconds(self) -> float | None:
        """How long the run may take; None where steps or epochs say when it ends."""
        if self.train.hours is not None:
            return 3600 * self.train.hours
        return None if self.train.minutes is None else 60 * self.train.minutes

    @property
    def _budget_name(self) -> str:
        return "minutes" if self.train.hours is None else "hours"

    @property
    def clocked(self) -> bool:
        """Whether the clock decides when the run ends: it has a time, and no record of an earlier run that it follows."""
        return self.seconds is not None and (self.train.pace is None or self.sources["train.pace"].startswith("derived"))

    def flat(self) -> dict[str, Any]:
        """`section.key` -> value, in the order of the schema."""
        return {key: getattr(getattr(self, key.partition(".")[0]), key.partition(".")[2]) for key in SETTINGS}

    def __getitem__(self, key: str) -> Any:
        section, _, name = full_key(key).partition(".")
        return getattr(getattr(self, section), name)

    def describe(self) -> list[tuple[str, Any, str, str]]:
        """Rows (key, value, source, help): the effective configuration as it is printed."""
        return [(key, value, self.sources[key], SETTINGS[key].help) for key, value in self.flat().items()]

    def differences(self, other: TrainConfig, apart_from: Container[str] = ()) -> list[str]:
        """One line for each setting that changes the weights and differs, except for the keys `apart_from`.

        What was derived here is left out: its inputs are compared instead.
        """
        # A run written before a setting existed ran with its default.
        here, there = ({key: MODEL_DEFAULTS.get(key) if value is None else value for key, value in each.flat().items()} for each in (self, other))
        same_steps = self.train.steps == other.train.steps  # then it does not matter whether they were said in epochs
        measured = {"train.eval_every"} if self.optim.schedule == "plateau" else set()  # evaluations then set the learning rate
        return [
            f"{key}: {there[key]!r} there, {value!r} here{origin(self.sources[key])}"
            for key, value in here.items()
            if (SETTINGS[key].result or key in measured)
            and key not in apart_from
            and value != there[key]
            and not self.sources[key].startswith("derived")
            and not (key == "train.epochs" and same_steps)
        ]

    # -- making ------------------------------------------------------------------------------------------------------------

    @classmethod
    def from_layers(cls, *, file: str | Path | None = None, flags: Mapping[str, Any] | None = None, sets: Iterable[str] = ()) -> TrainConfig:
        """Defaults, then the TOML file, then flags (text or value; None = not given), then `section.key=value` texts; later ones win."""
        values: dict[str, Any] = {}
        sources: dict[str, str] = {}
        layer_of: dict[str, int] = {}

        def put(layer: int, key: str, value: Any, source: str) -> None:
            key = full_key(key, source)
            # Whoever gives steps in a later layer replaces the epochs of an earlier one, and the other way round; hours and minutes likewise.
            other = _INSTEAD.get(key)
            if other and layer_of.get(other, layer) < layer:
                values.pop(other), sources.pop(other)
            values[key], sources[key], layer_of[key] = SETTINGS[key].checked(value, source), source, layer

        if file is not None:
            for key, value in read_toml(file).items():
                put(0, key, value, f"file {file}")
        for key, value in (flags or {}).items():
            if value is not None:
                key = full_key(key)
                source = "DATA" if key == "data.path" else SETTINGS[key].option
                put(1, key, SETTINGS[key].read(value, source) if isinstance(value, str) else value, source)
        for text in sets:
            key, equals, value = text.partition("=")
            if not equals or not key.strip():
                raise UserError(f"--set needs section.key=value, got {text!r}. Write for example --set optim.beta2=0.99")
            source = f"--set {key.strip()}"
            key = full_key(key.strip(), source)
            put(2, key, SETTINGS[key].parse(value, quotes=True), source)
        return cls(sources=sources, **values)

    @classmethod
    def from_toml(cls, path: str | Path) -> TrainConfig:
        return cls.from_layers(file=path)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], sources: Mapping[str, str] | None = None) -> TrainConfig:
        """From what `to_dict` gave (a checkpoint's state)."""
        return cls(sources={key: source for key, source in (sources or {}).items() if key in SETTINGS}, **values)

    def to_dict(self) -> dict[str, dict[str, Any]]:
        return {name: {key: value for key, value in dataclasses.asdict(getattr(self, name)).items() if value is not None} for name in SECTIONS}

    def replace(self, source: str, **values: Any) -> TrainConfig:
        """A copy with other values, all from `source`."""
        changed = {full_key(key): value for key, value in values.items()}
        return TrainConfig(sources={**self.sources, **dict.fromkeys(changed, source)}, **{**self.flat(), **changed})

    def model_config(self, vocab_size: int) -> ModelConfig:
        """The model that these settings describe: the preset's sizes, then what [model] gives, with room for seq_len tokens."""
        names = {each.name for each in dataclasses.fields(ModelConfig)}
        given = {name: value for name, value in dataclasses.asdict(self.model).items() if value is not None and name in names}
        preset = self.preset
        base = {} if preset is None else ModelConfig.preset(preset).to_dict()
        # What the preset derived from a size that is overridden here is derived anew.
        if {"embed_dim", "num_heads"} & given.keys():
            base.pop("head_dim", None)
        if "embed_dim" in given and not {"num_heads", "head_dim"} & given.keys():
            base["num_heads"] = _heads(given["embed_dim"], base.get("num_heads", ModelConfig.num_heads))
        if "num_heads" in given or base.get("num_heads", 0) % base.get("num_kv_heads", 1):
            base.pop("num_kv_heads", None)
        if "embed_dim" in given:
            base.pop("ffn_dim", None)
        if "max_seq_len" not in given:
            base["max_seq_len"] = max(self.train.seq_len, base.get("max_seq_len", 0))
        elif given["max_seq_len"] < self.train.seq_len:
            given_by = origin(self.sources["train.seq_len"])
            raise UserError(f"seq_len must be <= max_seq_len ({given['max_seq_len']}), got {self.train.seq_len}{given_by}.")
        return ModelConfig.from_dict({**base, **architecture(self.model.architecture, vocab_size), **given, "vocab_size": vocab_size})

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
        changed = architecture(self.model.architecture, model.vocab_size) if described else {}
        for name, value in model.to_dict().items():
            key = f"model.{name}"
            if key in SETTINGS and value is not None and config[key] != value:
                origin = "the model" if not described else "derived: from the sizes that were given"
                origin = f"preset {self.preset}" if value == preset.get(name) else origin
                config = config.replace(f"derived: architecture {self.model.architecture}" if name in changed else origin, **{key: value})

        def derive(key: str, value: Any, rule: str) -> None:
            nonlocal config
            if config[key] is None:
                config = config.replace(f"derived: {rule}", **{key: value})

        tokens_per_microbatch = config.train.seq_len * config.train.batch_size
        tokens_per_step = tokens_per_microbatch * config.train.grad_accum
        ramp = BatchRamp(config.train.grad_accum, config.train.batch_ramp)
        if config.train.pace is not None:
            derive("train.steps", Pace.of_text(config.train.pace).steps(0), "the record in pace")
        if config.train.epochs is not None:
            derive(
                "train.steps", config.steps_of_epochs(num_train_tokens), f"epochs x {num_train_tokens:,} tokens / {tokens_per_step:,} tokens per step"
            )
        parameters = model.num_parameters(ngrams=False)
        wanted = min(20 * parameters, 4 * num_train_tokens)
        rule = "20 tokens per parameter (Hoffmann et al. 2022), at most 4 epochs (Muennighoff et al. 2023)"
        derive("train.steps", max(1, ramp.steps_for(math.ceil(wanted / tokens_per_microbatch))), rule)
        assert config.train.steps is not None
        steps = config.train.steps
        tenth, least = min(max(1, steps // 10), 1000), min(least_eval_every(config), steps)
        derive("train.checkpoint_every", config.train.eval_every or tenth, "eval_every" if config.train.eval_every else TENTH)
        derive("train.eval_every", max(tenth, least), TENTH if tenth >= least else "as often as eval_budget allows")
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

    def steps_of_epochs(self, num_train_tokens: int) -> int | None:
        """The updates that `epochs` passes take; None where no number of passes was given."""
        settings = self.train
        if settings.epochs is None:
            return None
        microbatches = math.ceil(settings.epochs * num_train_tokens / (settings.seq_len * settings.batch_size))
        return max(1, BatchRamp(settings.grad_accum, settings.batch_ramp).steps_for(microbatches))

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

    def check_beside_model(self, wrong: Sequence[str] = ()) -> None:
        """UserError for settings that a model to start from rules out: a preset, a vocabulary, a tokenizer, and what else is `wrong` for this one."""
        found = [*wrong]
        for name in ("preset", "architecture"):
            if self["model." + name] is not None:
                found.append(f"{name}={self['model.' + name]!r}")
        if self.data.vocab_size is not None:
            found.append(f"vocab_size={self.data.vocab_size!r}")
        if self.data.tokenizer != "bpe":
            found.append(f"tokenizer={self.data.tokenizer!r}")
        if found:
            raise UserError(f"--from {self.finetune.start_from} gives the model's sizes and its tokenizer. Leave out: {', '.join(found)}.")

    def adopt(self, stored: TrainConfig) -> TrainConfig:
        """On resume, what nobody has chosen takes the stored run's value: what was derived here (another machine may derive otherwise), and what was
        left to its default both then and now (another version may have another default)."""
        config, there = self, stored.flat()
        for key, value in self.flat().items():
            open_here = self.sources[key].startswith("derived") or self.sources[key] == stored.sources[key] == "default"
            if open_here and SETTINGS[key].result and value != there[key]:
                config = config.replace("derived: stored in the run", **{key: there[key]})
        return config

    def adopt_choice(self, stored: TrainConfig) -> TrainConfig:
        """On resume of a run that was given its time: everything that was chosen for it, or decided by its clock, where nobody has given a value."""
        config, there = self, stored.flat()
        for key, value in self.flat().items():
            open_here = self.sources[key] == "default" or self.sources[key].startswith("derived")
            if open_here and stored.sources[key].startswith("derived") and value != there[key]:
                config = config.replace(stored.sources[key], **{key: there[key]})
        return config

    def to_toml(self) -> str:
        """A file that `from_toml` reads back to the same values, with the help and the source of each as comments."""
        values = self.flat()
        if self.seconds is not None:
            values["train.steps"] = None  # the clock decides, or its record in pace
        elif self.train.steps is not None:
            values["train.epochs"] = None  # steps already hold what the epochs came to
        return write_toml(values, self.sources)


def _heads(embed_dim: int, usual: int) -> int:
    """How many heads a width has where nothing says it: the usual number where that divides it, else heads of a usual width."""
    widths = (64, 32, 16) if embed_dim >= 256 else (32, 16)
    width = next((each for each in widths if embed_dim % each == 0), None)
    return usual if embed_dim % usual == 0 or width is None else embed_dim // width


def _fastest_precision(asked: str) -> tuple[str, str]:
    """bf16 where the device multiplies it in hardware, by tiles or by pairs in vectors (which brought 1.7 to 2.4 times the speed of fp32 on a Zen 4);
    fp16 on older GPUs; else fp32."""
    from cllm.runtime import compiler
    from cllm.runtime.device import resolve
    from cllm.runtime.gpu import multiplies_bf16

    device, _ = resolve(asked)
    if device.type == "cuda":
        new = multiplies_bf16(device)
        return ("bf16", "this GPU multiplies bf16 tiles in hardware") if new else ("fp16", "this GPU multiplies fp16 tiles, not bf16")
    if "amx_bf16" in compiler.cpu_features():
        return "bf16", "this machine multiplies bf16 tiles in hardware"
    if "avx512_bf16" in compiler.cpu_features():
        return "bf16", "this machine multiplies pairs of bf16 in hardware"
    return "fp32", "this machine gains nothing from bf16"
