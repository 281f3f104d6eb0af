"""GaLore with moments of 8 bits: a byte each, and a scale for every 256."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _core
from ..quant import dynamic_map
from .galore import OPTIONS_DOC, GaLoreOptimizer
from .galore_cores import AdamWCore, Group, State

BLOCKSIZE = 256
# Tensors smaller than this keep fp32 moments: there is little to save.
MIN_8BIT_SIZE = 4096
# Moments that are fp32 at a time; whole blocks.
_CHUNK = BLOCKSIZE << 12

# State of a moment -> whether it has a sign.
_MOMENTS = {"exp_avg": True, "exp_avg_root": False}


@functools.cache
def _map(signed: bool, device: torch.device) -> Tensor:
    return dynamic_map(signed).to(device)


def quantize(values: Tensor, code: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest codes, `uint8`, and the largest magnitude of each block of 256.

    Args:
        values (`Tensor`): `fp32`, flat.
        code (`Tensor`): The 256 values of the codes, ascending, within [-1, 1].
    """
    if values.device.type == "cpu":
        return _core.quantize_blockwise(values, code, BLOCKSIZE, False)
    count = values.numel()
    blocks = torch.nn.functional.pad(values, (0, -count % BLOCKSIZE)).view(-1, BLOCKSIZE)
    absmax = blocks.abs().amax(1)
    scaled = blocks / absmax.clamp(min=1e-38)[:, None]
    codes = torch.bucketize(scaled, (code[1:] + code[:-1]) / 2).to(torch.uint8)
    return codes.flatten()[:count], absmax


def dequantize(codes: Tensor, absmax: Tensor, code: Tensor) -> Tensor:
    """The values of codes, `fp32`, in their shape."""
    if codes.device.type == "cpu":
        return _core.dequantize_blockwise(codes, absmax, code, BLOCKSIZE, "float32")
    scales = absmax.repeat_interleave(BLOCKSIZE)[: codes.numel()]
    return code[codes.long()] * scales


class AdamW8bitCore(AdamWCore):
    """AdamW whose moments are 8-bit dynamic codes (Dettmers et al. 2022, arXiv 2110.02861).

    Kept is the root of the second moment. Of the moment itself the codes reach seven decades down,
    those of the first moment's square fourteen: an element whose gradient is small beside its
    block's would be left with a first moment over a second of zero.
    """

    names = (*AdamWCore.names, *(f"{name}_codes" for name in _MOMENTS))

    def init(self, state: State, like: Tensor, group: Group) -> None:
        """Adds moments for a gradient shaped as `like`: 8-bit ones, unless it is small."""
        if group["optim_bits"] == 32 or like.numel() < MIN_8BIT_SIZE:
            super().init(state, like, group)
            return
        blocks = -(-like.numel() // BLOCKSIZE)
        for name, signed in _MOMENTS.items():
            # The bits of the map differ between processors: it is saved with what it has coded.
            on_device = torch.device("cpu") if like.device.type == "meta" else like.device
            state[f"{name}_map"] = code = _map(signed, on_device)
            zero = int(code.abs().argmin())
            shape = like.shape
            state[f"{name}_codes"] = torch.full(shape, zero, dtype=torch.uint8, device=like.device)
            state[f"{name}_absmax"] = torch.zeros(blocks, device=like.device)

    def loaded(self, state: State) -> None:
        """Lets parameters share the map again, where it is this machine's."""
        for name, signed in _MOMENTS.items():
            code = state.get(f"{name}_map")
            if code is not None and torch.equal(code, own := _map(signed, code.device)):
                state[f"{name}_map"] = own

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
        for target, grad, state in zip(targets, grads, states):
            if "exp_avg" in state:
                super().update([target], [grad], [state], [target], group, lr)
                continue
            state["step"] += 1
            if not target.is_contiguous():
                change = torch.zeros_like(target, memory_format=torch.contiguous_format)
                self._update(change, grad, state, group, lr)
                target.add_(change)
            else:
                self._update(target, grad, state, group, lr)

    def _update(self, target: Tensor, grad: Tensor, state: State, group: Group, lr: float) -> None:
        target, grad = target.view(-1), grad.reshape(-1)
        for start in range(0, target.numel(), _CHUNK):
            part = slice(start, min(start + _CHUNK, target.numel()))
            blocks = slice(start // BLOCKSIZE, -(-part.stop // BLOCKSIZE))
            moments = {}
            for name in _MOMENTS:
                codes = state[f"{name}_codes"].view(-1)[part]
                scales = state[f"{name}_absmax"][blocks]
                moments[name] = dequantize(codes, scales, state[f"{name}_map"])
            moments["exp_avg_sq"] = moments["exp_avg_root"].square_()
            self.step_moments(target[part], grad[part], {**state, **moments}, group, lr)
            moments["exp_avg_root"] = moments["exp_avg_sq"].sqrt_()
            for name in _MOMENTS:
                codes, scales = quantize(moments[name], state[f"{name}_map"])
                state[f"{name}_codes"].view(-1)[part] = codes
                state[f"{name}_absmax"][blocks] = scales


class GaLoreAdamW8bit(GaLoreOptimizer):
    __doc__ = f"""
    AdamW on projected gradients, with moments of 8 bits.

    Moments of fewer than 4,096 elements, and those of groups with `optim_bits=32` (which is what
    embeddings should have), are `fp32`. Runs on CPUs and GPUs, and needs no bitsandbytes.

    Args:
        params (`Iterable`):
            Parameters, or groups of them; groups with `rank` are projected, see
            [`GaLoreOptimizer`].
        lr (`float`, *optional*, defaults to 1e-3):
            Learning rate.
        betas (`tuple[float, float]`, *optional*, defaults to `(0.9, 0.999)`):
            Of the moments.
        eps (`float`, *optional*, defaults to 1e-8):
            Added to the root of the second moment, before the correction of its bias.
        weight_decay (`float`, *optional*, defaults to 1e-2):
            Decoupled, after the update.
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
