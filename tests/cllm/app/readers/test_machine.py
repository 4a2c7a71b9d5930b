"""The machine: what is known at once, and a report that a process of its own makes once."""

import json
import sys
import threading
import time

import pytest

from cllm.app.readers.machine import Machine
from cllm.runtime.device import cpu
from cllm.runtime.errors import CLLMError

REPORT = {"devices": [{"name": cpu().name, "kind": "cpu"}], "ceilings": {"fp32_gflops": 2.0, "bf16_gflops": 3.0, "copy_gbps": 4.0, "disturbed": True}}


def command(tmp_path, report=REPORT, status=0):
    """A program in the place of `cllm doctor`, which counts its runs."""
    text = f"open({str(tmp_path / 'runs')!r}, 'a').write('.'); print('words'); print({json.dumps(report)!r}); raise SystemExit({status})"
    return (sys.executable, "-c", text)


def test_a_report_is_made_once_and_kept(tmp_path):
    machine = Machine(tmp_path / "doctor.json", command(tmp_path))
    first = machine.doctor()
    assert machine.doctor() == first == {"made": first["made"], **REPORT} and (tmp_path / "runs").read_text() == "."
    found = Machine(tmp_path / "doctor.json", ()).facts(tmp_path)
    assert found["peak"] == {"fp32": 2e9, "bf16": 3e9, "copy_bytes_per_second": 4e9, "disturbed": True} and found["gpus"] == []
    assert found["cores"] == cpu().workers and 0 < found["memory_free_bytes"] <= found["memory_bytes"] and found["disk_free_bytes"] > 0
    machine.doctor(again=True)
    assert (tmp_path / "runs").read_text() == ".."


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"version": 1}', b'{"version": "0", "report": {"devices": []}, "made": 1}'])
def test_a_damaged_report_is_made_anew(tmp_path, damage):
    (tmp_path / "doctor.json").write_bytes(damage)
    assert Machine(tmp_path / "doctor.json", command(tmp_path)).doctor()["devices"] == REPORT["devices"]


@pytest.mark.parametrize("words", [(sys.executable, "-c", "print('no json')"), (sys.executable, "-c", ""), ("/nowhere/at/all",)])
def test_a_report_that_fails_is_told_of(tmp_path, words):
    with pytest.raises(CLLMError, match="has failed"):
        Machine(tmp_path / "doctor.json", words).doctor()
    with pytest.raises(CLLMError, match="has failed"):
        Machine(tmp_path / "doctor.json", command(tmp_path, status=1)).doctor()


def test_an_app_that_ends_does_not_wait_for_a_report(tmp_path):
    words = (sys.executable, "-c", f"import time; open({str(tmp_path / 'runs')!r}, 'w').close(); time.sleep(600)")
    machine, said = Machine(tmp_path / "doctor.json", words), []

    def look():
        with pytest.raises(CLLMError) as caught:
            machine.doctor()
        said.append(str(caught.value))

    looking = threading.Thread(target=look)
    looking.start()
    while not (tmp_path / "runs").exists():
        time.sleep(0.01)
    machine.close()
    looking.join(60)
    assert said, "the report is still being made"
    look()  # nor is one begun any more
    assert len(said) == 2
