"""Arguments of the head's operators, as the core reads them (`src/python/head.rs`)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["HeadArguments", "Needs", "ObjectiveArguments", "PairArguments"]


class HeadArguments(NamedTuple):
    """The common arguments of the head's operators: see [`oddsmith.functional.linear_logps`]."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    targets: Tensor
    softcap: float | None
    logit_scale: float


class PairArguments(NamedTuple):
    """The pairs of a batch: see [`oddsmith.functional.linear_orpo`]."""

    sequence: Tensor
    completion: Tensor
    num_pairs: int | None
    num_scored: int | None


class ObjectiveArguments(NamedTuple):
    """The loss: see [`oddsmith.functional.linear_orpo`]."""

    beta: float
    nll_scope: str
    odds_ratio_link: str
    logits_budget: int | None


class Needs(NamedTuple):
    """Which gradients to compute."""

    hidden: bool
    weight: bool
    bias: bool
