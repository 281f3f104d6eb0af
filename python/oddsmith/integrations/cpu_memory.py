"""The memory of large CPU tensors, from a pool that reuses it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from .. import _core
from .patch import Patch

__all__ = ["POOL", "CpuMemoryPool", "pooled_memory"]


class CpuMemoryPool(Patch):
    """
    A pool for the memory of large CPU tensors.

    The C library's allocator fragments in training: a run keeps several times the memory of its
    tensors. Tensors created inside can be used outside; unused memory is returned to the system at
    the end. Linux only; no effect elsewhere.
    """

    target = "torch's CPU allocator"
    purpose = "Training on a CPU uses about the memory of its tensors, not several times as much."
    tested = "torch 2.11"
    fallback = "the memory of CPU tensors comes from the C library"

    def _change(self) -> None:
        _core.install_pool()

    def _restore(self) -> None:
        _core.uninstall_pool()


POOL = CpuMemoryPool()


def pooled_memory(device: torch.device) -> AbstractContextManager[Any]:
    """
    A context with [`CpuMemoryPool`].

    Args:
        device (`torch.device`): Device of the model; no effect unless it is the CPU.
    """
    return POOL if device.type == "cpu" else nullcontext()
