"""A parameter with what a low-rank step needs to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class Item:
    """A parameter on its way through a step."""

    parameter: Tensor
    group: dict[str, Any]
    index: int  # among all parameters, for the seed
    state: dict[str, Any]
    grad: Tensor
    low: Tensor | None = None  # the projected gradient, fp32

    @property
    def projected(self) -> bool:
        return "rank" in self.group

    @property
    def reduced(self) -> Tensor:
        """What the moments are made of: the projected gradient, once there is one, or the full one."""
        return self.grad if self.low is None else self.low
