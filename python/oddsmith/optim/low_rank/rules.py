"""The update rules: AdamW and Adafactor.

A core updates targets in place from their gradients. The optimisers pass either the parameters, or
zeros in the shape of a projected gradient, whose update they project back. Weight decay is applied
by the optimisers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

State = dict[str, Any]
Group = dict[str, Any]


def norm_of(tensor: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    """`torch.linalg.vector_norm` in `fp32`; of a `float64` tensor, which it would not narrow, too."""
    wide = tensor.dtype == torch.float64
    dtype = torch.float64 if wide else torch.float32
    return torch.linalg.vector_norm(tensor, dim=dim, keepdim=keepdim, dtype=dtype).float()


def rms(tensor: Tensor) -> Tensor:
    """Root of the mean square, `fp32`, 0-dim."""
    norm = norm_of(tensor)
    return norm / max(tensor.numel(), 1) ** 0.5


class AdamWCore:
    """AdamW with `fp32` moments: `target -= lr * correction * m / (sqrt(v) + eps)`.

    `correction` is `sqrt(1 - beta2^t) / (1 - beta1^t)`, or 1 without `correct_bias`: `eps` is added
    before the correction, as in GaLore (Zhao et al. 2024, algorithm 2) and older transformers.
    """

    decay_first = False
    names: tuple[str, ...] = ("exp_avg", "exp_avg_sq")

    def init(self, state: State, like: Tensor, group: Group) -> None:
        """Adds the moments for a gradient of the shape of `like`."""
        for name in ("exp_avg", "exp_avg_sq"):
            state[name] = torch.zeros(like.shape, dtype=torch.float32, device=like.device)

    def correction(self, state: State, group: Group) -> float:
        """Factor of a step, after `state["step"]` was incremented."""
        if not group["correct_bias"]:
            return 1.0
        beta1, beta2 = group["betas"]
        return math.sqrt(1.0 - beta2 ** state["step"]) / (1.0 - beta1 ** state["step"])

    def decay(self, state: State, group: Group, lr: float) -> float:
        """Fraction of a parameter that weight decay removes."""
        return lr * group["weight_decay"]

    def update(
        self,
        targets: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        weights: Sequence[Tensor],
        group: Group,
        lr: float,
    ) -> None:
        """
        One step of each target and its moments, in place.

        Args:
            targets (`Sequence[Tensor]`): Tensors to change, `fp32`.
            grads (`Sequence[Tensor]`): Their gradients, `fp32`.
            states (`Sequence[dict]`): Their states; `step` is incremented.
            weights (`Sequence[Tensor]`): The parameters of the targets, for rules that depend on
                the size of a weight.
            group (`dict`): Options of the parameter group.
            lr (`float`): Learning rate.
        """
        for target, grad, state in zip(targets, grads, states):
            state["step"] += 1
            self.step_moments(target, grad, state, group, lr)

    def loaded(self, state: State) -> None:
        """Adapts a state that was just loaded."""

    def step_moments(
        self, target: Tensor, grad: Tensor, state: State, group: Group, lr: float
    ) -> None:
        """Updates `exp_avg`, `exp_avg_sq` and then the target."""
        _fused_adamw(target, grad, state, group, lr)


def _fused_adamw(target: Tensor, grad: Tensor, state: State, group: Group, lr: float) -> None:
    beta1, beta2 = group["betas"]
    step, eps = state["step"], group["eps"]
    if group["correct_bias"]:
        # torch adds eps after the correction.
        eps = eps / math.sqrt(1.0 - beta2**step)
    else:
        # A step so large that torch's corrections are 1.
        step = 2**40
    # The kernel increments the step.
    count = torch.full((), float(step - 1), dtype=torch.float32, device=target.device)
    adamw(
        [target],
        [grad],
        [state["exp_avg"]],
        [state["exp_avg_sq"]],
        [],
        [count],
        fused=True,
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=lr,
        weight_decay=0.0,
        eps=eps,
        maximize=False,
    )


class AdafactorCore:
    """Adafactor (Shazeer and Stern 2018, arXiv 1804.04235), with transformers' options."""

    decay_first = True
    names: tuple[str, ...] = ("exp_avg", "exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq")

    def init(self, state: State, like: Tensor, group: Group) -> None:
        """Adds the row and column means, or the second moment if it is not a matrix."""

        def zeros(shape: Sequence[int]) -> Tensor:
            return torch.zeros(shape, dtype=torch.float32, device=like.device)

        if group["beta1"] is not None:
            state["exp_avg"] = zeros(like.shape)
        if like.dim() >= 2:
            state["exp_avg_sq_row"] = zeros(like.shape[:-1])
            state["exp_avg_sq_col"] = zeros(like.shape[:-2] + like.shape[-1:])
        else:
            state["exp_avg_sq"] = zeros(like.shape)

    def loaded(self, state: State) -> None:
        """Adapts a state that was just loaded."""

    def decay(self, state: State, group: Group, lr: float) -> float:
        """Fraction of a parameter that weight decay removes, by the learning rate of the next
        step.
        """
        return group["weight_decay"] * state["rate"]

    def rate(self, weight: Tensor, step: int, group: Group, lr: float | None) -> float:
        """Learning rate of a parameter at a step (section 8 of the paper)."""
        if group["relative_step"]:
            least = 1e-6 * step if group["warmup_init"] else 1e-2
            rate = min(least, 1.0 / math.sqrt(step))
        elif lr is not None:
            rate = lr
        else:
            raise ValueError("lr is None; must be a number without relative_step")
        if group["scale_parameter"]:
            rate *= max(group["eps"][1], float(rms(weight)))
        return rate

    def update(
        self,
        targets: Sequence[Tensor],
        grads: Sequence[Tensor],
        states: Sequence[State],
        weights: Sequence[Tensor],
        group: Group,
        lr: float | None,
    ) -> None:
        """One step of each target, in place; see [`AdamWCore.update`]."""
        for target, grad, state, weight in zip(targets, grads, states, weights):
            state["step"] += 1
            state["rate"] = self.rate(weight, state["step"], group, lr)
            target.sub_(self._change(grad, state, group))

    def _change(self, grad: Tensor, state: State, group: Group) -> Tensor:
        beta2 = 1.0 - state["step"] ** group["decay_rate"]
        change = grad.square().add_(group["eps"][0])
        if "exp_avg_sq" in state:
            mean = state["exp_avg_sq"].lerp_(change, 1.0 - beta2)
            change = mean.rsqrt().mul_(grad)
        else:
            row = state["exp_avg_sq_row"].lerp_(change.mean(dim=-1), 1.0 - beta2)
            column = state["exp_avg_sq_col"].lerp_(change.mean(dim=-2), 1.0 - beta2)
            torch.mul(grad, (row / row.mean(dim=-1, keepdim=True)).rsqrt_()[..., None], out=change)
            change.mul_(column.rsqrt()[..., None, :])
        change.mul_(state["rate"] / (rms(change) / group["clip_threshold"]).clamp_(min=1.0))
        if group["beta1"] is not None:
            change = state["exp_avg"].lerp_(change, 1.0 - group["beta1"])
        return change


def update_parameter(
    core: Any, parameter: Tensor, grad: Tensor, state: State, group: Group, lr: float | None
) -> None:
    """One step of a parameter that is not projected, weight decay included.

    For half precision, the change is computed in `fp32` and rounded once.
    """
    if parameter.dtype == torch.float32 and not core.decay_first:
        core.update([parameter], [grad], [state], [parameter], group, lr)
        decay_parameter(core, parameter, state, group, lr)
        return
    change = torch.zeros(parameter.shape, dtype=torch.float32, device=parameter.device)
    core.update([change], [grad.float()], [state], [parameter], group, lr)
    if core.decay_first:
        decay_parameter(core, parameter, state, group, lr)
    parameter.add_(change)
    if not core.decay_first:
        decay_parameter(core, parameter, state, group, lr)


def decay_parameter(
    core: Any, parameter: Tensor, state: State, group: Group, lr: float | None
) -> None:
    """Decoupled weight decay (Loshchilov and Hutter 2019, arXiv 1711.05101)."""
    if group["weight_decay"]:
        parameter.mul_(1.0 - core.decay(state, group, lr))
