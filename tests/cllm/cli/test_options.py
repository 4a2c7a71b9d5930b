"""The options of `cllm`: which there are, and that each setting is declared in one place."""

import subprocess
import sys

import pytest
import typer

from cllm.cli.app import app
from cllm.config.schema import FIELDS, flag, full_key

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]

FLAGS_OF_TRAIN = """
    --out --config --resume --plan --find-lr --set --json --from --lora-rank --tokenizer --device --threads --precision --preset --vocab-size
    --embed-dim --num-layers --num-heads --num-kv-heads --ffn-dim --seq-len --batch-size --grad-accum --steps --epochs --learning-rate --min-lr
    --warmup --schedule --seed --checkpoint-every --keep --eval-every --patience --sample-every --on-nonfinite --overfit-one-batch
"""


def options(command):
    return {name: each for each in COMMANDS[command].params if each.param_type_name == "option" for name in each.opts}


def test_the_flags_of_train_are_frozen():
    """Further settings go through --set; a flag is for what most users change."""
    assert set(options("train")) == set(FLAGS_OF_TRAIN.split())


def test_the_help_of_a_flag_is_the_help_of_its_setting():
    ours = {"--out", "--config", "--resume", "--plan", "--find-lr", "--set", "--json"}
    keys = {flag(key): key for key in FIELDS}
    made = [(option, FIELDS[keys[name]]) for name, option in options("train").items() if name not in ours]
    assert len(made) == len(FLAGS_OF_TRAIN.split()) - len(ours)
    for option, field in made:
        shown = "" if field.default in (None, "") or field.type == "bool" else f" [default: {field.default}]"
        assert option.help == field.metadata["help"] + shown


@pytest.mark.parametrize("name", FIELDS)
def test_a_flag_is_named_like_its_setting(name):
    assert flag(name) == ("--from" if name == "finetune.start_from" else "--" + name.partition(".")[2].replace("_", "-"))
    assert full_key(name.partition(".")[2]) == name


def test_the_help_pages_import_nothing_that_computes():
    """Numbers of modules, not of seconds: torch alone brings more than a thousand."""
    script = "import sys, typer; from cllm.cli.app import app; typer.main.get_command(app); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "numpy", "numba", "triton", "safetensors", "tokenizers", "rich", "psutil", "charset_normalizer"}
    assert not heavy & set(modules) and len(modules) < 500
