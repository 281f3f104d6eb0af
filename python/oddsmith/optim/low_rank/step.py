"""LowRankStep: a parameter with the data of its step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass
class LowRankStep:
    """A parameter with the data of its step."""

    parameter: Tensor
    group: dict[str, Any]
    index: int  # of the parameter among all, for the seed
    state: dict[str, Any]
    grad: Tensor
    low: Tensor | None = None  # the projected gradient, fp32

    @property
    def projected(self) -> bool:
        return "rank" in self.group

    @property
    def reduced(self) -> Tensor:
        """The gradient of the moments: the projected one if it exists, or the full one."""
        return self.grad if self.low is None else self.low

    @property
    def rank(self) -> int:
        """Rank of the projected gradient: the group's, or the smaller side of a smaller matrix."""
        return min(self.group["rank"], *self.parameter.shape)
