"""Arguments of a step of AdamW, as the core reads them (`src/python/optim.rs`)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["Item", "Rule"]


class Rule(NamedTuple):
    """
    What is the same for all elements of a parameter in a step.

    `value = (value + step_size * m / (sqrt(v) + eps)) * keep`, with `m` and `v` the moments after the
    step, without bias correction.
    """

    beta1: float
    beta2: float
    eps: float
    step_size: float
    keep: float


class Item(NamedTuple):
    """
    A tensor and its state, which a step changes in place.

    Args:
        value (`Tensor`): Contiguous; `fp32`, `bf16` or `fp16`.
        grad (`Tensor`): Contiguous, of the shape of `value`, of its dtype or `fp32`.
        state1 (`Tensor`): First moments, `fp32` or codes.
        state2 (`Tensor`): Second moments.
        absmax1 (`Tensor`, *optional*): Scales of the codes of first moments.
        absmax2 (`Tensor`, *optional*): Scales of the codes of second moments.
        first (`int`): Index of the first element, if this is a part of a parameter.
        rule ([`Rule`]): Rule of the parameter's group at this step.
        seed (`int`, *optional*): Seed of stochastic rounding, 32 bits.
    """

    value: Tensor
    grad: Tensor
    state1: Tensor
    state2: Tensor
    absmax1: Tensor | None
    absmax2: Tensor | None
    first: int
    rule: Rule
    seed: int | None
