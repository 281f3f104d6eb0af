"""AdamW as bitsandbytes 0.50 computes it on a CPU, to the bit but for rounding; for comparisons.

Its maps, its quantiser, which goes through a table that has no zero, and its order: decay first.
"""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from ... import _core
from ...quant.nf4 import dynamic_map
from .moments import BLOCKSIZE


def compatible_maps() -> tuple[Tensor, Tensor]:
    """Bitsandbytes' maps of first and second moments."""
    return dynamic_map(True), dynamic_map(False)


def compatible_step(
    value: Tensor, grad: Tensor, state: dict[str, Any], group: dict[str, Any]
) -> None:
    """One step of a parameter with 8-bit moments, in place."""
    beta1, beta2 = group["betas"]
    first, second = (
        _core.dequantize_blockwise(
            state[f"state{i}"].flatten(),
            state[f"absmax{i}"],
            state[f"qmap{i}"],
            BLOCKSIZE,
            "float32",
        )
        for i in (1, 2)
    )
    flat = grad.flatten().float()
    first.mul_(beta1).add_(flat, alpha=1.0 - beta1)
    second.mul_(beta2).addcmul_(flat, flat, value=1.0 - beta2)
    step = state["step"]
    below = (second.sqrt() / math.sqrt(1.0 - beta2**step)).add_(group["eps"])
    moved = value.flatten().float()
    if group["weight_decay"] > 0.0:
        moved.mul_(1.0 - group["lr"] * group["weight_decay"])
    moved.addcdiv_(first, below, value=-group["lr"] / (1.0 - beta1**step))
    value.copy_(moved.view(value.shape))
    for i, moment in ((1, first), (2, second)):
        codes, absmax = _core.quantize_blockwise(moment, state[f"qmap{i}"], BLOCKSIZE, True)
        state[f"state{i}"].copy_(codes.view(value.shape))
        state[f"absmax{i}"].copy_(absmax)
