"""What a run was trained on: one line in environment.jsonl for each time it was started or resumed, for `cllm report`."""

import json
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from cllm.files import RUN, reported
from cllm.runtime.device import devices, operating_system

PACKAGES = ("cllm", "torch", "numba", "numpy", "triton", "tokenizers", "safetensors")


def record_environment(run: Path) -> None:
    """Appends devices, system, versions and the time (UTC). Nothing that names the machine or its user."""
    row = {
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "devices": [{"name": device.name, "workers": device.workers, "memory_gib": round(device.memory_bytes / 2**30, 1)} for device in devices()],
        "system": operating_system(),
        "versions": {name: found for name in PACKAGES if (found := _version(name))},
    }
    path = run / "environment.jsonl"
    with reported(path, RUN), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
