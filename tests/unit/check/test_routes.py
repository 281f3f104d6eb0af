"""Who computes what, on a CPU and on GPUs that torch only reports."""

import pytest
import torch

from oddsmith.check import routes
from oddsmith.check.findings import Verdict

CUDA = torch.device("cuda", 0)


def by(device):
    return {route.what: route.by for route in routes.routes(device)}


def test_a_cpu():
    found = by(torch.device("cpu"))
    assert found["head and loss"] == "Rust"
    assert found["packed attention"] == "torch's flash kernel"


@pytest.mark.parametrize("name", ["mps", "xpu:0"])
def test_gpus_of_apple_and_intel(monkeypatch, name):
    def no_cuda(*arguments):
        raise AssertionError("torch was built without CUDA")

    monkeypatch.setattr(torch.cuda, "get_device_capability", no_cuda)
    found = by(torch.device(name))
    assert found["NF4 weights"] == found["8-bit AdamW"] == found["head and loss"] == "torch"
    assert found["packed attention"] == "blocks of torch's attention"


@pytest.mark.parametrize(
    ("hip", "capability", "core"),
    [(None, (9, 0), "CUDA kernels"), (None, (7, 0), "torch"), ("7.0", (9, 4), "torch")],
)
def test_gpus(monkeypatch, hip, capability, core):
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setenv("ODDSMITH_KERNELS", "untested")
    found = by(CUDA)
    assert found["NF4 weights"] == found["8-bit AdamW"] == found["head and loss"] == core


@pytest.mark.parametrize(
    ("asked", "passed", "core", "why"),
    [
        ("tested", (True, True), "CUDA kernels", "which passed their self-test"),
        (
            "tested",
            (True, False),
            "CUDA kernels and torch",
            "1 of 2 families passed their self-test",
        ),
        ("retest", (False, False), "torch", "no kernel has passed its self-test"),
        ("tested", (), "torch", "no kernel has passed its self-test"),
        ("untested", (), "CUDA kernels", "ODDSMITH_KERNELS is untested"),
        ("none", (), "torch", "ODDSMITH_KERNELS is none"),
    ],
)
def test_kernels_that_failed_their_self_test(monkeypatch, asked, passed, core, why):
    monkeypatch.setenv("ODDSMITH_KERNELS", asked)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    verdicts = [
        Verdict("cuda:0", "adamw8", 0.1, "float32", float(not each), 0.5) for each in passed
    ]
    monkeypatch.setattr(routes, "found", lambda gpu: verdicts)
    head, *_ = routes.routes(CUDA)
    assert (head.by, head.why) == (core, why)


@pytest.mark.parametrize(
    ("name", "expected"), [("flash_attn", "flash_attn"), (None, "blocks of torch's attention")]
)
def test_the_attention_that_is_installed(monkeypatch, name, expected):
    monkeypatch.setenv("ODDSMITH_KERNELS", "untested")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(routes, "kernel_name", lambda: name)
    assert by(CUDA)["packed attention"] == expected
