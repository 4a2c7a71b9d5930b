"""What several commands share: options, examples on the --help page, and the model that most of them begin with."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from cllm.config import schema
from cllm.runtime.errors import DataError

Json = Annotated[bool, typer.Option("--json", help="Progress to stderr; the last line of stdout is one JSON object.")]
Device = Annotated[str, typer.Option(help="auto, cpu or cuda.")]
Threads = Annotated[int | None, typer.Option(help="Upper limit of worker threads; any number gives the same bits.")]
Checkpoint = Annotated[str, typer.Argument(metavar="CKPT", help="A run, a checkpoint folder, a .cllm file or a Hugging Face folder.")]
Weights = Annotated[str | None, typer.Option(help="fp32, bf16 or int8 in memory; bf16 evaluates faster, bf16 and int8 write faster.")]


def examples(*lines: str) -> str:
    """The end of a --help page; the first character keeps the line breaks."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def with_settings(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a command a flag for each of these settings, made from its declaration in `cllm.config.schema`: name, type, help and default.

    The command takes them as `**settings`: `section.key` -> the text that was given, or None. `TrainConfig.from_layers` reads and checks the texts,
    so that a flag and `--set` accept the same values and answer the same mistakes alike.
    """
    keys = [schema.full_key(name) for name in names]
    flags = [inspect.Parameter(key.partition(".")[2], inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_flag(key)) for key in keys]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        def run(**values: Any) -> Any:
            settings = {key: values.pop(flag.name) for key, flag in zip(keys, flags)}
            return command(**values, **settings)

        signature = inspect.signature(command, eval_str=True)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.__signature__ = signature.replace(parameters=[*own, *flags])  # type: ignore[attr-defined]
        return run

    return decorate


def _flag(key: str) -> Any:
    """The type of a flag for typer."""
    each = schema.FIELDS[key]
    name, text = schema.flag(key), each.metadata["help"]
    if schema.types_of(key) == (bool,):
        return Annotated[bool | None, typer.Option(name, help=text, show_default=False)]
    default = "" if each.default is None or each.default == "" else f" [default: {each.default}]"
    return Annotated[str | None, typer.Option(name, help=text + default, metavar=_metavar(key))]


def _metavar(key: str) -> str:
    choices = schema.FIELDS[key].metadata["choices"]
    return "|".join(choices) if choices else {int: "INTEGER", float: "NUMBER", str: "TEXT"}[schema.types_of(key)[0]]


def reading_of(settings: dict[str, str | None]) -> Any:
    """How texts are taken out of files, of a command that was given `text_field` and `separator` by `with_settings`."""
    from cllm.config.train import TrainConfig
    from cllm.data.documents.scan import Reading

    data = TrainConfig.from_layers(flags=settings).data
    return Reading.of(data.text_field, data.separator)


def load_model(path: str, need_tokenizer: bool = True, weights: str | None = None, device: str = "cpu") -> tuple[Any, Any]:
    from cllm.checkpoint.model_file import load
    from cllm.runtime.device import resolve

    # int8 weights have fast kernels on the CPU alone.
    place, _ = resolve("cpu" if device == "auto" and weights == "int8" else device)
    model, tokenizer = load(path, weights=weights)
    model.to(place)
    if need_tokenizer and tokenizer is None:
        raise DataError(f"{path} holds no tokenizer, so text cannot be read or written. Save one with it: cllm.save(model, path, tokenizer=...).")
    return model, tokenizer


def tokenizer_file(path: str) -> Path:
    """A tokenizer.json, or the one inside a run or Hugging Face folder."""
    place = Path(path)
    return place / "tokenizer.json" if place.is_dir() else place


def read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}). Convert it first.") from error
