"""Every setting of a training run: its type, default, limits and one sentence of help, and what is told about a wrong key or value.

This is the only declaration of a setting. The configuration, its TOML file and the flags of `cllm train` are made from it.
Keys are unique over all sections, so that `learning_rate` and `optim.learning_rate` name the same setting.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import inspect
import typing
from dataclasses import dataclass
from typing import Any

from cllm.config.lora import TARGETS
from cllm.config.model import ModelConfig
from cllm.config.presets import ARCHITECTURES, PRESETS
from cllm.config.schedule import KINDS
from cllm.config.setting import Setting, origin, setting, settings_of, shortened
from cllm.runtime.errors import UserError

DEFAULT_PRESET = "cllm-5m"
MAX_VOCAB = 1_000_000  # several times the largest in use; the library that learns the tokens sets room aside for all of them
DEVICES = ("auto", "cpu", "cuda")
OPTIMIZERS = ("adamw", "muon", "lion", "schedule_free")


@dataclass(frozen=True)
class DataSection:
    path: str = setting("", "Text to learn from: a folder, a file, or a folder of packed tokens.", path=True, result=False)
    tokenizer: str = setting(
        "bpe",
        "Tokenizer: bpe, wordpiece, unigram or char, which is trained on the data, or the path of a tokenizer.json or .tiktoken file.",
        path=True,
    )
    vocab_size: int | None = setting(
        None,
        "Size of a new vocabulary in tokens, rounded up to a multiple of 64. Default: chosen by the amount of text.",
        unit="tokens",
        at_least=257,
        at_most=MAX_VOCAB,
        example=4096,
    )
    tokenizer_sample: int = setting(
        1000, "Megabytes of text that a tokenizer learns from at most. Of more text, pieces from all of it are drawn, always the same.", unit="MB",
        at_least=1, at_most=2000, example=200,
    )  # fmt: skip
    val_fraction: float | None = setting(
        None, "Share of the text that is kept for validation, in whole documents. Default: a tenth of up to 10 MB of text, 1 MB of up"
        " to 100 MB, one hundredth of more, and never more than 8 MB (about 2 million tokens).", at_least=0.0, below=1.0, example=0.1,
    )  # fmt: skip
    exclude: str = setting("", "Files and folders below the data path that are left out, separated by commas.")
    text_field: str = setting("", "Field of JSON records, or column of tables, that holds the text. Default: found automatically.", example="body")
    separator: str = setting(
        "auto",
        "Text between the documents of one file, such as \\n\\n\\n. auto cuts at <|endoftext|> and similar markers, none cuts nowhere.",
        example="none",
    )
    encoding: str = setting(
        "auto", "Charset of the files that are not Unicode. auto guesses it from their letters, for all files of a folder together.", example="cp1250"
    )
    document_mask: bool = setting(True, "Each token attends only to its own document, never to the one packed before it.")
    fim_rate: float = setting(
        0.0, "Share of the documents in training windows that are cut at two random places and learnt in the order prefix, suffix, middle, so that"
        " the model fills in the middle for --suffix of cllm generate. Where a window cuts a document off, a part of it is. 0 for none.",
        at_least=0.0, at_most=1.0, example=0.5,
    )  # fmt: skip
    shuffle: str = setting(
        "epoch",
        "Order of the training windows: epoch (each once per epoch, shuffled), random (drawn with replacement) or none (as they lie).",
        choices=("epoch", "random", "none"),
    )


@dataclass(frozen=True)
class TrainSection:
    steps: int | None = setting(
        None,
        "Number of optimizer updates. Default: from epochs, else 20 tokens per parameter but at most 4 epochs.",
        unit="updates",
        at_least=1,
        example=1000,
    )
    epochs: float | None = setting(None, "Number of passes over the training tokens, instead of steps.", unit="passes", above=0.0, example=1)
    hours: float | None = setting(
        None,
        "How long it may take, in hours, instead of steps. Model, tokens, batch, learning rate and schedule follow from the measured speed of this "
        "machine and a scaling law, and the run ends in time, however busy the machine is. Everything counts, from the start of the command to its "
        "end, over all starts of the run.", above=0.0, at_most=10_000, example=2, unit="hours",
    )  # fmt: skip
    minutes: float | None = setting(None, "The same in minutes.", above=0.0, at_most=600_000, example=20, unit="minutes")
    pace: str | None = setting(
        None,
        "What the clock decided in a run with hours or minutes: STEP:SHARE:STEPS, separated by spaces, for each step at which a share of the "
        "schedule had passed and the end was set to a number of steps. The config.toml of a finished run holds it. Where it is given, it is "
        "followed instead of the clock, and the run computes the same bits again.", example="'0:0.0:1000'",
    )  # fmt: skip
    seq_len: int = setting(256, "Length of a training sequence in tokens.", unit="tokens", at_least=1, example=256)
    batch_size: int = setting(
        16, "Number of sequences in a microbatch, that is, in one forward pass.", unit="sequences", at_least=1, at_most=1_000_000, example=16
    )
    grad_accum: int = setting(1, "Number of microbatches whose gradients are accumulated for one update.", unit="microbatches", at_least=1, example=1)
    precision: str = setting(
        "auto",
        "Number format of the forward and backward passes; weights and optimizer state stay float32. auto: bf16 where the "
        "hardware multiplies it (fp16 on older GPUs), else fp32.",
        choices=("auto", "fp32", "bf16", "fp16"),
    )
    device: str = setting("auto", "Device to train on. auto: a GPU if there is one.", choices=DEVICES, result=False)
    recompute: str = setting(
        "auto", "What the backward pass computes again to save memory. auto: as little as fits.",
        choices=("auto", "none", "feed_forward", "blocks"), result=False,
    )  # fmt: skip
    threads: int | None = setting(
        None,
        "Largest number of worker threads. Any number gives the same bits. Default: all usable cores.",
        unit="threads",
        at_least=1,
        example=2,
        result=False,
    )
    seed: int = setting(0, "Seed of the initial weights and of the order of the data.", at_least=0, at_most=2**63 - 1, example=0)
    eval_every: int | None = setting(
        None, "Steps between evaluations on the validation split. Default: a tenth of the steps, at most 1000, and no more often than"
        " eval_budget allows.", unit="steps", at_least=1, example=200, result=False,
    )  # fmt: skip
    eval_budget: float = setting(
        0.05, "Largest share of the training time that all evaluations together may take. It decides how much of the validation split"
        " each of them reads: always the same part, spread evenly over the split, at least two batches and 512 tokens. A large "
        "value reads the whole split every time. The part is fixed when the run starts.", above=0.0, example=0.05, result=False,
    )  # fmt: skip
    checkpoint_every: int | None = setting(
        None,
        "Steps between checkpoints. Default: eval_every if that is given, else a tenth of the steps, at most 1000.",
        unit="steps",
        at_least=1,
        example=200,
        result=False,
    )
    keep: int = setting(
        2,
        "Number of newest checkpoints that are kept on disk. The best one is kept as well.",
        unit="checkpoints",
        at_least=1,
        example=2,
        result=False,
    )
    keep_every: int = setting(
        0, "Steps between checkpoints that are kept for good; 0 for none.", unit="steps", at_least=0, example=10000, result=False
    )
    async_checkpoint: bool = setting(True, "Write checkpoints in the background, from a copy of the weights and the optimizer state.", result=False)
    sample_every: int = setting(
        0, "Steps between samples of generated text in samples.txt; 0 for none.", unit="steps", at_least=0, example=500, result=False
    )
    patience: int = setting(
        0,
        "Number of evaluations without a better validation loss after which training stops; 0 never stops early.",
        unit="evaluations",
        at_least=0,
        example=5,
    )
    restore_best: bool = setting(False, "End with the weights of the best evaluation instead of the last ones.", result=False)
    batch_ramp: int = setting(
        0, "Steps over which the number of microbatches in an update rises from 1 to grad_accum.", unit="steps", at_least=0, example=500
    )
    on_nonfinite: str = setting(
        "stop", "What to do when a loss or gradient is NaN or infinite: stop, skip the update, or roll back to the last checkpoint and "
        "go on with other data.",
        choices=("stop", "skip", "rollback"), result=False,
    )  # fmt: skip
    on_spike: str = setting(
        "warn", "What to do when the loss jumps far above that of the last steps.", choices=("warn", "stop", "rollback"), result=False
    )
    spike_sigmas: float = setting(
        12.0,
        "Number of typical deviations above the median of the last 64 losses that counts as a jump; 0 turns this off.",
        unit="deviations",
        at_least=0.0,
        example=12,
        result=False,
    )
    on_gradient: str = setting("warn", "What to do when the gradient explodes or vanishes.", choices=("warn", "stop", "rollback"), result=False)
    on_stall: str = setting(
        "wait", "What to do when nothing has moved for log.watchdog_seconds: wait, or end the process.", choices=("wait", "stop"), result=False
    )
    parallel: str = setting(
        "ddp", "How several processes share the work: ddp (each holds the whole model), fsdp (sharded over all) or hybrid (sharded "
        "within a node).",
        choices=("ddp", "fsdp", "hybrid"), result=False,
    )  # fmt: skip
    shard_size: int | None = setting(
        None,
        "Number of processes that together hold one copy of the state in hybrid mode. Default: the processes of one node.",
        unit="processes",
        at_least=1,
        example=8,
        result=False,
    )
    deterministic: bool = setting(False, "Give the same bits for any number of processes and any division of an update into microbatches.")
    unit: int = setting(
        1, "Number of sequences in a leaf of the deterministic sum, which is then also one forward pass.", unit="sequences", at_least=1, example=4
    )
    timeout: float = setting(600.0, "Seconds that a process waits for the others before it ends.", unit="s", above=0.0, example=600, result=False)
    overfit_one_batch: bool = setting(False, "Train on the first batch only. A working setup drives its loss below 0.1.")


@dataclass(frozen=True)
class OptimSection:
    optimizer: str = setting(
        "adamw",
        "Optimizer: adamw, muon (with AdamW for embeddings and vectors), lion, or schedule_free (AdamW without learning-rate decay).",
        choices=OPTIMIZERS,
    )
    learning_rate: float | None = setting(
        None,
        "Peak learning rate. Default: derived from the number of parameters, and a tenth of that for a model that is trained further without LoRA.",
        above=0.0,
        at_most=1e6,
        example="3e-4",
    )
    min_lr: float | None = setting(
        None, "Learning rate at the end of the schedule, and its lower bound. Default: a tenth of learning_rate.", at_least=0.0, example="3e-5"
    )
    warmup: int | None = setting(
        None,
        "Steps over which the learning rate rises to its peak. Default: a tenth of the steps, at most 1000.",
        unit="steps",
        at_least=0,
        example=100,
    )
    schedule: str = setting("cosine", "Shape of the learning-rate decay after the warmup.", choices=KINDS)
    plateau_factor: float = setting(0.5, "Factor by which the plateau schedule lowers the learning rate.", above=0.0, below=1.0, example=0.5)
    plateau_patience: int = setting(
        3,
        "Number of evaluations without a better loss before the plateau schedule lowers the learning rate.",
        unit="evaluations",
        at_least=1,
        example=3,
    )
    weight_decay: float = setting(0.1, "Decoupled weight decay of matrices and embeddings; biases and norms have none.", at_least=0.0, example=0.1)
    beta1: float = setting(
        0.9, "Decay of the mean of gradients; for Lion, the weight of that mean in an update.", at_least=0.0, below=1.0, example=0.9
    )
    beta2: float = setting(
        0.95,
        "Decay of AdamW's mean of squared gradients, and of Lion's momentum, for which the default is 0.99.",
        at_least=0.0,
        below=1.0,
        example=0.95,
    )
    momentum: float = setting(0.95, "Decay of Muon's mean of gradients.", at_least=0.0, below=1.0, example=0.95)
    ema: float = setting(
        0.0, "Decay of a moving average of the weights, which is then evaluated and exported; 0 for none.", at_least=0.0, below=1.0, example=0.999
    )
    eps: float = setting(1e-8, "Added to AdamW's denominator to prevent division by zero.", above=0.0, example="1e-8")
    grad_clip: float = setting(1.0, "Largest norm of the gradient over all weights; 0 does not clip.", at_least=0.0, example=1.0)
    z_loss: float = setting(0.0, "Weight of the squared log-sum-exp in the loss, which keeps logits small; 0 for none.", at_least=0.0, example="1e-4")
    label_smoothing: float = setting(
        0.0, "Share of the target probability that is spread evenly over all tokens.", at_least=0.0, below=1.0, example=0.1
    )
    dropout: float = setting(
        0.0, "Share of the embedding, of attention's probabilities and of each branch's output that is zeroed at random in training, never in"
        " evaluation. It helps where a text is read many times over; 0 for none.", at_least=0.0, below=1.0, example=0.2,
    )  # fmt: skip


@dataclass(frozen=True)
class FinetuneSection:
    start_from: str = setting(
        "", "Model to start from: a run, a .cllm file or a Hugging Face folder. Default: new random weights.", path=True, flag="from"
    )
    lora_rank: int = setting(0, "Rank of LoRA adapters, which alone are then trained; 0 trains all weights.", at_least=0, example=8)
    lora_alpha: float = setting(0.0, "Adapters are multiplied by lora_alpha / lora_rank; 0 means twice the rank.", at_least=0.0, example=16)
    lora_targets: str = setting("all", "Matrices that get adapters: all of the blocks, or only those of attention.", choices=TARGETS)


@dataclass(frozen=True)
class LogSection:
    metrics_every: int = setting(1, "Steps between rows of metrics.jsonl.", unit="steps", at_least=1, example=1, result=False)
    layers_every: int = setting(
        50, "Steps between rows about each layer's gradient norm and update; 0 for none.", unit="steps", at_least=0, example=50, result=False
    )  # fmt: skip
    classes: bool = setting(True, "At each evaluation, measure precision, recall and confusion of classes of tokens, and calibration.", result=False)
    activations: bool = setting(
        False, "At each evaluation, record the mean, spread and largest value of the residual stream in each block.", result=False
    )
    prometheus_port: int = setting(
        0, "Port of this machine on which Prometheus finds the newest numbers; 0 for none.", at_least=0, at_most=65535, example=9400, result=False
    )  # fmt: skip
    noise_scale_every: int = setting(
        0, "Steps between measurements of the gradient noise scale; 0 for none.", unit="steps", at_least=0, example=10, result=False
    )
    tensorboard: bool = setting(True, "Write TensorBoard events if tensorboardX is installed.", result=False)
    watchdog_seconds: float = setting(
        300.0, "Seconds without any progress after which the stacks of all threads are printed; 0 never.", at_least=0.0, unit="s", result=False
    )


def field_docs(schema: type) -> dict[str, str]:
    """The sentence under each field of a class and of those that it inherits from, read from their source; empty where that is not at hand."""
    return {name: text for each in reversed(schema.__mro__) for name, text in _own_field_docs(each).items()}


def _own_field_docs(schema: type) -> dict[str, str]:
    try:
        body = ast.parse(inspect.getsource(schema)).body[0]
    except (OSError, TypeError, SyntaxError):
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
    """[model]: a preset, an architecture, and every field of ModelConfig, open (None) until given. The vocabulary comes from the tokenizer."""
    hints, docs = typing.get_type_hints(ModelConfig), field_docs(ModelConfig)
    preset_help = f"Named model sizes: {', '.join(PRESETS)}. Default: {DEFAULT_PRESET}, if no size is given."
    of_preset = dict.fromkeys(("embed_dim", "num_layers", "num_heads"), " Default: as in the preset.")
    counted = {
        "tokens": ("max_seq_len", "sliding_window", "rope_original_len"), "dimensions": ("embed_dim", "head_dim", "ffn_dim"),
        "heads": ("num_heads", "num_kv_heads"), "blocks": ("num_layers",), "rows": ("bigram_rows", "trigram_rows"),
    }  # fmt: skip
    units = {name: unit for unit, names in counted.items() for name in names}
    architecture_help = (
        "fast: hashed embeddings of the last two and three tokens, which learn more in the same time. CLLM alone can run such a model; the default "
        "can be exported to other programs."
    )
    fields: list[tuple[str, Any, Any]] = [
        ("preset", str | None, setting(None, preset_help)),
        ("architecture", str | None, setting(None, architecture_help, choices=ARCHITECTURES)),
    ]
    fields += [
        (
            each.name,
            hints[each.name] | None,
            setting(None, docs.get(each.name, f"See ModelConfig.{each.name}.") + of_preset.get(each.name, ""), unit=units.get(each.name)),
        )
        for each in dataclasses.fields(ModelConfig)
        if each.name != "vocab_size"
    ]
    return dataclasses.make_dataclass("ModelSection", fields, frozen=True)


ModelSection: Any = _model_section()
SECTIONS: dict[str, Any] = {
    "model": ModelSection, "data": DataSection, "train": TrainSection, "optim": OptimSection, "log": LogSection, "finetune": FinetuneSection,
}  # fmt: skip
SETTINGS: dict[str, Setting] = {f"{name}.{key}": each for name, section in SECTIONS.items() for key, each in settings_of(section).items()}
MODEL_DEFAULTS = {f"model.{each.name}": each.default for each in dataclasses.fields(ModelConfig) if each.default is not dataclasses.MISSING}
_SHORT = {key.partition(".")[2]: key for key in SETTINGS}
assert len(_SHORT) == len(SETTINGS), "keys must be unique over all sections"


def full_key(key: str, source: str = "") -> str:
    """The `section.key` of a key with or without its section; UserError with the nearest name for an unknown one."""
    if key in SETTINGS:
        return key
    if key in _SHORT:
        return _SHORT[key]
    near = nearest_key(key)
    hint = f" Did you mean {near!r}?" if near else f" Sections: {', '.join(SECTIONS)}."
    raise UserError(f"unknown setting {shortened(key)}{origin(source)}.{hint}")


# What other trainers call these settings, and what people shorten them to; no edit distance leads from lr to learning_rate.
_OTHER_NAMES = {
    "learning_rate": "lr rate max_lr peak_lr step_size",
    "min_lr": "lr_min min_learning_rate final_lr end_lr eta_min",
    "warmup": "warmup_steps warmup_iters num_warmup_steps lr_warmup",
    "schedule": "scheduler lr_schedule lr_scheduler lr_scheduler_type lr_decay decay_style",
    "optimizer": "opt optim",
    "weight_decay": "wd decay l2",
    "grad_clip": "clip clip_grad gradient_clip max_grad_norm grad_norm clip_norm",
    "batch_size": "bs batch micro_batch_size microbatch_size per_device_train_batch_size",
    "grad_accum": "accum accumulate gradient_accumulation gradient_accumulation_steps accumulation_steps",
    "seq_len": "ctx context ctx_len context_len context_length context_size n_ctx block_size sequence_length max_length window",
    "steps": "max_steps num_steps iters max_iters num_iters iterations updates",
    "epochs": "epoch num_epochs max_epochs num_train_epochs passes",
    "num_layers": "layers layer n_layer n_layers depth blocks num_hidden_layers",
    "num_heads": "heads head n_head n_heads num_attention_heads",
    "num_kv_heads": "kv_heads n_kv_heads num_key_value_heads kv",
    "embed_dim": "dim d_model n_embd width hidden hidden_size hidden_dim model_dim embd emb_dim embedding_dim",
    "ffn_dim": "ffn d_ff mlp_dim intermediate_size ff_dim",
    "vocab_size": "vocab n_vocab vocabulary",
    "val_fraction": "val val_split validation validation_split validation_fraction holdout",
    "precision": "dtype amp fp16 bf16 mixed_precision",
    "threads": "num_threads n_threads workers num_workers jobs cores cpus",
    "eval_every": "eval_interval eval_steps val_every val_interval",
    "checkpoint_every": "save_every save_steps save_interval ckpt_every checkpoint_interval",
    "keep": "save_total_limit keep_last max_checkpoints",
    "patience": "early_stopping early_stop",
    "label_smoothing": "smoothing",
    "fim_rate": "fim fim_prob fim_probability fill_in_the_middle infill infilling",
    "dropout": "drop dropout_rate dropout_prob attention_dropout attn_pdrop resid_pdrop embd_pdrop hidden_dropout hidden_dropout_prob",
    "lora_rank": "rank lora_r lora",
    "lora_alpha": "alpha",
    "start_from": "init_from base_model pretrained finetune_from",
    "seed": "random_seed rng_seed",
}
_MEANT = {other: name for name, others in _OTHER_NAMES.items() for other in others.split()}


def nearest_key(key: str) -> str | None:
    """The `section.key` that an unknown key most likely means: the right name in another section, another trainer's name, or the nearest spelling."""
    section, dot, name = key.strip().lower().replace("-", "_").rpartition(".")
    name = _MEANT.get(name, name)
    if name in _SHORT:
        return _SHORT[name]

    def likeness(candidate: str) -> float:
        there, _, short = candidate.partition(".")
        return _ratio(name, short) + (0.1 * _ratio(section, there) if dot else 0.0)

    best = max(SETTINGS, key=likeness)
    return best if _ratio(name, best.partition(".")[2]) >= 0.65 else None


def _ratio(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, first.replace("_", ""), second.replace("_", ""), autojunk=False).ratio()
