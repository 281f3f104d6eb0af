"""Rates are those of the sizes and times."""

import pytest
import torch

from oddsmith.check import speed


def test_rates(monkeypatch):
    monkeypatch.setattr(speed, "_seconds", lambda device, call: (call(), 0.001)[1])
    found = {row.what: row for row in speed.speeds(torch.device("cpu"))}
    # 1,024 x 1,024 values of four bytes, read and written in a millisecond.
    assert found["copy"].rate == pytest.approx(2 * 4 * 1024**2 / 1e6)
    assert found["matrix product, 1024"].rate == pytest.approx(2 * 1024**3 / 1e9)
    assert found["copy"].share == 1.0
    assert found["NF4, dequantise"].share == pytest.approx(4.5 / 8)
    assert found["AdamW, 8 bits"].share == pytest.approx(2.0)
    assert found["head, forward"].share == pytest.approx(128 * 8192 / 1024**2)
