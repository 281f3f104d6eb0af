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

    The C library's allocator fragments under training: a run keeps several times what its tensors
    need. Tensors made inside may be used outside; what the pool does not use at the end goes back
    to the system. Linux only, elsewhere nothing changes.
    """

    target = "torch's CPU allocator"
    purpose = "Training on a CPU keeps the memory that its tensors need, not several times that."
    tested = "torch 2.11"
    fallback = "the memory of CPU tensors comes from the C library"

    def _change(self) -> None:
        _core.install_pool()

    def _restore(self) -> None:
        _core.uninstall_pool()


POOL = CpuMemoryPool()


def pooled_memory(device: torch.device) -> AbstractContextManager[Any]:
    """
    For the duration, [`CpuMemoryPool`].

    Args:
        device (`torch.device`): Where the model is; nothing changes unless that is the CPU.
    """
    return POOL if device.type == "cpu" else nullcontext()
