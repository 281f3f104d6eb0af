"""A few steps, packed and padded."""

import pytest
import torch

from oddsmith.check import training

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
CPU = torch.device("cpu")


def test_three_ways(caplog):
    found = list(training.runs(CPU))
    assert [run.what for run in found] == ["float32", "bfloat16", "QLoRA"]
    for run in found:
        assert run.passed, run
        assert run.path.startswith("Batches are packed")
    assert not caplog.records


def test_an_error_is_a_result(monkeypatch):
    def fail(*arguments):
        raise RuntimeError("CUDA error: an illegal memory access\nmore")

    monkeypatch.setattr(training, "_trainer", fail)
    for run in training.runs(CPU):
        assert not run.passed
        assert run.error == "RuntimeError: CUDA error: an illegal memory access"
