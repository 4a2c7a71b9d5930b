"""What several commands share: options, examples on the --help page, and the model that most of them begin with."""

import inspect
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cllm.cli.console import not_text
from cllm.config.sampling import STRETCHES
from cllm.config.schema import DEVICES, SETTINGS
from cllm.config.setting import Setting
from cllm.runtime.errors import DataError, UserError

if TYPE_CHECKING:
    from cllm.data.documents.scan import Reading
    from cllm.data.tokens.tokenizer import Tokenizer


class WrongValue(typer.BadParameter):
    """A UserError on its way through the parser, which would put its own words around any ValueError."""


def option(name: str, kind: type, help: str, **more: Any) -> Any:
    """An option for `Annotated`: read, limited and answered as settings are (`more`: see `cllm.config.setting.Setting`). A Path has to be local."""
    declared = Setting(name, (str if kind is Path else kind,), help, path=kind is Path, **more)
    return typer.Option(name, help=help, metavar="PATH" if kind is Path else _metavar(declared), parser=_reader(declared, kind))


def argument(name: str, help: str, kind: type = str) -> Any:
    """An argument for `Annotated` that names a file or folder on this machine."""
    return typer.Argument(metavar=name, help=help, parser=_reader(Setting(name.rstrip("."), (str,), help, path=True), kind))


def text_option(name: str, help: str, metavar: str = "TEXT") -> Any:
    """An option for `Annotated` that takes any text that can be decoded."""
    return typer.Option(name, help=help, metavar=metavar, parser=_text_reader(name))


def text_argument(name: str, help: str) -> Any:
    """An argument for `Annotated` that takes any text that can be decoded."""
    return typer.Argument(metavar=name, help=help, parser=_text_reader(name))


def _text_reader(name: str) -> Callable[[Any], Any]:
    def read(text: Any) -> Any:
        try:
            return check_decoded(name, text)
        except UserError as error:
            raise WrongValue(str(error)) from error

    return read


def check_decoded(name: str, text: Any) -> Any:
    """The text of an option. UserError where the locale could not decode it: Python keeps each byte of that as half of a surrogate pair."""
    odd = next((each for each in text if "\ud800" <= each <= "\udfff"), None) if isinstance(text, str) else None
    if odd is not None:
        raise UserError(not_text(name, ord(odd) & 0xFF, sys.getfilesystemencoding()))
    return text


def _reader(declared: Setting, kind: type) -> Callable[[Any], Any]:
    def read(text: Any) -> Any:
        if not isinstance(text, str):  # the default comes through here as well
            return text
        try:
            value = declared.read(text if declared.path else check_decoded(declared.name, text))
        except UserError as error:
            raise WrongValue(str(error)) from error
        return value if value is None else kind(value)

    read.declared = declared  # type: ignore[attr-defined]  # the app makes its forms of it
    return read


def _metavar(declared: Setting) -> str:
    return (
        "|".join(declared.choices)
        if declared.choices
        else "PATH"
        if declared.path
        else {int: "INTEGER", float: "NUMBER", str: "TEXT"}[declared.types[0]]
    )


Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout, and everything else on stderr.")]
Device = Annotated[str, option("--device", str, "Device to compute on. auto: a GPU if there is one.", choices=DEVICES)]
Threads = Annotated[
    int | None,
    option(
        "--threads",
        int,
        "Largest number of worker threads. Any number gives the same bits. [default: all usable cores]",
        unit="threads",
        optional=True,
        at_least=1,
        example=2,
    ),
]
Checkpoint = Annotated[
    str, argument("CKPT", "A run, a checkpoint folder, a .cllm file or a Hugging Face folder; sample: the small model that comes with CLLM.")
]
TOKENIZER = "A tokenizer.json or .tiktoken file, or the run, .cllm file or Hugging Face folder that holds one."
TokenizerPlace = Annotated[Path, argument("TOKENIZER", TOKENIZER, Path)]
Text = Annotated[str, argument("DATA", "Folder or file of text, JSON, CSV or Parquet.")]
Weights = Annotated[
    str | None,
    option(
        "--weights",
        str,
        "Number format of the weights in memory: bf16 evaluates faster, bf16, int8 and int4 generate faster, int4 at some cost in quality. [default: "
        "bf16 on a GPU that multiplies it in hardware, else fp32]",
        optional=True,
        choices=("fp32", "bf16", "int8", "int4"),
    ),
]
KvCache = Annotated[
    str | None,
    option(
        "--kv-cache",
        str,
        "Number format of the keys and values that are kept of a text: int8 takes about half of the memory of bf16, at a small cost in quality. "
        "[default: that of the activations]",
        optional=True,
        choices=("int8",),
    ),
]
Draft = Annotated[
    str | None,
    text_option("--draft", "A smaller model with the same tokenizer that guesses tokens ahead. The text is the same, sooner.", "MODEL"),
]
Context = Annotated[
    int | None,
    option(
        "--context", int, "Longest text in tokens that the model sees, beyond what it was trained with; needs --stretch.", unit="tokens",
        optional=True, at_least=2, example=4096,
    ),
]  # fmt: skip
Stretch = Annotated[
    str | None,
    option(
        "--stretch", str, "How the positions of --context are reached: yarn, or dynamic (a larger rotary base).", optional=True, choices=STRETCHES
    ),
]


def examples(*lines: str) -> str:
    """The end of a --help page; the first character keeps the line breaks."""
    return "\b\nExamples:\n" + "\n".join(f"  {line}" for line in lines)


def with_settings(settings: Mapping[str, Setting]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Gives a command a flag for each of these settings, made from its declaration: name, type, help and default.

    The command takes them as keyword arguments by the keys of `settings`, each the text that was given, or None; `read_settings` reads them.
    """
    flags = [inspect.Parameter(each.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_flag(each)) for each in settings.values()]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        def run(**values: Any) -> Any:
            given = {key: values.pop(each.name) for key, each in settings.items()}
            for key, each in settings.items():
                if not each.path:  # a path may be of bytes that are no text
                    check_decoded(each.option, given[key])
            return command(**values, **given)

        signature = inspect.signature(command, eval_str=True)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        run.settings = settings  # type: ignore[attr-defined]  # the app makes its forms of them
        run.__signature__ = signature.replace(parameters=[*own, *flags])  # type: ignore[attr-defined]
        return run

    return decorate


def _flag(declared: Setting) -> Any:
    """The type of a flag for typer."""
    if declared.types == (bool,):
        return Annotated[bool | None, typer.Option(declared.option, help=declared.help, show_default=False)]
    default = "" if declared.default is None or declared.default == "" else f" [default: {declared.default}]"
    return Annotated[str | None, typer.Option(declared.option, help=declared.help + default, metavar=_metavar(declared))]


def read_settings(settings: Mapping[str, Setting], given: Mapping[str, str | None]) -> dict[str, Any]:
    """The values of all settings: what was given, checked, and the defaults. Raises UserError for a text outside its setting's type or limits."""
    texts = {key: text for key, text in given.items() if text is not None}
    return {key: each.read(texts[key], each.option) if key in texts else each.default for key, each in settings.items()}


READING = {name: SETTINGS[f"data.{name}"] for name in ("text_field", "separator", "encoding")}


def reading_of(settings: Mapping[str, str | None]) -> "Reading":
    """How texts are taken out of files, of a command `with_settings(READING)`."""
    from cllm.data.documents.scan import Reading

    return Reading.of(**read_settings(READING, settings))


def check_model(path: str) -> None:
    """CheckpointError where no model can be at a path, before the libraries that read one are imported, which takes seconds."""
    from cllm.checkpoint.place import kind_of, place_of

    kind_of(place_of(path))


def check_text(path: str) -> None:
    """DataError where no text can be at a path, as far as the names and sizes of the files tell: quick for any folder, and torch stays out."""
    from cllm.data.documents.corpus import no_text
    from cllm.data.documents.files import find

    files, skipped = find(path)
    if not files:
        from cllm.data.tokens.dataset import is_packed

        if not is_packed(path):
            raise DataError(no_text(Path(path), skipped))


def load_model(
    path: str, need_tokenizer: bool = True, weights: str | None = None, device: str = "cpu", generating: bool = False,
    context: int | None = None, stretch: str | None = None, kv_cache: str | None = None,
) -> tuple[Any, Any]:  # fmt: skip
    """The model and its tokenizer.

    generating: the matrices may give way to a layout that decoding reads faster (`Model.pack_`). context, stretch: a longer context than the model's
    own, and how its positions get there (`cllm.model.stretch`). kv_cache: as `Model.kv_cache`.
    """
    if (context is None) != (stretch is None):
        raise UserError("--context and --stretch belong together: how long a text the model is to see, and how its positions get there.")
    check_model(path)
    from cllm.checkpoint.model_file import load_on
    from cllm.runtime.progress import say

    model, tokenizer = load_on(path, device, weights, say)
    if context is not None and stretch is not None:
        from cllm.model.stretch import stretch_

        stretch_(model, context, stretch)
    model.kv_cache = kv_cache
    if generating:
        model.pack_()
    if need_tokenizer and tokenizer is None:
        raise DataError(f"{path} holds no tokenizer, so text cannot be read or written. Save one with it: cllm.save(model, path, tokenizer=...).")
    return model, tokenizer


def load_draft(
    path: str | None, tokenizer: "Tokenizer", weights: str | None = None, device: str = "cpu", kv_cache: str | None = None
) -> Any:  # fmt: skip
    """The model that guesses for one with this tokenizer; None where none was asked for. Raises UserError where it has another tokenizer."""
    if path is None:
        return None
    model, own = load_model(path, weights=weights, device=device, generating=True, kv_cache=kv_cache)
    if own != tokenizer:
        raise UserError(
            f"--draft {path} has another tokenizer than the model, so it cannot guess the model's tokens. Train it with the tokenizer of the model: "
            "cllm train DATA --tokenizer RUN/tokenizer.json, RUN being the run of the model."
        )
    return model


def load_tokenizer(place: Path) -> "Tokenizer":
    from cllm.checkpoint.place import place_of

    place = place_of(place)
    if place.suffix == ".cllm":
        from cllm.checkpoint.model_file import load_tokenizer

        return load_tokenizer(place)
    from cllm.data.tokens.tokenizer import Tokenizer

    return Tokenizer.load(place)


def read_text(path: Path, encoding: str) -> str:
    """The text of a file in whatever charset, without its byte order mark, its line ends as newlines; a guessed charset is told on stderr.

    encoding: "auto", or the charset of a file that is not Unicode. Raises DataError for a file that cannot be read or is no text, UserError for an
    unknown charset.
    """
    from cllm.data.documents.charset import Binary, check_encoding, decode
    from cllm.data.documents.decodings import Decodings
    from cllm.files import read_named
    from cllm.runtime.progress import say

    try:
        found = decode(read_named(path), check_encoding(encoding))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {(error.strerror or str(error)).lower()}.") from error
    if isinstance(found, Binary):
        raise DataError(f"{path} is no text: it is {found.reason}.")
    text, charset = found
    if charset.guess:
        decodings = Decodings()
        decodings.add(str(path), path, charset)
        for line in decodings.lines(advice="Say --encoding NAME."):
            say(line)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def require_suffix(out: Path, suffix: str) -> None:
    """UserError for a file to write whose name says something else, before the work of which it is the result."""
    if out.suffix != suffix:
        raise UserError(f"--out must name a {suffix} file, got {str(out)!r}. Use a name like model{suffix}.")
