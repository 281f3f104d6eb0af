"""APOLLO: the learning rates of a low-rank AdamW, applied to the gradient itself.

Zhu et al. 2024 (arXiv 2412.05270): a random projection is enough to estimate the step size of each
channel, so no decomposition is needed, and only the seed of the basis is kept.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..checks import is_positive
from .optimizer import GroupOptions, LowRankOptimizer
from .projection import generator_for, random_matrix, sides
from .rules import AdamWCore, decay_parameter, norm_of
from .step import LowRankStep

SCALE_TYPES = ("channel", "tensor")
PROJECTIONS = ("random",)
# Two bases would leave no channel to scale.
APOLLO_PROJ_TYPES = ("std", "reverse_std", "left", "right")


class APOLLOAdamW(LowRankOptimizer):
    """
    AdamW with one learning rate per channel, or per matrix, instead of per element.

    With `R` the projected gradient, `N` the AdamW update from it, and norms over the projected
    side: `W -= lr * sqrt(scale) * G * (|N| / |R|)`, where a step's norm may grow by 1 % at most
    over the last one's (section 4.2 of the paper). APOLLO-Mini is `rank=1, scale_type="tensor",
    scale=128`.

    A group with `rank` is projected; a matrix with a smaller side has that as its rank. Its other
    options, with their defaults:

    - `update_proj_gap` (200): steps between new random projections.
    - `scale` (1.0): the step is multiplied by its square root.
    - `scale_type` (`"channel"`): one factor per `"channel"` or per `"tensor"`.
    - `proj` (`"random"`): the only choice; apollo-torch also has an SVD.
    - `proj_type` (`"std"`): `"std"`, `"reverse_std"`, `"left"` or `"right"`.

    The state of a projected parameter is `exp_avg`, `exp_avg_sq`, `last_norm` and numbers; its basis
    is drawn again in each step.

    Args:
        params (`Iterable`):
            Parameters, or groups of them.
        lr (`float`, *optional*, defaults to 1e-3):
            Learning rate.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`):
            Decay of the moments.
        eps (`float`, *optional*, defaults to 1e-6):
            Added to the root of the second moment, before the bias correction.
        weight_decay (`float`, *optional*, defaults to 0.0):
            Decoupled weight decay, after the update.
        correct_bias (`bool`, *optional*, defaults to `True`):
            Correct the bias of the moments.
        norm_growth (`float`, *optional*, defaults to 1.01):
            Largest ratio of the norm of a step to that of the last step; `None`: no limit.
        layerwise (`bool`, *optional*, defaults to `False`):
            Update each parameter in the backward pass, and free its gradient; `step` does nothing.
            Between micro-batches full gradients are kept, because the update needs them.
        accumulation_steps (`int`, *optional*, defaults to 1):
            Backward passes per update, for `layerwise`.
        is_last_backward (`Callable[[], bool]`, *optional*):
            Instead of a fixed number: returns whether the running backward pass is the last before
            an update.
        max_grad_norm (`float`, *optional*):
            For `layerwise`: largest gradient norm of each parameter separately.
        seed (`int`, *optional*, defaults to 0):
            Seed of the projections; the same on all processes.

    Raises:
        ValueError: As [`~oddsmith.optim.GaLoreAdamW`].
    """

    adds_up_projected = False

    group_options: GroupOptions = {
        **LowRankOptimizer.group_options,
        "scale": (1.0, lambda value: is_positive(value), "a positive number"),
        "proj_type": (
            "std",
            lambda value: value in APOLLO_PROJ_TYPES,
            f"one of {APOLLO_PROJ_TYPES}",
        ),
        "scale_type": ("channel", lambda value: value in SCALE_TYPES, f"one of {SCALE_TYPES}"),
        "proj": ("random", lambda value: value in PROJECTIONS, "'random'"),
    }

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        norm_growth: float | None = 1.01,
        **options: Any,
    ):
        if norm_growth is not None and not (is_positive(norm_growth) and norm_growth >= 1.0):
            raise ValueError(f"norm_growth is {norm_growth!r}; must be at least 1, or None")
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
            "norm_growth": norm_growth,
        }
        super().__init__(params, defaults, AdamWCore(), **options)

    def refresh(self, item: LowRankStep) -> None:
        """Moves on to the next random projection."""
        state = item.state
        state["projection"] = state.get("projection", -1) + 1
        state["next_refresh"] = state["step"] + item.group["update_proj_gap"]

    def bases(self, item: LowRankStep) -> tuple[Tensor | None, Tensor | None]:
        """The random basis, drawn again."""
        grad = item.grad
        right = sides(item.group["proj_type"], *grad.shape)[1]
        generator = generator_for(grad.device, self.seed, *item.place, item.state["projection"])
        matrix = random_matrix(grad, item.rank, right, generator)
        return (None, matrix) if right else (matrix, None)

    def _update_projected(self, items: list[LowRankStep], group: dict[str, Any]) -> None:
        # With a learning rate of 1, because a rate of 0 would give an update of zero.
        directions = self._directions(items, group, 1.0)
        for item, direction in zip(items, directions):
            correction = self.core.correction(item.state, group)
            # The channels are along the side that is not projected.
            side = 1 if sides(group["proj_type"], *item.parameter.shape)[1] else 0
            factor = _norm(direction, group, side) / correction
            factor = factor / (_norm(item.reduced, group, side) + 1e-8)
            length = torch.linalg.vector_norm(_norm(item.grad, group, side) * factor)
            factor = self._limited(factor, length, item.state, group) * group["scale"] ** 0.5
            item.parameter.addcmul_(
                item.grad.to(item.parameter.dtype),
                factor.to(item.parameter.dtype),
                value=-group["lr"] * correction,
            )
            decay_parameter(self.core, item.parameter, item.state, group, group["lr"])

    def _limited(
        self, factor: Tensor, length: Tensor, state: dict[str, Any], group: dict[str, Any]
    ) -> Tensor:
        """`factor`, reduced if the step would be much larger than the last."""
        growth = group["norm_growth"]
        if growth is None:
            return factor
        if "last_norm" in state:
            limiter = (length / (state["last_norm"] + 1e-8)).clamp_(min=growth) / growth
            factor, length = factor / limiter, length / limiter
        state["last_norm"] = length
        return factor


def _norm(tensor: Tensor, group: dict[str, Any], side: int) -> Tensor:
    """Norms along `side`, which is kept with size 1; one norm for a factor per tensor."""
    dim = side if group["scale_type"] == "channel" else (0, 1)
    return norm_of(tensor, dim, keepdim=True)
