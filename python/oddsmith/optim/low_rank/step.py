"""LowRankStep: a matrix, or a parameter that is not projected, with the data of its step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

#: In the state of a projected stack of matrices: a list with the state of each.
SLICES = "slices"


@dataclass
class LowRankStep:
    """A matrix, or a parameter that is not projected, with the data of its step."""

    parameter: Tensor
    group: dict[str, Any]
    # Of the parameter among all, and of the matrix in a stack, for the seed.
    place: tuple[int, ...]
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


def is_stack(parameter: Tensor, group: dict[str, Any]) -> bool:
    """Whether a parameter is projected matrix by matrix, such as the experts of a layer."""
    return parameter.dim() == 3 and "rank" in group


def steps_of(
    parameter: Tensor, group: dict[str, Any], index: int, state: dict[str, Any], grad: Tensor
) -> list[LowRankStep]:
    """The step of a parameter; for a projected stack `(count, rows, columns)`, that of each matrix."""
    if not is_stack(parameter, group):
        return [LowRankStep(parameter, group, (index,), state, grad)]
    states = state.setdefault(SLICES, [{} for _ in parameter])
    parts = zip(parameter, states, grad)
    return [LowRankStep(p, group, (index, at), s, g) for at, (p, s, g) in enumerate(parts)]


def copied_state(state: Any, device: Any) -> Any:
    """A copy of the state of a parameter, its tensors on a device."""
    if isinstance(state, Tensor):
        return state.to(device, copy=True)
    if isinstance(state, dict):
        return {key: copied_state(value, device) for key, value in state.items()}
    return [copied_state(each, device) for each in state] if isinstance(state, list) else state
