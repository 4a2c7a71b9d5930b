"""Every command on real text: what it prints, what it leaves, and how it answers mistakes."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from command import TINY, Started, cllm, lines, wait_until
from safetensors.torch import load_file
from served_model import write_model

from cllm.data.tokens.vocabulary import default_vocab_size


def test_train_leaves_a_whole_run_and_tells_what_comes_next(run):
    for name in ("config.toml", "metrics.jsonl", "log.txt", "tokenizer.json", "data", "checkpoints/latest", "checkpoints/best"):
        assert (run / name).exists(), name
    newest = run / "checkpoints" / "step-00000012"
    assert {path.name for path in newest.iterdir()} == {"model.safetensors", "optimizer.safetensors", "state.json", "manifest.json"}
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, 13))


def test_the_same_command_again_finds_everything_done(run, text):
    again = cllm("train", text, "--out", run, "--steps", 12, "--learning-rate", "3e-3", *TINY, "--json")
    assert again.status == 0 and again.json["step"] == 12 and again.json["resumed_from"] == 12
    assert "cached" in again.err


def test_another_configuration_is_refused_with_the_differences(run, text):
    ran = cllm("train", text, "--out", run, "--steps", 12, "--learning-rate", "1e-3", *TINY)
    assert ran.status == 2 and "learning_rate" in ran.err and "0.003" in ran.err and "--out" in ran.err


def test_plan_prints_sizes_and_trains_nothing(text, tmp_path):
    ran = cllm("train", text, "--out", tmp_path / "planned", "--steps", 50, *TINY, "--plan", "--json")
    assert ran.status == 0 and ran.json["parameters"] > 10_000 and ran.json["tokens_per_second"] > 0
    assert ran.json["settings"]["train.steps"]["source"] == "--steps"
    evaluations = ran.json["evaluations"]
    assert evaluations["seconds"] > 0 and ran.json["total_seconds"] == pytest.approx(ran.json["seconds"] + evaluations["seconds"])
    assert re.search(r"evaluation: [\d,]+ times? (all )?[\d,]+ .*validation tokens.*: about", ran.err) and "in all about" in ran.err
    assert not (tmp_path / "planned" / "checkpoints").exists()


def test_a_plan_that_does_not_fit_says_what_takes_the_memory_and_measures_nothing(text, tmp_path):
    ran = cllm("train", text, "--out", tmp_path / "planned", "--steps", 5, *TINY, "--batch-size", "1e6", "--plan")
    assert ran.status == 2 and "predicted memory:" in ran.out and "activations" in ran.out
    assert "error: out of memory. A step needs about" in ran.err and "--batch-size 500000" in ran.err


def test_ctrl_c_writes_a_checkpoint_exits_130_and_the_same_command_goes_on(text, tmp_path):
    command = ["train", text, "--out", tmp_path / "run", "--steps", 100_000, "--checkpoint-every", 100_000, "--eval-every", 100_000, *TINY]
    process = Started(*command)
    metrics = tmp_path / "run" / "metrics.jsonl"
    wait_until(lambda: lines(metrics) > 3, process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    step = int((tmp_path / "run" / "checkpoints" / "latest").read_text().split("-")[-1])
    assert step >= 3 and "cllm train --resume" in err
    command[command.index("--steps") + 1] = 100_000
    process = Started(*command)
    rows = lines(metrics)
    wait_until(lambda: lines(metrics) >= rows + 3, process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 130 and f"resuming after step {step:,}" in err, err


def test_generate_is_repeatable_and_greedy_needs_no_cache(run):
    options = ("generate", run, "--prompt", "def ", "--max-tokens", 20, "--json")
    first, second = cllm(*options, "--seed", 3), cllm(*options, "--seed", 3)
    assert first.status == 0 and first.json["texts"] == second.json["texts"]
    greedy = [cllm(*options, "--temperature", 0, *extra).json["tokens"] for extra in ((), ("--no-cache",))]
    assert greedy[0] == greedy[1] and len(greedy[0][0]) > 0
    in_int8 = [cllm(*options, "--temperature", 0, "--kv-cache", "int8", *extra).json["tokens"] for extra in ((), ("--no-cache",))]
    assert in_int8[0] == in_int8[1]


def test_a_draft_model_changes_nothing_and_has_to_know_the_same_tokens(run, tmp_path):
    options = ("generate", run, "--prompt", "def ", "--max-tokens", 20, "--seed", 3)
    assert cllm(*options, "--draft", run).out == cllm(*options).out
    write_model(tmp_path / "other.cllm")
    refused = cllm(*options, "--draft", tmp_path / "other.cllm")
    assert refused.status == 2 and "has another tokenizer" in refused.err
    assert cllm(*options, "--draft", run, "--no-cache").status == cllm("generate", run, "--prompt", "a", "--beams", 2, "--draft", run).status == 2


def test_a_prompt_may_be_in_any_charset_and_begin_with_a_mark(run, tmp_path):
    text = "# gr\u00f6\u00dfer als ein St\u00fcck\ndef "
    (tmp_path / "marked.txt").write_bytes(text.encode("utf-8-sig"))
    (tmp_path / "old.txt").write_bytes(text.encode("cp1252"))
    options = ("--max-tokens", 3, "--temperature", 0)
    marked = cllm("generate", run, "--prompt-file", tmp_path / "marked.txt", "--json", *options)
    assert marked.status == 0 and marked.json["prompt"] == text
    old = cllm("generate", run, "--prompt-file", tmp_path / "old.txt", *options)
    assert old.status == 0 and old.out.startswith(text) and "old.txt from cp1252 (a guess)" in old.err
    said = cllm("generate", run, "--prompt-file", tmp_path / "old.txt", "--encoding", "cp437", "--json", *options)
    assert said.json["prompt"] == text.encode("cp1252").decode("cp437") and "guess" not in said.err


def test_generate_streams_the_same_text_that_it_returns(run):
    options = ("generate", run, "--prompt", "import ", "--max-tokens", 12, "--temperature", 0)
    assert cllm(*options).out == cllm(*options, "--no-stream").out


def test_evaluate_measures_a_model_on_new_text(run, tmp_path):
    (tmp_path / "new.txt").write_text("def add(a, b):\n    return a + b\n" * 40)
    ran = cllm("evaluate", run, tmp_path / "new.txt", "--json")
    assert ran.status == 0 and 0 < ran.json["loss"] < 8 and 0 <= ran.json["accuracy"] <= 1
    assert ran.json["perplexity"] == pytest.approx(2.718281828 ** ran.json["loss"], rel=1e-3) and ran.json["bits_per_byte"] > 0


def test_a_model_goes_to_hugging_face_and_back_without_a_changed_bit(run, tmp_path):
    assert cllm("export", run, "--to", "hf", "--out", tmp_path / "hf").status == 0
    assert cllm("import", tmp_path / "hf", "--out", tmp_path / "back.cllm").status == 0
    assert cllm("export", run, "--to", "cllm", "--out", tmp_path / "direct.cllm").status == 0
    back, direct = load_file(tmp_path / "back.cllm"), load_file(tmp_path / "direct.cllm")
    assert back.keys() == direct.keys() and all(back[name].equal(direct[name]) for name in back)


def test_tokenizer_commands_round_trip(text, tmp_path):
    place = tmp_path / "tokenizer.json"
    chosen = cllm("tokenizer", "train", text, "--out", place, "--json").json["vocab_size"]
    assert chosen == default_vocab_size(sum(each.stat().st_size for each in text.rglob("*.py")))  # as `cllm train` chooses it
    assert cllm("tokenizer", "train", text, "--vocab-size", 400, "--out", place, "--json").json["vocab_size"] == 448
    words = "def main():\n    return 'caf\u00e9'\n"
    tokens = cllm("tokenizer", "encode", place, "--json", stdin=words).json["tokens"]
    assert cllm("tokenizer", "decode", place, *tokens, "--json").json["text"] == words
    stats = cllm("tokenizer", "stats", place, text / "bisect.py", "--json")
    assert stats.status == 0 and stats.json["bytes_per_token"] > 1


def test_packed_tokens_train_as_they_are_and_a_foreign_tokenizer_is_refused(run, text, tmp_path):
    assert cllm("pack", text, "--tokenizer", run, "--out", tmp_path / "tokens").status == 0
    folder = tmp_path / "tokens" / "tokens" if (tmp_path / "tokens" / "tokens").exists() else tmp_path / "tokens"
    assert cllm("evaluate", run, folder, "--json").status == 0
    assert cllm("tokenizer", "train", text, "--vocab-size", 300, "--out", tmp_path / "other.json").status == 0
    ran = cllm("train", folder, "--tokenizer", tmp_path / "other.json", "--out", tmp_path / "run", "--steps", 2, *TINY)
    assert ran.status == 1 and "tokenizer" in ran.err


def test_doctor_and_explain_answer_for_people_and_programs():
    ran = cllm("doctor", "--json")
    assert ran.status == 0 and ran.json["devices"][0]["workers"] >= 1 and ran.json["operations"]["attention"]["float32"]["backend"]
    assert "usable core" in cllm("doctor").out
    ran = cllm("explain", "matmul", "512x768", "768x3072", "--threads", 64)
    assert ran.status == 0 and "64 workers" in ran.out and "not torch" in ran.out
    shape = ("explain", "attention", "1x24x4x32", "--threads", 2, "--json")
    assert [cllm(*shape, *more).json["workers"] for more in ((), ("--set", "causal=true"))] == [2, 1]


MISTAKES = {
    "missing folder": (["train", "no/such/folder"], 1, "no/such/folder"),
    "nothing to learn from": (["train"], 2, "give a folder or file"),
    "empty folder": (["train", "{empty}"], 1, "empty"),
    "one-byte file": (["train", "{byte}"], 1, "1 character"),
    "binary file": (["train", "{binary}"], 1, "binary"),
    "unknown option": (["train", "{byte}", "--lerning-rate", "1"], 2, "--learning-rate"),
    "wrong type": (["train", "{byte}", "--steps", "ten"], 2, "--steps"),
    "value out of range": (["train", "{byte}", "--learning-rate", "-1e-3"], 2, "learning_rate must be > 0"),
    "unknown setting": (["train", "{byte}", "--set", "optim.beta3=1"], 2, "beta"),
    "unknown preset": (["train", "{words}", "--preset", "cllm-2m"], 2, "cllm-1m"),
    "sequence longer than the data": (["train", "{words}", "--seq-len", "100000"], 1, "seq-len"),
    "threads": (["train", "{words}", "--threads", "0"], 2, "threads"),
    "no run to resume": (["train", "--resume", "--out", "{empty}"], 2, "config.toml"),
    "no checkpoint": (["generate", "{empty}", "--prompt", "x"], 1, "checkpoint"),
    "not a checkpoint": (["generate", "{words}", "--prompt", "x"], 1, "words"),
    "no prompt": (["generate", "{empty}"], 2, "--prompt"),
    "unknown operation": (["explain", "attenton", "1x2"], 2, "attention"),
    "not a shape": (["explain", "matmul", "axb"], 2, "1x1024"),
    "too few shapes": (["explain", "matmul", "8x9"], 2, "b (K, N)"),
    "not an option of the operation": (["explain", "attention", "1x24x4x32", "--set", "casual=true"], 2, "causal"),
    "not a value": (["explain", "attention", "1x24x4x32", "--set", "causal=perhaps"], 2, "causal=true"),
    "unknown format": (["export", "{empty}", "--to", "onnx", "--out", "x"], 2, "hf"),
    "unknown command": (["trian"], 2, "trian"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_clear_line_and_the_right_exit_status(mistake, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "byte.txt").write_text("x")
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)) * 8)
    (tmp_path / "words.txt").write_text("some words to learn from, " * 30)
    places = {name.partition(".")[0]: str(tmp_path / name) for name in ("empty", "byte.txt", "binary.bin", "words.txt")}
    arguments, status, words = MISTAKES[mistake]
    ran = cllm(*(argument.format(**places) for argument in arguments), cwd=tmp_path)
    assert ran.status == status and words in ran.err, f"{ran.status}: {ran.err}"


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every file")
def test_an_unreadable_file_is_named(tmp_path):
    (tmp_path / "secret.txt").write_text("words " * 100)
    (tmp_path / "secret.txt").chmod(0)
    ran = cllm("train", tmp_path / "secret.txt")
    assert ran.status == 1 and "secret.txt" in ran.err


def test_a_mistake_under_json_is_an_object_too():
    ran = cllm("evaluate", "nowhere", "nothing", "--json")
    assert ran.status == 1 and ran.json["exit_status"] == 1 and "nowhere" in ran.json["error"]


@pytest.mark.parametrize("command", ["train", "generate", "evaluate", "pack", "export", "import", "doctor", "explain", "tokenizer train"])
def test_every_command_explains_itself_with_examples(command):
    ran = cllm(*command.split(), "--help")
    assert ran.status == 0 and f"cllm {command}" in ran.out.split("Examples:")[1] and "--json" in ran.out


def test_find_lr_prints_a_table_suggests_a_rate_and_leaves_no_run(text, tmp_path):
    ran = cllm("train", text, "--out", tmp_path / "tried", "--find-lr", "--set", "optim.optimizer=muon", *TINY, "--json")
    assert ran.status == 0 and ran.json["optimizer"] == "muon" and 1e-6 < ran.json["suggestion"] < 1
    assert "learning rate" in ran.err and "lowest" in ran.err and f"--learning-rate {ran.json['suggestion']:g}" in ran.err
    assert not (tmp_path / "tried" / "checkpoints").exists() and not (tmp_path / "tried" / "config.toml").exists()
    shown = shlex.split(ran.err.partition("Begin with: ")[2].splitlines()[0])
    assert "Learning rates are tried from new weights (seed 0)" in ran.err
    given = [str(each) for each in (text, "--out", tmp_path / "tried", *TINY[:4], "--set", "optim.optimizer=muon")]
    assert shown[:2] == ["cllm", "train"] and all(each in shown for each in given)
    if ran.json["picture"]:
        assert (tmp_path / "tried" / "find-lr.png").read_bytes().startswith(b"\x89PNG")


def test_a_learning_rate_is_found_for_the_weights_that_are_given_and_not_for_those_of_a_run_that_is_there(run, text, tmp_path):
    assert cllm("export", run, "--to", "cllm", "--out", tmp_path / "start.cllm").status == 0
    shutil.copytree(run, tmp_path / "run", symlinks=True)
    given = ("--from", tmp_path / "start.cllm", "--seq-len", 32, "--batch-size", 2, "--threads", 2)
    ran = cllm("train", text, "--out", tmp_path / "run", "--find-lr", *given)
    assert ran.status == 0 and f"tried from the weights of {tmp_path / 'start.cllm'}, which no run keeps" in ran.out
    assert f"Begin with: cllm train {text} --from {tmp_path / 'start.cllm'}" in ran.out and ran.out.rstrip().endswith("--out NEW")


def test_a_run_with_another_optimizer_and_restored_weights_is_used_like_any_other(text, tmp_path):
    options = ("--steps", 6, "--eval-every", 2, "--set", "optim.optimizer=schedule_free", "--set", "train.restore_best=true", *TINY)
    ran = cllm("train", text, "--out", tmp_path / "run", *options, "--json")
    assert ran.status == 0 and ran.json["validation"]["loss"] == ran.json["best_loss"]
    again = cllm("train", "--resume", "--out", tmp_path / "run", "--json")
    assert again.status == 0 and again.json["resumed_from"] == 6 and again.json["best_loss"] == ran.json["best_loss"]
    assert cllm("generate", tmp_path / "run", "--prompt", "def ", "--max-tokens", 5, "--json").status == 0
    wrong = cllm("train", text, "--out", tmp_path / "other", "--set", "optim.optimizer=muom", *TINY)
    assert wrong.status == 2 and "Did you mean 'muon'?" in wrong.err


@pytest.mark.parametrize(
    "options",
    [("--temperature", -1), ("--top-p", 2), ("--max-tokens", 0), ("--stop", ""), ("--prompt", "a b " * 200), ("--prompt", "\udcff")],
    ids=str,
)
def test_nothing_is_printed_before_all_options_are_found_good(run, options):
    ran = cllm("generate", run, *(() if "--prompt" in options else ("--prompt", "def ")), *options)
    assert ran.status == 2 and ran.out == "" and ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("train", "--lr", "1"), "there is no option --lr. Did you mean --learning-rate? See cllm train --help."),
        (("train", "--weight-decay", "1"), "Did you mean --set optim.weight_decay=VALUE?"),
        (("train", "--n-layer=3"), "Did you mean --num-layers?"),
        (("train", "--find-rl"), "Did you mean --find-lr?"),
        (("generate", "M", "--promt", "x"), "there is no option --promt. Did you mean --prompt? See cllm generate --help."),
        (("trian",), "no such command 'trian'. Did you mean 'train'? See cllm --help."),
        (("tokenizer", "trane"), "Did you mean 'train'? See cllm tokenizer --help."),
        (("generate",), "missing argument 'CKPT'. See cllm generate --help."),
        (("generate", "M", "N"), "unexpected extra argument"),
        (("generate", "M", "--prompt"), "option '--prompt' requires an argument."),
        (("export", "M"), "missing option '--to'"),
    ],
)
def test_a_mistake_in_the_command_line_is_one_line_that_says_what_is_meant(arguments, words):
    ran = cllm(*arguments)
    assert ran.status == 2 and ran.out == "" and words in ran.err and ran.err.startswith("error: ") and ran.err.count("\n") == 1


def test_a_mistake_in_the_command_line_is_an_object_under_json():
    told = cllm("train", "--lr", 1, "--json").json
    assert told["exit_status"] == 2 and "--learning-rate" in told["error"]


def test_a_command_without_arguments_shows_its_help():
    assert "Commands:" in cllm("tokenizer").err


def test_the_commands_that_are_shown_next_can_be_pasted_also_from_a_terminal_that_knows_only_ascii(tmp_path):
    folder, out = tmp_path / "-it's \x1b[31m", tmp_path / "-my \u00e9\n$HOME run"
    folder.mkdir()
    (folder / "na\u00efve.txt").write_text("There was a king \u4e2d\U0001f600, and he had three daughters. " * 60)
    (tmp_path / "OTHER-TEXT").write_text("There was a queen as well, of whom nobody had told the model. " * 60)  # stands for text of one's own
    ran = cllm("train", f"./{folder.name}", "--out", f"./{out.name}", "--steps", 2, *TINY, cwd=tmp_path, PYTHONIOENCODING="ascii")
    shown = [line.strip() for line in ran.out.split("Next:\n")[1].splitlines()]
    assert ran.status == 0 and [line.split()[1] for line in shown] == ["generate", "evaluate", "report", "export"]
    assert (ran.out + ran.err).isascii() and "\x1b" not in ran.out + ran.err
    # The shell makes the words of each command; one process runs them all, so that the library is loaded once.
    script = "cllm() { printf '%s\\0' \"$@\" '//'; }\n" + "\n".join(shown)
    words = subprocess.run(["bash", "-c", script], capture_output=True, check=True).stdout.decode().split("\0//\0")[:-1]
    loop = "import json, sys\nfrom cllm.cli.app import main\nfor words in json.loads(sys.argv[1]):\n    try: main(words)\n"
    loop += "    except SystemExit as end: print('ended', end.code, flush=True)\n"
    program = [sys.executable, "-c", loop, json.dumps([each.split("\0") for each in words])]
    done = subprocess.run(program, cwd=tmp_path, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert done.stdout.count("ended 0") == 4, done.stdout + done.stderr
    assert (out / "report.html").exists() and (tmp_path / f"{out.name}-hf" / "config.json").exists()


def test_a_command_that_is_shown_works_also_where_the_environment_is_not_activated(tmp_path):
    """The installed script is called by its path, as `make demo` calls it; what it shows is run as it stands."""
    script = os.path.relpath(Path(sys.executable).parent / "cllm", tmp_path)
    environment = {**os.environ, "PATH": "/usr/bin:/bin"}
    if not (tmp_path / script).exists():
        pytest.skip("cllm is not installed beside this Python")
    for start in (script, f"{shlex.quote(sys.executable)} -m cllm"):
        run = partial(subprocess.run, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        shown = run(f"{start} train --resume --out missing").stderr.partition("Start one with: ")[2].strip()
        assert shown == f"{start} train DATA --out missing"
        assert "DATA does not exist" in run(shown).stderr
