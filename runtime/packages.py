"""The libraries that are installed."""


def version(name: str) -> str:
    """The version of an installed package, or "absent"."""
    from importlib import metadata  # which imports a package for e-mail: a quarter of the time in which `cllm --version` answers

    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"
