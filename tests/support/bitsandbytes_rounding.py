"""How bitsandbytes 0.50 rounds on a CPU: 8-bit codes of scales and moments, and AdamW with them.

Its quantiser looks values up in a table of 65,536 even steps from -1 to 1, among which there is no zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from oddsmith.quant.nf4 import dynamic_map

BLOCKSIZE = 256


def stepped_codes(
    values: Tensor, code: Tensor, blocksize: int = BLOCKSIZE
) -> tuple[Tensor, Tensor]:
    """Codes of `values`, flat, and the largest magnitude of each block. A block of zeros gets code 0."""
    padded = torch.nn.functional.pad(values.flatten().float(), (0, -values.numel() % blocksize))
    blocks = padded.view(-1, blocksize)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * (1.0 / absmax)[:, None]).clamp(-1.0, 1.0)
    # A fused multiply-add: exact in fp64, and rounded once.
    steps = (((1.0 + scaled) * 0.5).double() * 65535.0 + 0.5).float().nan_to_num().long()
    nearest = 2.0 * (steps.float() / 65535.0) - 1.0
    codes = torch.bucketize(nearest, (code[1:] + code[:-1]) * 0.5)
    codes[absmax == 0] = 0
    return codes.flatten()[: values.numel()].to(torch.uint8), absmax


class SteppedAdamW:
    """AdamW8bit of one tensor, with bitsandbytes' codes and its order: decay first."""

    def __init__(self, value: Tensor, lr, betas, eps, weight_decay):
        self.value, self.options = value, (lr, betas, eps, weight_decay)
        blocks = -(-value.numel() // BLOCKSIZE)
        self.state: dict[str, Any] = {"step": 0}
        for i, signed in ((1, True), (2, False)):
            self.state |= {
                f"state{i}": torch.zeros(value.shape, dtype=torch.uint8),
                f"absmax{i}": torch.zeros(blocks),
                f"qmap{i}": dynamic_map(signed),
            }

    def _moment(self, i: int) -> Tensor:
        state = self.state
        spread = state[f"absmax{i}"].repeat_interleave(BLOCKSIZE)[: self.value.numel()]
        return state[f"qmap{i}"][state[f"state{i}"].flatten().long()] * spread

    @torch.no_grad()
    def step(self, grad: Tensor) -> None:
        (lr, (beta1, beta2), eps, decay), state = self.options, self.state
        state["step"] += 1
        flat = grad.flatten().float()
        first = self._moment(1).mul_(beta1).add_(flat, alpha=1.0 - beta1)
        second = self._moment(2).mul_(beta2).addcmul_(flat, flat, value=1.0 - beta2)
        below = (second.sqrt() / math.sqrt(1.0 - beta2 ** state["step"])).add_(eps)
        moved = self.value.flatten().float().mul_(1.0 - lr * decay)
        moved.addcdiv_(first, below, value=-lr / (1.0 - beta1 ** state["step"]))
        self.value.copy_(moved.view(self.value.shape))
        for i, moment in ((1, first), (2, second)):
            codes, state[f"absmax{i}"] = stepped_codes(moment, state[f"qmap{i}"])
            state[f"state{i}"] = codes.view(self.value.shape)
