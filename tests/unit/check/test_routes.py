"""Who computes what, on a CPU and on GPUs that torch only reports."""

import pytest
import torch

from oddsmith.check import routes

CUDA = torch.device("cuda", 0)


def by(device):
    return {route.what: route.by for route in routes.routes(device)}


def test_a_cpu():
    found = by(torch.device("cpu"))
    assert found["head and loss"] == "Rust"
    assert found["packed attention"] == "torch's flash kernel"


@pytest.mark.parametrize(
    ("hip", "capability", "core"),
    [(None, (9, 0), "CUDA kernels"), (None, (7, 0), "nothing"), ("7.0", (9, 4), "torch")],
)
def test_gpus(monkeypatch, hip, capability, core):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    found = by(CUDA)
    assert found["NF4 weights"] == found["8-bit AdamW"] == found["head and loss"] == core


@pytest.mark.parametrize(
    ("name", "expected"), [("flash_attn", "flash_attn"), (None, "blocks of torch's attention")]
)
def test_the_attention_that_is_installed(monkeypatch, name, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(routes, "kernel_name", lambda: name)
    assert by(CUDA)["packed attention"] == expected
