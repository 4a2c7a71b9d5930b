from cllm.cli import generate as command
from cllm.config.sampling import SAMPLING


def test_the_prompt_is_shown_once_there_is_something_to_follow_it(monkeypatch, capsys):
    """Compiling kernels for the first token says so on stderr, which on a terminal is the same place as stdout."""
    shown = []

    def stream(*given, **options):
        shown.append("compiled")
        yield " world"

    monkeypatch.setattr(command, "check_model", lambda path: None)
    monkeypatch.setattr(command, "load_model", lambda *given, **options: (None, None))
    monkeypatch.setattr("cllm.generate.decoding.stream", stream)
    monkeypatch.setattr("cllm.cli.console.Console.write", lambda self, text: shown.append(text))
    command.generate(checkpoint="m.cllm", prompt="Hello", **dict.fromkeys(SAMPLING))
    assert shown[0] == "compiled" and "".join(shown[1:]) == "Hello world\n"
