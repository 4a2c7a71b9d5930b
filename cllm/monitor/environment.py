"""What a run was trained on: a line in environment.jsonl for each time that it was started or resumed."""

import json
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cllm.files import RUN, Appender
from cllm.monitor.records import Device, Environment
from cllm.runtime.device import devices, operating_system

PACKAGES = ("cllm", "torch", "numba", "numpy", "triton", "tokenizers", "safetensors")


def record_environment(run: Path, sources: Mapping[str, str]) -> None:
    """Adds the line of this start to RUN/environment.jsonl. `sources`: where the value of each setting came from."""
    found = Environment(
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        devices=tuple(Device(name=each.name, workers=each.workers, memory_gib=round(each.memory_bytes / 2**30, 1)) for each in devices()),
        system=operating_system(),
        versions={name: version for name in PACKAGES if (version := _version(name))},
        sources=dict(sources),
    )
    with Appender(run / "environment.jsonl", RUN) as file:
        file.write(json.dumps(found.to_dict()) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
