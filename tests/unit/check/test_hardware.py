"""The processor, GPUs that torch can use, and those that it cannot."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from oddsmith.check import hardware
from oddsmith.check.findings import Gpu


def test_this_processor():
    cpu = hardware.processor()
    assert cpu.name
    assert cpu.cores >= 1
    assert cpu.threads == torch.get_num_threads()
    assert cpu.vector in {"AVX512", "AVX2", "DEFAULT"}


def test_more_threads_than_cores():
    cpu = replace(hardware.processor(), cores=2, threads=16, available=2**34)
    (problem,) = hardware.processor_problems(cpu)
    assert problem.what == "torch uses 16 threads on 2 cores"
    assert problem.remedy == "set OMP_NUM_THREADS=2"
    assert not problem.fatal


@pytest.mark.parametrize(("available", "count"), [(2**34, 0), (None, 0), (2**20, 1)])
def test_little_memory(available, count):
    cpu = replace(hardware.processor(), cores=2, threads=2, available=available)
    assert len(hardware.processor_problems(cpu)) == count


@pytest.fixture
def device_file(tmp_path, monkeypatch):
    path = tmp_path / "nvidiactl"
    path.touch()
    monkeypatch.setattr(hardware, "_NVIDIA_DEVICE", path)


@pytest.mark.parametrize(
    ("cuda", "what"), [(None, "was built without CUDA"), ("13.0", "(CUDA 13.0) cannot use it")]
)
def test_a_gpu_that_torch_cannot_use(device_file, monkeypatch, cuda, what):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    (problem,) = hardware.gpu_problems([])
    assert what in problem.what
    assert not problem.fatal


@pytest.mark.parametrize(("capability", "count"), [("7.0", 1), ("7.5", 0), ("12.0", 0)])
def test_a_gpu_that_is_too_old(monkeypatch, capability, count):
    monkeypatch.setattr(torch.version, "hip", None)
    found = hardware.gpu_problems([Gpu(0, "A GPU", capability, 1, 1, False)])
    assert len(found) == count
    assert not found or "the kernels need 7.5" in found[0].remedy


def test_an_amd_gpu_has_other_numbers(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert not hardware.gpu_problems([Gpu(0, "An AMD GPU", "6.0", 1, 1, True)])


def test_gpus_as_torch_reports_them(monkeypatch):
    given = {
        "is_available": lambda: True,
        "device_count": lambda: 2,
        "get_device_capability": lambda index: (9, index),
        "mem_get_info": lambda index: (5, 10),
        "get_device_name": lambda index: f"GPU {index}",
        "is_bf16_supported": lambda including_emulation: True,
        "device": nullcontext,
    }
    for name, function in given.items():
        monkeypatch.setattr(torch.cuda, name, function)
    assert hardware.gpus() == [
        Gpu(0, "GPU 0", "9.0", 10, 5, True),
        Gpu(1, "GPU 1", "9.1", 10, 5, True),
    ]


def test_builds():
    assert hardware.torch_builds()["CUDA of torch"] == torch.version.cuda


def test_devices_of_apple_and_intel(monkeypatch):
    assert hardware.other_devices() == []
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    assert [str(device) for device in hardware.other_devices()] == ["mps", "xpu:0", "xpu:1"]
