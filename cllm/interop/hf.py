"""Hugging Face model folders, both ways, without transformers: config.json, safetensors weights, tokenizer and
generation settings.

    model, tokenizer = load_hf("models/tiny-llama")
    save_hf(model, "exported", tokenizer)

Parameter names and layouts are already Hugging Face's, so nothing is renamed or transposed. Weights in pickles
(pytorch_model.bin) are refused: opening one can run any code.
"""

import json
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cllm.config.model import ModelConfig
from cllm.files import MODEL, foreign, new_folder, read_named, reason
from cllm.interop.hf_config import config_from_hf, config_to_hf
from cllm.model.model import Model
from cllm.runtime.errors import CheckpointError, UserError

if TYPE_CHECKING:
    from cllm.data.tokens.tokenizer import Tokenizer

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5_000_000_000  # what transformers writes by default
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Constants that older versions of transformers stored among the weights.
_NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")


def load_hf(path: str | os.PathLike[str], dtype: torch.dtype = torch.float32) -> tuple[Model, "Tokenizer | None"]:
    """A folder -> the model with parameters in `dtype`, and its tokenizer where there is a tokenizer.json.

    Raises CheckpointError for a missing or damaged file, an architecture or setting that is not supported, weights that
    do not fit the configuration, and pickled weights.
    """
    folder = Path(path)
    if not folder.is_dir():
        what = foreign(folder) or "is not a folder. Expected a Hugging Face model folder with config.json and model.safetensors."
        raise CheckpointError(f"{folder} {what}")
    config = config_from_hf(_read_json(folder / "config.json"))
    with torch.device("meta"):
        model = Model(config)
    model.load_state_dict(_read_weights(folder, model, config, dtype), assign=True)
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    tokenizer = None
    if (folder / "tokenizer.json").is_file():
        from cllm.data.tokens.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(folder / "tokenizer.json")
    return model, tokenizer


def save_hf(
    model: Model,
    path: str | os.PathLike[str],
    tokenizer: "Tokenizer | None" = None,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Path:
    """Writes the model as a folder that transformers, vLLM and llama.cpp's converter read; returns its path.

    `dtype` converts the weights (default: as they are). The folder is written beside its place and renamed, so it is
    whole or absent. Raises UserError when it exists with files in it, or when no Hugging Face architecture computes the
    same.
    """
    folder = Path(path)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already and is not an empty folder. Choose another place, or remove it.")
    dtype = dtype or model.embedding_weight.dtype
    if dtype not in _FLOATS:
        raise UserError(f"weights can be saved as float32, bfloat16, float16 or float64, got {dtype}.")
    eot_id = None if tokenizer is None else tokenizer.eot_id
    config = config_to_hf(model.config, eot_id) | {"dtype": str(dtype).removeprefix("torch.")}
    config["torch_dtype"] = config["dtype"]  # the name before transformers 5
    with new_folder(folder, MODEL) as beside:
        _write_weights(model.state_dict(), beside, dtype, max_shard_bytes)
        if tokenizer is not None:
            tokenizer.save(beside / "tokenizer.json")
            _write_json(beside / "tokenizer_config.json", _tokenizer_config(tokenizer, model.config))
        _write_json(beside / "generation_config.json", {"bos_token_id": eot_id, "eos_token_id": _ends(tokenizer), "do_sample": True})
        _write_json(beside / "config.json", config)
    return folder


def _ends(tokenizer: "Tokenizer | None") -> int | list[int] | None:
    """Where generation stops: the end of text and, for a model that chats, the end of an answer."""
    from cllm.data.tokens.chat_template import end_of_turn

    if tokenizer is None:
        return None
    turn = end_of_turn(tokenizer)
    turn_id = tokenizer.eot_id if turn is None else tokenizer.special_tokens[turn]
    return tokenizer.eot_id if turn_id == tokenizer.eot_id or turn_id is None else [i for i in (tokenizer.eot_id, turn_id) if i is not None]


def _tokenizer_config(tokenizer: "Tokenizer", config: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    if tokenizer.eot_id is not None:
        token = tokenizer.token_bytes(tokenizer.eot_id).decode("utf-8", "replace")
        values |= {"bos_token": token, "eos_token": token}
    return values | tokenizer.settings


def _read_weights(folder: Path, model: Model, config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    """Every parameter of `model` from the folder's shards, in `dtype`, each shape checked."""
    from safetensors import SafetensorError, safe_open

    wanted = {name: parameter.shape for name, parameter in model.named_parameters()}
    backbone = "model." if config.family == "cllm" else "transformer."
    found: dict[str, Tensor] = {}
    unexpected: list[str] = []
    tied_output: Tensor | None = None
    for file in _weight_files(folder):
        try:
            with safe_open(file, framework="pt") as weights:
                for stored in weights.keys():  # noqa: SIM118  (a handle, not a dict)
                    # A checkpoint of the bare backbone, like OpenAI's GPT-2, leaves out the prefix.
                    name = stored if stored.startswith((backbone, "lm_head.")) else backbone + stored
                    if name.endswith(_NOT_WEIGHTS):
                        continue
                    if name == "lm_head.weight" and config.tie_embeddings:
                        tied_output = weights.get_tensor(stored)
                    elif name not in wanted:
                        unexpected.append(stored)
                    else:
                        found[name] = _checked(stored, weights.get_tensor(stored), wanted[name], dtype)
        except (SafetensorError, OSError) as error:
            what = foreign(file) or f"is not a readable safetensors file: {error}. Copy or download it again."
            raise CheckpointError(f"{file} {what}") from error
    missing = sorted(set(wanted) - set(found))
    if missing or unexpected:
        raise CheckpointError(
            f"the weights in {folder} do not fit its config.json: missing {_some(missing)}, not expected {_some(sorted(unexpected))}."
        )
    embedding = found[f"{backbone}{'embed_tokens' if config.family == 'cllm' else 'wte'}.weight"]
    if tied_output is not None and not torch.equal(tied_output.to(dtype), embedding):
        raise CheckpointError(
            "config.json ties the output projection to the embedding (tie_word_embeddings), but the file holds "
            "a different lm_head.weight. Set tie_word_embeddings to false if the model was trained untied."
        )
    return found


def _checked(name: str, tensor: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
    if tensor.shape != shape:
        raise CheckpointError(f"{name} has the shape {tuple(tensor.shape)}, config.json asks for {tuple(shape)}.")
    if tensor.dtype not in _FLOATS:
        raise CheckpointError(f"{name} is stored as {tensor.dtype}, which is not supported. Save the model as float32, bfloat16 or float16.")
    return tensor.to(dtype)


def _weight_files(folder: Path) -> list[Path]:
    if (folder / WEIGHTS).is_file():
        return [folder / WEIGHTS]
    if (folder / INDEX).is_file():
        names = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(names, dict) or not names:
            raise CheckpointError(f"{folder / INDEX} has no weight_map. Copy or download it again.")
        files = []
        for name in sorted({str(name) for name in names.values()}):
            if Path(name).name != name:
                raise CheckpointError(f"{folder / INDEX} names a file outside its folder: {name!r}.")
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder / name} is missing; {INDEX} lists it. Copy or download it again.")
            files.append(folder / name)
        return files
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which can run any code when opened and is never "
            "read. Convert it where you trust it: model.save_pretrained(folder, safe_serialization=True)."
        )
    raise CheckpointError(f"{folder} has neither {WEIGHTS} nor {INDEX}.")


def _write_weights(state: dict[str, Tensor], folder: Path, dtype: torch.dtype, max_shard_bytes: int) -> None:
    """One file, or shards of at most `max_shard_bytes` (a larger tensor has its own) and an index."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    shards: list[list[str]] = [[]]
    size = total = 0
    for name, tensor in state.items():
        tensor_bytes = tensor.numel() * dtype.itemsize
        if shards[-1] and size + tensor_bytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor_bytes
        total += tensor_bytes
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {name: state[name].detach().to("cpu", dtype).contiguous() for name in names}
        try:
            (folder / file).touch()  # with the permissions that the user gives to files
            mode = (folder / file).stat().st_mode
            save_file(tensors, folder / file, metadata={"format": "pt"})
            (folder / file).chmod(mode)  # safetensors lets nobody else read what it writes: a server of another user would find the model closed
        except SafetensorError as error:
            raise _system_error(error) from error
        weight_map |= dict.fromkeys(names, file)
    if len(shards) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(read_named(path).decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing. Expected a Hugging Face model folder.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} {foreign(path) or f'cannot be read as JSON: {reason(error)}. Copy or download it again.'}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} must hold a JSON object, got {type(values).__name__}.")
    return values


def _system_error(error: Exception) -> OSError:
    """The OSError inside an error of the safetensors library, which says "... (os error 28)"."""
    number = re.search(r"os error (\d+)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", "utf-8")


def _some(names: list[str]) -> str:
    if not names:
        return "nothing"
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
