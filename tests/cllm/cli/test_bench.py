"""`cllm bench` finds the repository's scripts, passes options through, and says plainly when there is no repository."""

import json
import os

import pytest
from command import cllm

from cllm.cli.bench import BENCHMARKS, CHECKOUT, run, script
from cllm.cli.console import Console
from cllm.runtime.errors import CLLMError, UserError


@pytest.fixture
def checkout(tmp_path):
    (tmp_path / "pyproject.toml").touch()
    (tmp_path / "profiling").mkdir()
    (tmp_path / "profiling" / "train.py").write_text(
        "import json, sys\n"
        "print('a table')\n"
        "if '--fail' in sys.argv: sys.exit(int(sys.argv[-2]))\n"
        "print(json.dumps(sys.argv[1:]) if '--json' in sys.argv else 'the end')\n"
    )
    return tmp_path


def test_the_scripts_of_this_checkout_are_found():
    assert script("train") == CHECKOUT / "profiling" / "train.py" and "scaling" in BENCHMARKS


def test_without_the_repository_the_error_names_the_command(tmp_path):
    with pytest.raises(UserError, match=r"repository.*python profiling/memory\.py"):
        script("memory", tmp_path)


def test_an_unknown_benchmark_names_the_nearest(checkout):
    with pytest.raises(UserError, match="did you mean scaling"):
        script("scalin", checkout)


def test_options_reach_the_script_and_its_output_the_screen(checkout, capfd):
    run("train", ["--rounds", "3"], Console(), checkout)
    assert capfd.readouterr().out == "a table\nthe end\n"


def test_with_json_stdout_is_one_object_and_the_table_goes_to_stderr(checkout, capfd):
    run("train", ["--rounds", "3"], Console(as_json=True), checkout)
    printed = capfd.readouterr()
    assert json.loads(printed.out) == {"benchmark": "train", "rows": ["--rounds", "3", "--json"]}
    assert printed.err == "a table\n"


def test_a_script_ends_with_the_command_that_was_interrupted(checkout, tmp_path):
    (checkout / "profiling" / "train.py").write_text("import os, time\nprint(os.getpid(), flush=True)\nprint('more', flush=True)\ntime.sleep(60)\n")
    told = []

    class Interrupted(Console):
        def print(self, text="", end="\n"):
            told.append(int(text))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run("train", [], Interrupted(as_json=True), checkout)
    with pytest.raises(ProcessLookupError):
        os.kill(told[0], 0)


@pytest.mark.parametrize(("status", "error"), [(1, CLLMError), (2, UserError)])
def test_a_script_that_fails_fails_the_command(checkout, capfd, status, error):
    with pytest.raises(CLLMError, match=f"ended with status {status}") as raised:
        run("train", ["--fail", str(status)], Console(as_json=True), checkout)
    assert type(raised.value) is error
    assert "a table" in capfd.readouterr().err


def test_the_command_refuses_an_unknown_benchmark_whatever_its_options():
    ran = cllm("bench", "nothing", "--rounds", 3, "--json")
    assert ran.status == 2 and "kernels, train, generate, scaling, memory" in ran.json["error"]
