"""What a run says of its own speed."""

import torch

from cllm.config.model import ModelConfig
from cllm.config.train import TrainConfig
from cllm.monitor.records import StepResult
from cllm.monitor.reporter import Reporter


def test_a_run_that_becomes_many_times_slower_says_so_once_and_what_helps(tmp_path, monkeypatch, capfd):
    now = 0.0
    monkeypatch.setattr("cllm.monitor.reporter.time.perf_counter", lambda: now)
    monkeypatch.setattr("cllm.monitor.reporter._peak_flops", lambda *_: 0.0)
    config = TrainConfig(steps=400, watchdog_seconds=0)
    with Reporter(tmp_path, config) as report:
        report.begin(0, 400, config, ModelConfig(vocab_size=10, embed_dim=16, num_layers=1, num_heads=1, max_seq_len=8), torch.device("cpu"))
        for step in range(400):
            with report.step(step):
                now += 0.1 if step < 200 or step % 20 == 0 else 0.8
            report.trained(step + 1, step, StepResult(1.0, 1.0, 1.0, 0, 100, 1e-3, True), {})
            if step == 199:
                assert "slower" not in (tmp_path / "log.txt").read_text()
    said = (tmp_path / "log.txt").read_text()
    assert said.count("times slower than this run has been") == 1 and "OMP_WAIT_POLICY=passive" in said
    assert "times slower" in capfd.readouterr().err
