"""The command line."""


def main() -> None:
    """The `cllm` command."""
    from cllm.cli.app import main as run

    run()
