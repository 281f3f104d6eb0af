"""Who computes the parts of a step on a device, and why."""

from __future__ import annotations

import torch

from ..packing.attention_cuda import kernel_name
from .findings import Route
from .hardware import OLDEST_CAPABILITY
from .kernels import VARIABLE, found, policy

__all__ = ["routes"]

_OURS = ("head and loss", "NF4 weights", "8-bit AdamW")


def routes(device: torch.device) -> list[Route]:
    """
    What the head, 4-bit weights, the optimizer and packed attention go through.

    Args:
        device (`torch.device`): A CPU or any GPU.
    """
    by, why = _core_of(device)
    attention = Route(str(device), "packed attention", *_attention_of(device))
    return [*(Route(str(device), what, by, why) for what in _OURS), attention]


def _core_of(device: torch.device) -> tuple[str, str]:
    if device.type == "cpu":
        return "Rust", f"on {torch.backends.cpu.get_cpu_capability()}"
    if device.type != "cuda" or torch.version.hip is not None:
        return "torch", "the kernels are for NVIDIA's GPUs"
    capability = torch.cuda.get_device_capability(device)
    if capability < OLDEST_CAPABILITY:
        oldest = "{}.{}".format(*OLDEST_CAPABILITY)
        return "torch", "the kernels need capability {}, and it has {}.{}".format(
            oldest, *capability
        )
    return _by_trust(device.index or 0)


def _by_trust(gpu: int) -> tuple[str, str]:
    """What is used, after the self-test."""
    asked = policy()
    if asked == "none":
        return "torch", f"{VARIABLE} is none"
    if asked == "untested":
        return "CUDA kernels", f"{VARIABLE} is untested"
    verdicts = found(gpu)
    passed = [verdict for verdict in verdicts if verdict.passed]
    if not passed:
        return "torch", "no kernel has passed its self-test"
    if len(passed) < len(verdicts):
        return (
            "CUDA kernels and torch",
            f"{len(passed)} of {len(verdicts)} families passed their self-test",
        )
    return "CUDA kernels", "which passed their self-test"


def _attention_of(device: torch.device) -> tuple[str, str]:
    if device.type == "cpu":
        return "torch's flash kernel", "tiles where there is a softcap, a sink, a window or a chunk"
    if device.type != "cuda":
        return "blocks of torch's attention", "variable-length kernels are for CUDA and ROCm"
    name = kernel_name()
    if name is None:
        return "blocks of torch's attention", "no variable-length kernel is installed"
    return name, "in float16 and bfloat16, else blocks of torch's attention"
