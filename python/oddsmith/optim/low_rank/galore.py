"""GaLore: full-parameter training with a low-rank optimiser state.

Zhao et al. 2024 (arXiv 2403.03507): the gradient of a matrix is projected onto its singular vectors
at the last refresh, the moments are those of the projected gradient, and the update is projected
back with the same basis.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import is_count, is_positive
from .optimizer import GroupOptions, LowRankOptimizer
from .projection import add_back, exact_bases, generator_for, overlap, random_bases, sides
from .rules import AdafactorCore, AdamWCore, decay_parameter
from .step import SLICES, LowRankStep

SVD = ("random", "exact")
REFRESH_ON = ("all", "first")

# The options that all classes below share.
OPTIONS_DOC = """layerwise (`bool`, *optional*, defaults to `False`):
            Update each parameter in the backward pass, and free its gradient; `step` does nothing.
        accumulation_steps (`int`, *optional*, defaults to 1):
            Backward passes per update, for `layerwise`.
        is_last_backward (`Callable[[], bool]`, *optional*):
            Instead of a fixed number: returns whether the running backward pass is the last before
            an update.
        max_grad_norm (`float`, *optional*):
            For `layerwise`: largest gradient norm of each parameter separately (of the projected
            gradient, if projected), instead of clipping the norm of all.
        seed (`int`, *optional*, defaults to 0):
            Seed of the randomised range finder.

    Raises:
        ValueError: If an option is unknown or out of range, or a projected parameter is not a
            matrix or a stack of them, or is split over processes."""


class GaLoreOptimizer(LowRankOptimizer):
    """Refreshes the basis, projects, lets the core step, and adds the result to the weight.

    Base of [`GaLoreAdamW`], [`GaLoreAdamW8bit`] and [`GaLoreAdafactor`].

    A group with `rank` is projected; a matrix with a smaller side has that as its rank. Its other
    options, with their defaults:

    - `update_proj_gap` (200): steps between refreshes of the basis.
    - `scale` (0.25): factor of the update when it is projected back.
    - `proj_type` (`"std"`): `"std"`, `"reverse_std"`, `"left"`, `"right"` or `"full"`.
    - `svd` (`"random"`): how the basis is found: `"random"`, a randomised range finder that starts
      from the last basis, or `"exact"`.
    - `refresh_on` (`"all"`): in layer-wise mode with several micro-batches per update, whether a
    refresh uses `"all"`, which keeps full gradients, or the `"first"`.
    - `adaptive_gap` (`False`): double a matrix's gap if its subspace is stable for
    `overlap_patience` (5) consecutive refreshes: the mean squared cosine between old and new basis
    is at least `overlap_threshold` (0.4). After Q-GaLore (Zhang et al. 2024, arXiv 2407.08296).

    A parameter `(count, rows, columns)`, such as the experts of a layer, is a stack of matrices: each
    has its own basis, moments and steps. A matrix whose gradient is zero when its basis is due, such as
    that of an expert without tokens, gets the basis with the next gradient that is not; until its first
    one it is not updated.

    The state of a projected parameter is `basis_left` or `basis_right` or both (in the dtype of the
    parameter), `gap`, `next_refresh`, `stable`, and the state of the core; only tensors and
    numbers. That of a stack is `slices`, a list with the state of each matrix.
    """

    needs_gradient = True

    group_options: GroupOptions = {
        **LowRankOptimizer.group_options,
        "svd": ("random", lambda value: value in SVD, f"one of {SVD}"),
        "refresh_on": ("all", lambda value: value in REFRESH_ON, f"one of {REFRESH_ON}"),
        "adaptive_gap": (False, lambda value: isinstance(value, bool), "True or False"),
        "overlap_threshold": (
            0.4,
            lambda value: is_positive(value) and value <= 1.0,
            "a number in (0, 1]",
        ),
        "overlap_patience": (5, lambda value: is_count(value), "a positive integer"),
    }

    def bases(self, item: LowRankStep) -> tuple[Tensor | None, Tensor | None]:
        """Left and right basis of a projected parameter."""
        return item.state.get("basis_left"), item.state.get("basis_right")

    def basis_shapes(self, item: LowRankStep) -> dict[str, tuple[int, int]]:
        """Shapes of the saved bases, by their names in the state."""
        rows, columns = item.parameter.shape
        left, right = sides(item.group["proj_type"], rows, columns)
        rank = item.rank
        shapes = {"basis_left": (rows, rank)} if left else {}
        return {**shapes, "basis_right": (rank, columns)} if right else shapes

    def refresh(self, item: LowRankStep) -> None:
        """Computes a new basis from `item.grad`; under DDP that of rank 0."""
        state, group, grad = item.state, item.group, item.grad
        old_left, old_right = self.bases(item)
        if group["svd"] == "exact":
            left, right = exact_bases(grad, item.rank)
        else:
            generator = generator_for(grad.device, self.seed, *item.place, state["step"])
            left, right = random_bases(grad, item.rank, generator, old_left, old_right)
        new = {"basis_left": left, "basis_right": right}
        wanted = self.basis_shapes(item)
        new = {key: basis.to(item.parameter.dtype) for key, basis in new.items() if key in wanted}
        for basis in new.values():
            _take_from_first_rank(basis)
        gap = state.get("gap", group["update_proj_gap"])
        if not group["adaptive_gap"]:
            gap = group["update_proj_gap"]
        elif (old := old_right if (by_right := "basis_right" in new) else old_left) is not None:
            stays = overlap(old, new["basis_right" if by_right else "basis_left"], by_right)
            stable = state.get("stable", 0) + 1 if stays >= group["overlap_threshold"] else 0
            state["stable"] = stable
            if stable >= group["overlap_patience"]:
                gap *= 2
        state.update(new, gap=gap, next_refresh=state["step"] + gap)

    def _update_projected(self, items: list[LowRankStep], group: dict[str, Any]) -> None:
        changes = self._directions(items, group, group["lr"])
        for item, change in zip(items, changes):
            if self.core.decay_first:
                decay_parameter(self.core, item.parameter, item.state, group, group["lr"])
            add_back(item.parameter, change, *self.bases(item), alpha=group["scale"])
            if not self.core.decay_first:
                decay_parameter(self.core, item.parameter, item.state, group, group["lr"])


def _take_from_first_rank(basis: Tensor) -> None:
    """Broadcasts the bases under data parallelism, so that they are bit-identical on all
    processes.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(basis, src=0)


class GaLoreAdamW(GaLoreOptimizer):
    __doc__ = f"""
    AdamW on projected gradients, with `fp32` moments.

    Args:
        params (`Iterable`):
            Parameters, or groups of them; groups with `rank` are projected, see
            [`GaLoreOptimizer`].
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
        no_deprecation_warning (`bool`, *optional*):
            No effect; for compatibility with galore-torch.
        {OPTIONS_DOC}
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        no_deprecation_warning: bool = False,
        **options: Any,
    ):
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
        }
        super().__init__(params, defaults, AdamWCore(), **options)


class GaLoreAdafactor(GaLoreOptimizer):
    __doc__ = f"""
    Adafactor on projected gradients: second moments per row and per column.

    Args:
        params (`Iterable`):
            Parameters, or groups of them; groups with `rank` are projected, see
            [`GaLoreOptimizer`].
        lr (`float`, *optional*):
            Learning rate, unless `relative_step`.
        eps (`tuple[float, float]`, *optional*, defaults to `(1e-30, 1e-3)`):
            Added to squared gradients; smallest root mean square of a weight for `scale_parameter`.
        clip_threshold (`float`, *optional*, defaults to 1.0):
            Largest root mean square of an update.
        decay_rate (`float`, *optional*, defaults to -0.8):
            Exponent of the second moment's decay.
        beta1 (`float`, *optional*):
            Decay of the first moment; no first moment if not given.
        weight_decay (`float`, *optional*, defaults to 0.0):
            Decoupled weight decay, before the update.
        scale_parameter (`bool`, *optional*, defaults to `True`):
            Learning rates relative to the size of a weight.
        relative_step (`bool`, *optional*, defaults to `True`):
            Derive the learning rate from the step, without `lr`.
        warmup_init (`bool`, *optional*, defaults to `False`):
            Start the derived learning rate near zero.
        {OPTIONS_DOC}
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | None = None,
        eps: tuple[float, float] = (1e-30, 1e-3),
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        scale_parameter: bool = True,
        relative_step: bool = True,
        warmup_init: bool = False,
        **options: Any,
    ):
        if (lr is None) != relative_step:
            raise ValueError(
                f"lr is {lr!r} with relative_step={relative_step}; give lr or relative_step=True, "
                "and not both"
            )
        if warmup_init and not relative_step:
            raise ValueError("warmup_init is True with relative_step=False; needs relative_step")
        if not is_positive(clip_threshold):
            raise ValueError(f"clip_threshold is {clip_threshold!r}; must be positive")
        if decay_rate >= 0:
            raise ValueError(f"decay_rate is {decay_rate!r}; must be negative")
        defaults = {
            "lr": lr,
            "eps": tuple(eps),
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
            "scale_parameter": scale_parameter,
            "relative_step": relative_step,
            "warmup_init": warmup_init,
        }
        super().__init__(params, defaults, AdafactorCore(), **options)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of the tensors in an optimiser's state.

    For a matrix `(m, n)` with `m <= n` at rank `r`, GaLore has a basis of `m * r` and two moments
    of `n * r` each; AdamW has `2 * m * n`.
    """
    states = [part for state in optimizer.state.values() for part in state.get(SLICES, [state])]
    # Count each address once: 8-bit moments share their map.
    tensors = {
        value.data_ptr(): value.numel() * value.element_size()
        for state in states
        for value in state.values()
        if isinstance(value, Tensor)
    }
    return sum(tensors.values())
