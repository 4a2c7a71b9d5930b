"""The options of `cllm`: which there are, that each setting is declared in one place, and what a wrong value is told."""

import dataclasses
import inspect
import os
import subprocess
import sys

import pytest
import torch
from command import cllm, python
from commands import COMMANDS, options

from cllm import Model, ModelConfig, save
from cllm.cli.evaluate import GROUPINGS
from cllm.cli.options import load_model
from cllm.config.follow import FOLLOW
from cllm.config.sampling import SAMPLING, Sampling
from cllm.config.schema import SETTINGS
from cllm.evaluate import documents
from cllm.runtime import gpu

FLAGS = {
    "train": """--out --config --resume --plan --find-lr --follow --once --replay --tolerance --round-bytes --look-every --keep-text
        --set --json --from --lora-rank --tokenizer --tokenizer-sample --device --threads --precision --preset --architecture
        --vocab-size --embed-dim --num-layers --num-heads --num-kv-heads --ffn-dim --seq-len --batch-size --grad-accum --steps --epochs
        --hours --minutes
        --learning-rate --min-lr --warmup --schedule --dropout --fim-rate --seed --checkpoint-every --keep --eval-every --patience --sample-every
        --on-nonfinite --overfit-one-batch""",
    "generate": """--context --stretch --prompt --prompt-file --suffix --encoding --max-tokens --stop --seed --samples --beams --length-penalty
        --json-schema --regex --grammar --no-cache --stream --weights --kv-cache --draft --device --threads --json
        --temperature --top-k --top-p --min-p --typical-p --repetition-penalty --presence-penalty --frequency-penalty""",
    "chat": """--context --stretch --system --max-tokens --seed --weights --kv-cache --draft --device --threads --json
        --temperature --top-k --top-p --min-p --typical-p --repetition-penalty --presence-penalty --frequency-penalty""",
}


@pytest.mark.parametrize("command", FLAGS)
def test_the_flags_of_commands_are_frozen(command):
    """Of `train`, further settings go through --set; a flag is for what most users change."""
    assert set(options(command)) == set(FLAGS[command].split())


@pytest.mark.parametrize(("command", "settings", "others"), [("train", SETTINGS | FOLLOW, 9), ("generate", SAMPLING, 23), ("chat", SAMPLING, 11)])
def test_the_help_of_a_flag_is_the_help_of_its_setting(command, settings, others):
    declared = {each.option: each for each in settings.values()}
    made = {
        name: option for name, option in options(command).items() if name in declared and not (command != "train" and name in ("--seed", "--device"))
    }
    assert len(made) == len(options(command)) - others
    for name, option in made.items():
        each = declared[name]
        default = 0.7 if (command, name) == ("chat", "--temperature") else each.default
        assert option.help == each.help + ("" if default in (None, "") or each.types == (bool,) else f" [default: {default}]")


@pytest.mark.parametrize("key", SETTINGS)
def test_a_flag_is_named_like_its_setting(key):
    assert SETTINGS[key].option == ("--from" if key == "finetune.start_from" else "--" + key.partition(".")[2].replace("_", "-"))


def test_what_is_named_here_and_in_the_library_is_the_same():
    assert GROUPINGS == documents.GROUPINGS
    assert list(inspect.signature(Sampling).parameters) == [*SAMPLING, "logit_bias"]


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_option_and_argument_is_explained_in_a_sentence(command):
    for each in COMMANDS[command].params:
        assert each.help and each.help.rstrip("])")[-1] in ".:0123456789abcdefghijklmnopqrstuvwxyz", each.name


@pytest.mark.parametrize("group", [(), ("checkpoint",), ("data",), ("tokenizer",)])
def test_the_list_of_commands_says_of_each_in_a_whole_sentence_what_it_does(group, monkeypatch, capsys):
    from cllm.cli.app import main

    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        main([*group, "--help"])
    page = capsys.readouterr().out
    listed = page.partition("Commands:\n")[2].splitlines()
    assert listed and all(line.endswith(".") and "..." not in line for line in listed), page


def test_the_help_pages_import_nothing_that_computes():
    """Numbers of modules, not of seconds: torch alone brings more than a thousand."""
    script = "import sys; from cllm.cli.app import parser; parser(); print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "numpy", "numba", "triton", "safetensors", "tokenizers", "rich", "psutil"}
    assert not heavy & set(modules) and len(modules) < 500


def test_the_command_line_is_imported_without_a_look_at_the_environment():
    """What is asked for is known only when a command begins: the tests fork commands from a process that has imported it."""
    script = "import os\nread = type(os.environ).__getitem__\nasked = []\n"
    script += "def spy(environment, name):\n    asked.append(name)\n    return read(environment, name)\n"
    script += "type(os.environ).__getitem__ = spy\nfrom cllm.cli.app import parser\nparser()\nimport cllm\nprint(cllm.cli.app.__name__, asked)"
    assert python("-c", script).out == "cllm.cli.app []\n"


WRONG = [
    (("generate", "M", "--prompt", "x", "--samples", "x"), "--samples must be a whole number, got 'x'."),
    (("generate", "M", "--prompt", "x", "--samples", "0"), "--samples must be >= 1, got 0."),
    (("generate", "M", "--prompt", "x", "--max-tokens", "1.5"), "--max-tokens must be a whole number, got '1.5'. Use a value like 200."),
    (("generate", "M", "--prompt", "x", "--temperature", "-1"), "temperature must be >= 0.0, got -1.0 (from --temperature). Use a value like 0.8."),
    (
        ("generate", "M", "--prompt", "x", "--temperature", "hot"),
        "temperature must be a number, got 'hot' (from --temperature). Use a value like 0.8.",
    ),
    (("generate", "M", "--prompt", "x", "--temperature", "nan"), "temperature must be a finite number, got nan (from --temperature)."),
    (("generate", "M", "--prompt", "x", "--top-p", "0"), "top_p must be > 0.0, got 0.0 (from --top-p). Use a value like 0.95."),
    (("generate", "M", "--prompt", "x", "--top-k", "0"), "top_k must be >= 1, got 0 (from --top-k). Use a value like 40."),
    (("generate", "M", "--prompt", "x", "--seed", "-1"), "--seed must be >= 0, got -1."),
    (("generate", "M", "--prompt", "x", "--seed", "1e30"), "--seed must be a whole number, got '1e30'."),
    (("generate", "M", "--prompt", "x", "--weights", "int16"), "--weights must be one of fp32, bf16, int8, int4, got 'int16'. Did you mean 'int8'?"),
    (("serve", "M", "--kv-cache", "int4"), "--kv-cache must be one of int8, got 'int4'. Did you mean 'int8'?"),
    (("generate", "M", "--prompt", "x", "--device", "gpu"), "--device must be one of auto, cpu, cuda, got 'gpu'. Did you mean 'cpu'?"),
    (("generate", "M", "--prompt", "x", "--threads", "0"), "--threads must be >= 1, got 0. Use a value like 2."),
    (("generate", "M", "--prompt", "x", "--regex", "a", "--grammar", "b"), "give only one of --json-schema, --regex and --grammar."),
    (("generate", "M", "--prompt", "x", "--length-penalty", "2"), "--length-penalty is for a beam search. Give --beams as well."),
    (
        ("generate", "M", "--prompt", "x", "--beams", "2", "--top-p", "0.5"),
        "--beams searches for the likeliest text, and --top-p cannot be used with",
    ),
    (("generate", "M", "--prompt", "x", "--beams", "0"), "--beams must be >= 1, got 0."),
    (("generate", "M", "--prompt", "x", "--suffix", ""), "--suffix is empty. Give a value, or leave the option out."),
    (("train", "x", "--fim-rate", "2"), "fim_rate must be <= 1.0, got 2.0 (from --fim-rate). Use a value like 0.5."),
    (("generate", "M"), "give the text to continue either as --prompt or as --prompt-file."),
    (("chat", "M", "--min-p", "1.5"), "min_p must be <= 1.0, got 1.5 (from --min-p)."),
    (("evaluate", "M", "x", "--by", "flie"), "--by must be one of auto, file, folder, got 'flie'. Did you mean 'file'?"),
    (("evaluate", "M", "x", "--confidence", "1"), "--confidence must be < 1.0, got 1.0. Use a value like 0.95."),
    (("evaluate", "M", "x", "--worst", "-1"), "--worst must be >= 0, got -1."),
    (("generate", "", "--prompt", "x"), "CKPT is empty. Give a value, or leave the option out."),
    (("generate", "https://x.org/m", "--prompt", "x"), "CKPT must be a file or folder on this machine, got 'https://x.org/m'. CLLM does not use"),
    (("generate", "M", "--prompt-file", ""), "--prompt-file is empty."),
    (("generate", "M", "--prompt", "x", "--stop", "a", "--stop", ""), "--stop is empty."),
    (("checkpoint", "average", "s3://a", "M", "--out", "x.cllm"), "CKPT must be a file or folder on this machine, got 's3://a'."),
    (("checkpoint", "average", "M", "--out", "x"), "--out must name a .cllm file, got 'x'. Use a name like model.cllm."),
    (("import", "M", "--out", "x.bin"), "--out must name a .cllm file, got 'x.bin'."),
    (("export", "M", "--to", "gguf", "--out", "x"), "--out must name a .gguf file, got 'x'."),
    (("export", "M", "--to", "cllm", "--out", "x"), "--out must name a .cllm file, got 'x'."),
    (("export", "M", "--to", "hf", "--out", "/etc"), "/etc exists already and is not an empty folder."),
    (("generate", "M", "--prompt", "x", "--samples", "1e9"), "--samples must be <= 10000, got 1000000000."),
    (("tokenizer", "train", "x", "--vocab-size", "1e12"), "--vocab-size must be <= 1000000, got 1000000000000."),
    (("tokenizer", "decode", "M", "9" * 5000), "token ids must be whole numbers, got '99999"),
    (("train", "x", "--vocab-size", "1e12"), "vocab_size must be <= 1000000, got 1000000000000 (from --vocab-size)."),
    (("train", "x", "--plan", "--find-lr"), "--plan and --find-lr exclude each other"),
    (("report", ""), "RUN is empty."),
    (("pack", "x", "--tokenizer", "x", "--out", "/etc"), "/etc holds other files and no packed tokens. Choose a new folder with --out."),
    (("tokenizer", "train", __file__, "--out", __file__), f"--out {__file__} is the text itself, which would be lost."),
    (("tokenizer", "decode", "M", "1", "x"), "token ids must be whole numbers, got 'x'."),
    (("train", "x", "--from", ""), "start_from is empty (from --from)."),
    (("train", ""), "path is empty (from DATA)."),
    (("evaluate", "M"), "give either DATA (text to predict) or --tasks (tasks of lm-evaluation-harness)."),
    (("export", "M", "--to", "ggul", "--out", "x"), "--to must be one of hf, gguf, cllm, got 'ggul'. Did you mean 'gguf'?"),
    (("export", "M", "--to", "hf", "--out", "x", "--type", "q8_0"), "--type q8_0 is for --to gguf alone; --to hf takes one of f32, f16, bf16."),
    (("export", "M", "--to", "hf", "--out", "x", "--type", "int8"), "--type int8 is for --to cllm alone; --to hf takes one of f32, f16, bf16."),
    (
        ("export", "M", "--to", "cllm", "--out", "x.cllm", "--type", "q8_0"),
        "--type q8_0 is for --to gguf alone; --to cllm takes one of f32, f16, bf16, int8.",
    ),
    (("checkpoint", "average", "M", "--out", "x", "--last", "1"), "--last must be >= 2, got 1. Use a value like 5."),
    (("tokenizer", "train", "x", "--kind", "bpee"), "--kind must be one of bpe, wordpiece, unigram, char, got 'bpee'. Did you mean 'bpe'?"),
    (("tokenizer", "train", "x", "--vocab-size", "10"), "--vocab-size must be >= 257, got 10. Use a value like 4096."),
    (("pack", "x", "--tokenizer", "x", "--out", "y", "--val-fraction", "2"), "val_fraction must be < 1.0, got 2.0 (from --val-fraction)."),
]


@pytest.mark.parametrize(("arguments", "words"), WRONG, ids=lambda each: " ".join(each) if isinstance(each, tuple) else "")
def test_a_wrong_value_says_what_was_expected_before_anything_is_read(arguments, words, capsys):
    from cllm.cli.app import main

    with pytest.raises(SystemExit) as ended:
        main(list(arguments))
    told = capsys.readouterr()
    assert ended.value.code == 2 and told.out == "" and told.err.startswith(f"error: {words}") and told.err.count("\n") == 1


@pytest.mark.parametrize("arguments", [("--samples", "1e0"), ("--max-tokens", "2_0"), ("--top-k", "none"), ("--top-k", "4e1"), ("--threads", "none")])
def test_numbers_are_read_as_settings_read_them(arguments, capsys):
    from cllm.cli.app import main

    with pytest.raises(SystemExit) as ended:
        main(["generate", "/nowhere", "--prompt", "x", *arguments])
    assert ended.value.code == 1 and "/nowhere does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(("arch", "asked", "dtype"), [(80, None, "bfloat16"), (80, "fp32", "float32"), (75, None, "float32")])
def test_on_a_gpu_weights_are_bf16_unless_asked_otherwise(tmp_path, monkeypatch, arch, asked, dtype):
    path = tmp_path / "model.cllm"
    save(Model(ModelConfig.preset("cllm-1m", vocab_size=320, num_layers=1)), path)
    monkeypatch.setattr("cllm.runtime.device.resolve", lambda device: (torch.device("cuda", 0), "there is one"))
    moved = []
    move = Model.to
    monkeypatch.setattr(Model, "to", lambda self, to: moved.append(to) if isinstance(to, torch.device) else move(self, to))
    with gpu.described(dataclasses.replace(gpu.DESCRIBED["a100"], arch=arch)):
        model, _ = load_model(str(path), need_tokenizer=False, weights=asked, device="cuda")
    assert moved == [torch.device("cuda", 0)] and str(model.compute_dtype) == f"torch.{dtype}"


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (("generate", "M", "--prompt", "caf\udce9"), "--prompt"),
        (("generate", "M", "--prompt", "x", "--stop", "a", "--stop", "\udce9"), "--stop"),
        (("chat", "M", "--system", "\udce9"), "--system"),
        (("tokenizer", "encode", "M", "\udce9"), "TEXT"),
        (("train", "x", "--set", "data.separator=\udce9"), "--set"),
        (("evaluate", "M", "x", "--text-field", "\udce9"), "--text-field"),
    ],
)
def test_text_that_the_locale_cannot_decode_is_refused_with_the_locale_and_what_to_set(arguments, what, monkeypatch, capsys):
    from cllm.cli.app import main

    for charset, locale, remedy in (("ascii", "C", "set LC_ALL=C.UTF-8 or PYTHONUTF8=1"), ("utf-8", "C.UTF-8", "Convert it to UTF-8")):
        monkeypatch.setattr(sys, "getfilesystemencoding", lambda charset=charset: charset)
        monkeypatch.setenv("LC_ALL", locale)
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        told = capsys.readouterr()
        assert ended.value.code == 2 and told.out == "" and told.err.count("\n") == 1
        start = f"error: {what} holds the byte 0xe9, which is no {charset.upper()}, and the locale (LC_ALL={locale}) says"
        assert told.err.startswith(start) and remedy in told.err


def test_a_prompt_in_a_terminal_without_a_locale_is_refused_in_one_line():
    ran = cllm("generate", "M", "--prompt", os.fsdecode("caf\u00e9".encode()), LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert ran.status == 2 and "the byte 0xc3, which is no ASCII, and the locale (LC_ALL=C)" in ran.err and ran.err.count("\n") == 1
