"""The step of AdamW: the numbers of its rule, and the kernel or the ops that apply it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ... import _core
from .arguments import Item, Rule
from .moments import BLOCKSIZE, decode, encode, is_8bit

# Devices that the core may serve.
_SERVED = ("cpu", "cuda")


def rule_of(group: dict[str, Any], step: int) -> Rule:
    """
    The rule of a group's parameters at their step, counted from 1.

    `value = (value + step_size * m / (sqrt(v) + eps)) * keep`, which is Adam with bias correction,
    then decoupled weight decay, in bitsandbytes' order.
    """
    beta1, beta2 = group["betas"]
    second = math.sqrt(1.0 - beta2**step)
    step_size = -group["lr"] * second / (1.0 - beta1**step)
    keep = 1.0 - group["lr"] * group["weight_decay"]
    return Rule(beta1, beta2, group["eps"] * second, step_size, keep)


@dataclass
class AdamUpdate:
    """The arguments of a step on one tensor, in place."""

    value: Tensor  # contiguous; fp32, bf16 or fp16
    grad: Tensor  # contiguous, same shape; same dtype or fp32
    state: dict[str, Any]  # `state1`, `state2`, and the scales of 8-bit ones
    rule: Rule
    seed: int | None = None  # of stochastic rounding, 32 bits
    first: int = 0  # index of the first element, if this is a part of a parameter


class NonFinite:
    """Counts gradient elements that were NaN or infinite, without waiting for a device."""

    def __init__(self) -> None:
        self._counts: dict[torch.device, Tensor] = {}

    def on(self, device: torch.device) -> Tensor:
        """The counter on a device, `(1,)` int64."""
        if device not in self._counts:
            self._counts[device] = torch.zeros(1, dtype=torch.int64, device=device)
        return self._counts[device]

    def total(self) -> int:
        """The count; waits for the devices."""
        return sum(int(count) for count in self._counts.values())


def adamw_step(updates: Iterable[AdamUpdate], bad: NonFinite) -> None:
    """
    Applies updates, grouped by device.

    Elements whose gradient is NaN or infinite, or so large that its square is, are kept; their
    moments are reset.

    Args:
        updates (`Iterable[AdamUpdate]`): What is to be done.
        bad (`NonFinite`): Counts elements with such gradients.
    """
    # Moments of 8 and of 32 bits have kernels of their own.
    alike: dict[tuple[torch.device, bool], list[AdamUpdate]] = defaultdict(list)
    for update in updates:
        if update.value.numel():
            alike[update.value.device, is_8bit(update.state)].append(update)
    served: dict[torch.device, list[AdamUpdate]] = defaultdict(list)
    for (device, eight_bits), some in alike.items():
        if device.type in _SERVED and _core.adamw_serves(some[0].value, eight_bits):
            served[device] += some
            continue
        for update in some:
            _with_ops(update, bad.on(device))
    for device, some in served.items():
        _core.adamw_step([_item(update) for update in some], bad.on(device))
        torch.autograd.graph.increment_version([update.value for update in some])


def _item(update: AdamUpdate) -> Item:
    state = update.state
    return Item(
        update.value,
        update.grad,
        state["state1"],
        state["state2"],
        state.get("absmax1"),
        state.get("absmax2"),
        update.first,
        update.rule,
        update.seed,
    )


def _with_ops(update: AdamUpdate, bad: Tensor) -> None:
    """A step with torch's ops, for devices without a kernel."""
    beta1, beta2, eps, step_size, keep = update.rule
    value, grad, state = update.value, update.grad.float(), update.state
    square = grad * grad
    finite = square.isfinite()
    bad += (~finite).sum()
    first, second = decode(state)
    first = torch.where(finite, beta1 * first + (1 - beta1) * grad, 0.0)
    second = torch.where(finite, beta2 * second + (1 - beta2) * square, 0.0)
    moved = (value.float() + step_size * first / (second.sqrt() + max(eps, 1e-20))) * keep
    moved = torch.where(finite, moved, value.float())
    if update.seed is not None and value.dtype == torch.bfloat16:
        moved = _nudged(moved, update.seed, update.first)
    after = encode(first, second) if is_8bit(state) else {"state1": first, "state2": second}
    # After everything that allocates, so that value and moments are of the same step.
    value.copy_(moved)
    for key, tensor in after.items():
        if not key.startswith("qmap"):
            state[key].copy_(tensor)


_32_BITS = 0xFFFFFFFF


def _nudged(wide: Tensor, seed: int, first: int) -> Tensor:
    """Values of bf16, rounded up with the probability that keeps the mean: as `store` in src/optim/adamw.rs."""
    # A block's start is split into halves; only its low half grows within it.
    place = torch.arange(wide.numel(), device=wide.device).view(wide.shape)
    block = place // BLOCKSIZE * BLOCKSIZE + first
    start = (block & _32_BITS) ^ _times(block >> 32, 0x9E3779B9)
    noise = ((start + place % BLOCKSIZE) & _32_BITS) ^ seed
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        noise = _times(noise ^ (noise >> shift), factor)
    noise = (noise ^ (noise >> 16)) & 0xFFFF
    bits = wide.view(torch.int32)
    nudged = ((bits.long() + noise) & ~0xFFFF).to(torch.int32)
    return torch.where(wide.isfinite(), nudged, bits).view(torch.float32)


def _times(x: Tensor, factor: int) -> Tensor:
    """The low 32 bits of a product of 32-bit numbers, in halves that 64 bits hold."""
    high = ((x >> 16) * factor & 0xFFFF) << 16
    return ((x & 0xFFFF) * factor + high) & _32_BITS
