"""A page that is left open: its memory, its elements and its listeners stay as they are while a run trains for a long time."""

import json
import shutil
import threading
import time

import pytest

ROW = {"kind": "train", "loss": 4.0, "learning_rate": 1e-3, "gradient_norm": 1.0, "largest_gradient": 0.1, "num_nonfinite": 0, "updated": True,
       "tokens_per_second": 4000.0, "share_of_peak": 0.4, "memory_bytes": 500_000_000, "data_seconds": 0.001, "forward_seconds": 0.02,
       "backward_seconds": 0.04, "optimizer_seconds": 0.002}  # fmt: skip
LAYERS = {f"layer {index}": 1.0 / (index + 1) for index in range(6)}
STEP = "() => Number((document.querySelector('.figures dd')?.textContent ?? '0').split(' ')[0].replaceAll(',', ''))"


class FakeRun:
    """Writes rows as a training does, `rate` a second."""

    def __init__(self, folder, rate):
        self.step = 40
        self._folder, self._rate = folder, rate
        self._ends = threading.Event()
        self._thread = threading.Thread(target=self._write)
        self._thread.start()

    def _write(self):
        with (self._folder / "metrics.jsonl").open("a") as file:
            while not self._ends.wait(1 / self._rate):
                self.step += 1
                values = {"step": self.step, "tokens": 128 * self.step, "seconds": self.step / 5, "loss": 3 + 1 / self.step}
                file.write(json.dumps(ROW | values) + "\n")
                if self.step % 50 == 0:
                    file.write(json.dumps({"kind": "layers", "step": self.step, "gradient_norms": LAYERS, "update_ratios": LAYERS}) + "\n")
                file.flush()

    def end(self):
        self._ends.set()
        self._thread.join()


def counts(session):
    """The least of some looks at: bytes of the JavaScript heap after a collection, elements, listeners. What is just being drawn is no leak."""
    found = []
    for _ in range(4):
        session.send("HeapProfiler.collectGarbage")
        counters = session.send("Memory.getDOMCounters")
        found.append((session.send("Runtime.getHeapUsage")["usedSize"], counters["nodes"], counters["jsEventListeners"]))
        time.sleep(0.2)
    return [min(each) for each in zip(*found, strict=True)]


@pytest.mark.parametrize(
    "rate, warm, long",
    [pytest.param(600, 1500, 1500, id="short"), pytest.param(5, 600, 9000, id="half an hour at 5 rows a second", marks=pytest.mark.slow)],
)
def test_the_heap_stays_flat_while_a_run_is_watched(visit, launch, trained, tmp_path, rate, warm, long):
    """Counted when everything was shown, curves as buckets included, and again after so many more steps."""
    workspace = tmp_path / "soak"
    shutil.copytree(trained / "runs" / "demo", workspace / "runs" / "fake")
    page = visit(launch(workspace))
    session = page.context.new_cdp_session(page)
    page.evaluate("location.hash = '#/training/runs/fake'")
    page.get_by_role("heading", name="runs/fake", exact=True).wait_for()
    run = FakeRun(workspace / "runs" / "fake", rate)
    try:
        found = []
        for steps in (warm, long):
            page.wait_for_function(f"until => ({STEP})() >= until", arg=run.step + steps, timeout=1000 * (120 + 3 * steps / rate))
            found.append(counts(session))
    finally:
        run.end()
    (heap, nodes, listeners), (heap_after, nodes_after, listeners_after) = found
    print(f"heap {heap / 1e6:.2f} -> {heap_after / 1e6:.2f} MB, nodes {nodes} -> {nodes_after}, listeners {listeners} -> {listeners_after}")
    assert heap_after < heap + 2_000_000, found
    assert nodes_after < nodes + 300 and listeners_after < listeners + 100, found
