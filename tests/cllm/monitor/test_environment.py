"""What a run records about where it was trained."""

import getpass
import json
import socket

import torch

from cllm.monitor.environment import record_environment
from cllm.monitor.records import Environment


def test_each_start_adds_one_line_with_devices_and_versions_and_nothing_private(tmp_path):
    for _ in range(2):
        record_environment(tmp_path, {"train.steps": "flag --steps"})
    content = (tmp_path / "environment.jsonl").read_text()
    first, second = map(json.loads, content.splitlines())
    assert first["sources"] == {"train.steps": "flag --steps"} and Environment.from_dict(first).to_dict() == first
    assert first["versions"] == second["versions"] and first["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert first["devices"][0]["workers"] >= 1 and first["devices"][0]["memory_gib"] > 0 and first["started"] <= second["started"]
    assert socket.gethostname() not in content and f'"{getpass.getuser()}"' not in content
