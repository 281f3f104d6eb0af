"""The memory that activations may use instead of being recomputed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from .. import memory

__all__ = ["ActivationBudget", "memory_text"]

# Of what is available on the host when the optimizer's state is there: other programs, the pages
# of files and workers of the data need the rest.
HOST_SHARE = 0.5
# Of a GPU's memory, for what its allocator cannot join.
DEVICE_RESERVE = 0.05


@dataclass
class ActivationBudget:
    """
    Bytes of activations that a batch may keep.

    Args:
        setting (`int` or `"auto"`): `activation_budget`.
        device (`torch.device`): Device of the model.
    """

    setting: int | str
    device: torch.device
    #: Bytes, before what the rest of the step needs; None until `auto` has looked.
    bytes: float | None = field(default=None, init=False)
    # What a step without kept activations needs beside the weights, and the tokens of its batch.
    _step: tuple[float, int] = field(default=(0.0, 1), init=False)
    _before: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if isinstance(self.setting, int):
            self.bytes = float(self.setting)

    def __call__(self, tokens: int) -> float:
        """Bytes for a batch of `tokens`; 0 while it is not known what is free."""
        if self.bytes is None:
            return 0.0
        needed, most = self._step
        # Longer batches need more for all that is not kept.
        return max(0.0, self.bytes - needed * max(1.0, tokens / most))

    # ---- What `auto` looks at ----

    def before_first_step(self) -> None:
        """Before the first micro-batch, when there are no gradients."""
        if self.device.type == "cuda":
            self._before = torch.cuda.memory_allocated(self.device)

    def after_batch(self, tokens: int) -> None:
        """After a micro-batch of the first step."""
        if self.bytes is None and self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
            self._step = max(0.0, peak - self._before), max(tokens, self._step[1])

    def look(self) -> None:
        """When the optimizer's state is there: what is free from now on."""
        self.bytes = self._free()

    @contextmanager
    def nothing(self) -> Iterator[None]:
        """A context in which nothing is kept."""
        before, self.bytes = self.bytes, None
        try:
            yield
        finally:
            self.bytes = before

    def halve(self) -> None:
        """After memory has run out."""
        self.bytes = (self.bytes or 0.0) / 2

    def _free(self) -> float:
        kind = self.device.type
        if kind == "cpu":
            processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            return HOST_SHARE * (memory.available() or 0) / max(processes, 1)
        if kind == "cuda":
            free, total = torch.cuda.mem_get_info(self.device)
            reserved = torch.cuda.memory_reserved(self.device)
            unused = reserved - torch.cuda.memory_allocated(self.device)
            return max(0.0, free + unused - DEVICE_RESERVE * total)
        return 0.0


def memory_text(size: float) -> str:
    """`1.5 GB`: a size as `activation_budget` is given."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("KB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} bytes"
