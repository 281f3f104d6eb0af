"""The processor and the GPUs."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

import torch

from .. import memory
from ..bf16_products import cpu_has_bf16
from .findings import Gpu, Problem, Processor
from .software import nvidia_driver

__all__ = [
    "OLDEST_CAPABILITY",
    "gpu_problems",
    "gpus",
    "other_devices",
    "other_problems",
    "processor",
    "processor_problems",
    "torch_builds",
]

# Turing: the kernels are compiled for it and newer ones.
OLDEST_CAPABILITY = (7, 5)
# Below it not even the demo's model trains.
_LITTLE_MEMORY = 1 << 30
_CPUINFO = Path("/proc/cpuinfo")
_NVIDIA_DEVICE = Path("/dev/nvidiactl")


def processor() -> Processor:
    """The CPU, as this process may use it."""
    affinity = getattr(os, "sched_getaffinity", None)
    return Processor(
        name=_cpu_name(),
        cores=len(affinity(0)) if affinity else os.cpu_count() or 1,
        threads=torch.get_num_threads(),
        vector=torch.backends.cpu.get_cpu_capability(),
        bf16=cpu_has_bf16(),
        memory=memory.total(),
        available=memory.available(),
    )


def processor_problems(cpu: Processor) -> list[Problem]:
    """Settings and shortages that make a run slow or end it."""
    problems = []
    if cpu.threads > cpu.cores:
        problems.append(
            Problem(
                f"torch uses {cpu.threads} threads on {cpu.cores} cores",
                f"set OMP_NUM_THREADS={cpu.cores}",
            )
        )
    if cpu.available is not None and cpu.available < _LITTLE_MEMORY:
        left = f"{cpu.available / 2**20:.0f} MB of memory are available"
        problems.append(Problem(left, "close other programs, or raise the container's limit"))
    return problems


def torch_builds() -> dict[str, str | None]:
    """What torch was built for, and the driver of NVIDIA's GPUs."""
    return {
        "CUDA of torch": torch.version.cuda,
        "ROCm of torch": torch.version.hip,
        "NVIDIA driver": nvidia_driver(),
    }


def gpus() -> list[Gpu]:
    """The GPUs that torch can use through its interface for CUDA."""
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        major, minor = torch.cuda.get_device_capability(index)
        free, size = torch.cuda.mem_get_info(index)
        with torch.cuda.device(index):
            bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
        name = torch.cuda.get_device_name(index)
        found.append(Gpu(index, name, f"{major}.{minor}", size, free, bf16))
    return found


def other_devices() -> list[torch.device]:
    """GPUs that torch has under an interface of their own: of Apple and of Intel."""
    found = []
    if torch.backends.mps.is_available():
        found.append(torch.device("mps"))
    if torch.xpu.is_available():
        found += [torch.device("xpu", index) for index in range(torch.xpu.device_count())]
    return found


def other_problems(found: list[torch.device]) -> list[Problem]:
    """Devices that no kernel is for, and that nothing here tries out."""
    remedy = (
        "torch's operations are used there, without packed attention of its own; look at the first losses, "
        "or train on a CPU or on a GPU of NVIDIA"
    )
    return [Problem(f"nobody has trained on {device} with oddsmith", remedy) for device in found]


def gpu_problems(found: list[Gpu]) -> list[Problem]:
    """A GPU that torch cannot use, or that is too old for the kernels."""
    problems = []
    if not found and _NVIDIA_DEVICE.exists():
        if torch.version.cuda is None:
            what = f"there is an NVIDIA GPU, and torch {torch.__version__} was built without CUDA"
            remedy = "install a build of torch with CUDA"
        else:
            what = f"there is an NVIDIA GPU, and torch (CUDA {torch.version.cuda}) cannot use it"
            remedy = "look at nvidia-smi, CUDA_VISIBLE_DEVICES and the age of the driver"
        problems.append(Problem(what, remedy))
    for gpu in found:
        capability = tuple(map(int, gpu.capability.split(".")))
        if torch.version.hip is None and capability < OLDEST_CAPABILITY:
            what = f"cuda:{gpu.index} ({gpu.name}) has capability {gpu.capability}"
            needed = "{}.{}".format(*OLDEST_CAPABILITY)
            remedy = f"the kernels need {needed}, and torch's operations take their place; use another GPU"
            problems.append(Problem(what, remedy))
    return problems


def _cpu_name() -> str:
    try:
        name = re.search(r"^model name\s*:\s*(.+)$", _CPUINFO.read_text(), re.M)
    except OSError:
        name = None
    return name[1].strip() if name else platform.processor() or platform.machine()
