"""GaLore with 8-bit moments: one byte per element, and a scale per 256 elements."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..adamw.arguments import Rule
from ..adamw.moments import MIN_8BIT_SIZE, decode, encode, has_our_maps, layout, maps
from ..adamw.step import AdamUpdate, NonFinite, adamw_step
from .galore import OPTIONS_DOC, GaLoreOptimizer
from .rules import AdamWCore, Group, State


class AdamW8bitCore(AdamWCore):
    """AdamW with moments as 8-bit codes, see [`oddsmith.optim.adamw.moments`]."""

    names: tuple[str, ...] = (*AdamWCore.names, "state1")

    def __init__(self) -> None:
        # Gradients that are not finite were removed before.
        self._bad = NonFinite()

    def init(self, state: State, like: Tensor, group: Group) -> None:
        """Adds moments for a gradient of the shape of `like`: 8-bit ones, unless it is small."""
        if group["optim_bits"] == 32 or like.numel() < MIN_8BIT_SIZE:
            super().init(state, like, group)
            return
        for key, (shape, dtype) in layout(like.shape, 8).items():
            state[key] = torch.zeros(shape, dtype=dtype, device=like.device)
        on_device = torch.device("cpu") if like.device.type == "meta" else like.device
        state |= dict(zip(("qmap1", "qmap2"), maps(on_device)))

    def loaded(self, state: State) -> None:
        """Shares the maps between parameters again, and converts codes of other maps to ours."""
        if "state1" in state:
            state |= {} if has_our_maps(state) else encode(*decode(state))
            state |= dict(zip(("qmap1", "qmap2"), maps(state["state1"].device)))

    def update(
        self,
        targets: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        weights: Sequence[Tensor],
        group: Group,
        lr: float,
    ) -> None:
        """One step of each target, in place; see [`AdamWCore.update`]."""
        updates, copies = [], []
        for target, grad, state in zip(targets, grads, states):
            if "exp_avg" in state:
                super().update([target], [grad], [state], [target], group, lr)
                continue
            state["step"] += 1
            if not target.is_contiguous():
                copies.append((target, target.contiguous()))
                target = copies[-1][1]
            # Here eps is added before the correction, and the optimiser applies weight decay.
            step_size = -lr * self.correction(state, group)
            beta1, beta2 = group["betas"]
            rule = Rule(beta1, beta2, group["eps"], step_size, keep=1.0)
            updates.append(AdamUpdate(target, grad.contiguous(), state, rule))
        adamw_step(updates, self._bad)
        for target, moved in copies:
            target.copy_(moved)


class GaLoreAdamW8bit(GaLoreOptimizer):
    __doc__ = f"""
    AdamW on projected gradients, with 8-bit moments.

    Moments of fewer than 4,096 elements, and those of groups with `optim_bits=32` (recommended for
    embeddings), are `fp32`. Runs on CPUs and GPUs; bitsandbytes is not needed.

    Args:
        params (`Iterable`):
            Parameters, or groups of them; groups with `rank` are projected, see
            [`GaLoreOptimizer`].
        lr (`float`, *optional*, defaults to 1e-3):
            Learning rate.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`):
            Decay of the moments.
        eps (`float`, *optional*, defaults to 1e-8):
            Added to the root of the second moment, before the bias correction.
        weight_decay (`float`, *optional*, defaults to 1e-2):
            Decoupled weight decay, after the update.
        optim_bits (`int`, *optional*, defaults to 8):
            8 or 32.
        {OPTIONS_DOC}
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        optim_bits: int = 8,
        **options: Any,
    ):
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": True,
            "optim_bits": optim_bits,
        }
        super().__init__(params, defaults, AdamW8bitCore(), **options)

    def _checked_group(self, group: dict[str, Any]) -> dict[str, Any]:
        bits = group.get("optim_bits", self.defaults["optim_bits"])
        if bits not in (8, 32):
            raise ValueError(f"{type(self).__name__}: optim_bits is {bits!r}; must be 8 or 32")
        return super()._checked_group(group)
