"""The machine that the app runs on: what is known at once, and what `cllm doctor` finds out in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cllm._version import __version__
from cllm.runtime.device import available_memory, cpu
from cllm.runtime.errors import CLLMError

DOCTOR = (sys.executable, "-m", "cllm", "doctor", "--json")
_SECONDS = 300.0  # in which a report of the machine has to come; measuring takes some seconds, beside a training longer


class Machine:
    """place: where the last report is kept. command: prints one as JSON. For any thread."""

    def __init__(self, place: Path, command: Sequence[str] = DOCTOR) -> None:
        self._place, self._command = place, command
        self._lock = threading.Lock()
        self._looking = self._is_over = False
        self._child: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        """Ends a report that is being made, which changes nothing; an app that ends would wait for it otherwise."""
        self._is_over = True
        child = self._child
        if child is not None and child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)

    def facts(self, root: Path) -> dict[str, Any]:
        """Device, memory and disk now. Peak and GPUs are those of the last report; the first call has one made, and does not wait for it."""
        about = cpu()
        report = self._kept()
        if report is None:
            self._look_soon()
        ceilings = report["report"].get("ceilings") if report else None
        devices = report["report"].get("devices", []) if report else []
        return {
            "version": __version__,
            "device": about.name,
            "cpu": about.name,
            "cores": about.workers,
            "memory_bytes": about.memory_bytes,
            "memory_free_bytes": available_memory(),
            "disk_free_bytes": shutil.disk_usage(root).free,
            "gpus": [each for each in devices if isinstance(each, dict) and each.get("kind") == "cuda"],
            "peak": _peak(ceilings),
            "features": list(about.features),
            "python": sys.version.split()[0],
        }

    def doctor(self, again: bool = False) -> dict[str, Any]:
        """The report of `cllm doctor --json`, and when it was made. Raises CLLMError where it could not be made."""
        with self._lock:
            found = None if again else self._kept()
            if found is None:
                found = {"version": __version__, "made": time.time(), "report": self._run()}
                self._place.write_text(json.dumps(found), "utf-8")
        return {"made": found["made"], **found["report"]}

    def _kept(self) -> dict[str, Any] | None:
        """The last report; None where there is none of this version and this processor."""
        try:
            found = json.loads(self._place.read_text("utf-8"))
            fits = found["version"] == __version__ and found["report"]["devices"][0]["name"] == cpu().name
            return found if fits and isinstance(found["made"], float) else None
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            return None

    def _run(self) -> dict[str, Any]:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        try:
            no = subprocess.DEVNULL
            with subprocess.Popen(self._command, stdin=no, stdout=subprocess.PIPE, stderr=no, env=environment, start_new_session=True) as child:
                self._child = child
                if self._is_over:
                    self.close()
                try:
                    said, _ = child.communicate(timeout=_SECONDS)
                except BaseException:
                    os.killpg(child.pid, signal.SIGKILL)
                    raise
            report = json.loads(said.splitlines()[-1])
            if child.returncode or not isinstance(report, dict):
                raise ValueError
        except subprocess.TimeoutExpired:
            raise CLLMError(f"cllm doctor did not end within {_SECONDS:.0f} seconds. Try again when less is going on.") from None
        except (OSError, ValueError, IndexError) as error:
            raise CLLMError("cllm doctor has failed. Run it in a terminal to see why.") from error
        return report

    def _look_soon(self) -> None:
        if not self._looking:
            self._looking = True
            threading.Thread(target=self._try, args=(self.doctor,), name="cllm-doctor", daemon=True).start()

    @staticmethod
    def _try(look: Callable[[], Any]) -> None:
        try:
            look()
        except (CLLMError, OSError):
            return  # the System tab asks again, and says why


def _peak(ceilings: Any) -> dict[str, float] | None:
    """Operations a second of the fastest product that was measured, by number format, and bytes a second of a copy."""
    try:
        rates = {"fp32": ceilings["fp32_gflops"] * 1e9, "bf16": ceilings["bf16_gflops"] * 1e9, "copy_bytes_per_second": ceilings["copy_gbps"] * 1e9}
        return {**rates, "disturbed": bool(ceilings.get("disturbed"))}
    except (KeyError, TypeError):
        return None
