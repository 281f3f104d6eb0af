"""A parameter with what a low-rank step needs to know of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass
class Item:
    """A parameter on its way through a step."""

    parameter: nn.Parameter
    group: dict[str, Any]
    index: int  # among all parameters, for the seed
    state: dict[str, Any]
    grad: Tensor | None  # None if only the projected gradient is left
    low: Tensor | None = None  # the projected gradient, fp32

    @property
    def projected(self) -> bool:
        return "rank" in self.group
