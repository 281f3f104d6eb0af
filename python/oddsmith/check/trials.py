"""Every family of operations beside the same in plain torch, on one device.

The measure is three-way: the truth is computed in `float64`, and ours may be as far from it as a few
times what torch is in the dtype itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _core
from ..functional import dequantize_nf4, linear_logps, linear_nf4, linear_orpo, quantize_nf4
from ..optim.adamw.adamw_8bit import AdamW8bit
from ..quant.nf4 import dynamic_map
from ..quant.state import QuantState, nf4_code
from .findings import Trial

__all__ = ["CASES", "Case", "Measure", "cases", "dtypes", "farthest", "outcome"]

# How much farther from the truth than torch ours may be: sums in another order.
_SLACK = 4.0
# Roundings of the largest value that are allowed where torch happens to be exact.
_ROUNDINGS = 4.0


@dataclass
class Measure:
    """Results of one family.

    Args:
        ours, peer, truth (`list[Tensor]`): Results of ours, of torch in the dtype, and in `float64`.
        slack (`float`): What ours may be off beyond it, as a share, where ours rounds and torch does not.
    """

    ours: list[Tensor]
    peer: list[Tensor]
    truth: list[Tensor]
    slack: float = 0.0

    def deviation(self) -> float:
        return farthest(self.ours, self.truth)

    def allowed(self, dtype: torch.dtype) -> float:
        rounding = _ROUNDINGS * torch.finfo(dtype).eps
        return self.slack + _SLACK * farthest(self.peer, self.truth) + rounding


def farthest(results: list[Tensor], truth: list[Tensor]) -> float:
    """The largest difference, as a share of the largest value of its tensor; infinite for NaN."""
    worst = 0.0
    for result, true in zip(results, truth, strict=True):
        if result.shape != true.shape:
            return float("inf")
        size = true.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
        share = ((result.double() - true).abs().max() / size).item()
        if share != share:
            return float("inf")
        worst = max(worst, share)
    return worst


def dtypes(device: torch.device) -> tuple[torch.dtype, ...]:
    """What is trained in on a device."""
    if device.type != "cuda":
        return torch.float32, torch.bfloat16
    return torch.float32, torch.bfloat16, torch.float16


def _head_inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Odd sizes, and a weight that makes the softmax peaked."""
    draw = torch.Generator().manual_seed(0)
    rows, width, words = 67, 136, 3001
    weight = torch.randn(words, width, generator=draw) / width**0.5
    targets = torch.randint(words, (rows,), generator=draw)
    hidden = torch.randn(rows, width, generator=draw) + 0.5 * weight[targets] * width**0.5
    targets[::7] = -100
    return hidden.to(device, dtype), weight.to(device, dtype), targets.to(device)


def _naive_logps(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    scored = targets >= 0
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    picked = logits.log_softmax(-1).gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return picked * scored


def head_forward(device: torch.device, dtype: torch.dtype) -> Measure:
    """Log-probabilities of a frozen head."""
    inputs = _head_inputs(device, dtype)
    hidden, weight, targets = inputs
    return Measure(
        [linear_logps(*inputs)],
        [_naive_logps(*inputs)],
        [_naive_logps(hidden.double(), weight.double(), targets)],
    )


def head_gradient(device: torch.device, dtype: torch.dtype) -> Measure:
    """Gradients of hidden states and weight."""
    *inputs, targets = _head_inputs(device, dtype)
    upstream = torch.linspace(-1, 1, len(targets), device=device)

    def gradients(logps: Callable[..., Tensor], wider: torch.dtype) -> list[Tensor]:
        leaves = [x.to(wider).requires_grad_() for x in inputs]
        result = logps(*leaves, targets)
        return list(torch.autograd.grad(result, leaves, upstream.to(result.dtype)))

    return Measure(
        gradients(linear_logps, dtype),
        gradients(_naive_logps, dtype),
        gradients(_naive_logps, torch.float64),
    )


def head_batch(device: torch.device, dtype: torch.dtype) -> Measure:
    """The loss of a batch of pairs, and its gradient."""
    hidden, weight, targets = _head_inputs(device, dtype)
    pairs, beta = 3, 0.3
    rows = torch.arange(len(targets), device=device)
    sequence = rows * 2 * pairs // len(targets)  # chosen ones, then rejected ones
    completion = (rows % 5 > 0) & (targets >= 0)

    def naive(wider: torch.dtype) -> list[Tensor]:
        leaf = hidden.to(wider).requires_grad_()
        logps = _naive_logps(leaf, weight.to(wider), targets).double()
        chosen = (sequence < pairs) & (targets >= 0)
        counts = torch.zeros(2 * pairs, device=device, dtype=torch.float64)
        counts.index_add_(0, sequence, completion.double())
        sums = torch.zeros_like(counts).index_add(0, sequence, logps * completion)
        means = sums / counts
        log_odds = means - torch.log(-torch.expm1(means))
        ratio = F.logsigmoid(log_odds[:pairs] - log_odds[pairs:])
        loss = -(logps * chosen).sum() / chosen.sum() - beta * ratio.mean()
        return [loss.detach(), *torch.autograd.grad(loss, [leaf])]

    leaf = hidden.clone().requires_grad_()
    loss = linear_orpo(leaf, weight, targets, sequence, completion, beta).loss
    ours = [loss.detach(), *torch.autograd.grad(loss, [leaf])]
    return Measure(ours, naive(dtype), naive(torch.float64))


def _weight(device: torch.device, dtype: torch.dtype) -> Tensor:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(510, 384, generator=draw).to(device, dtype)


def nf4_quantize(device: torch.device, dtype: torch.dtype) -> Measure:
    """The codes: each value's distance to its code is the least there is."""
    weight = _weight(device, dtype)
    packed, state = quantize_nf4(weight)
    code, scales = nf4_code(device).double(), state.absmax.double()
    blocks = weight.double().view(-1, 64)
    scaled = blocks / blocks.abs().amax(1, keepdim=True)
    nearest = (scaled[..., None] - code).abs().amin(-1)
    return Measure(
        [(scaled - code[_codes(packed)]).abs(), scales],
        [nearest, scales],
        [nearest, blocks.abs().amax(1)],
    )


def nf4_dequantize(device: torch.device, dtype: torch.dtype) -> Measure:
    """The values of codes and scales."""
    weight = _weight(device, dtype)
    packed, state = quantize_nf4(weight)
    true = _values(packed, state).view(weight.shape)
    return Measure([dequantize_nf4(packed, state)], [true.to(dtype)], [true])


def _codes(packed: Tensor) -> Tensor:
    return torch.stack([packed >> 4, packed & 15], -1).view(-1, 64).long()


def _values(packed: Tensor, state: QuantState) -> Tensor:
    code = nf4_code(packed.device).double()
    return code[_codes(packed)] * state.absmax.double()[:, None]


def nf4_product(device: torch.device, dtype: torch.dtype) -> Measure:
    """Products of one, a few and many tokens with a 4-bit weight, and their gradient."""
    weight = _weight(device, dtype)
    packed, state = quantize_nf4(weight)
    true = _values(packed, state).view(weight.shape)
    draw = torch.Generator().manual_seed(2)
    tokens = [torch.randn(n, 384, generator=draw).to(device, dtype) for n in (1, 5, 67)]

    def results(product: Callable[[Tensor], Tensor], wider: torch.dtype) -> list[Tensor]:
        found = []
        for x in tokens:
            leaf = x.to(wider).requires_grad_()
            out = product(leaf)
            found += [out.detach(), *torch.autograd.grad(out, leaf, torch.ones_like(out))]
        return found

    def ours(x: Tensor) -> Tensor:
        return linear_nf4(x, packed, state)

    return Measure(
        results(ours, dtype),
        results(lambda x: x @ true.to(dtype).T, dtype),
        results(lambda x: x @ true.T, torch.float64),
    )


def blockwise8(device: torch.device, dtype: torch.dtype) -> Measure:
    """8-bit blocks, there and back."""
    values = _weight(device, torch.float32)
    code = dynamic_map().to(device)

    codes, absmax = _core.quantize_blockwise(values, code, 256)
    ours = _core.dequantize_blockwise(codes, absmax, code, 256, "float32")
    scales = values.view(-1, 256).abs().amax(1, keepdim=True).double()
    scaled = values.view(-1, 256).double() / scales
    nearest = code.double()[(scaled[..., None] - code.double()).abs().argmin(-1)] * scales
    back = nearest.view(values.shape)
    return Measure([ours], [back.float()], [back])


def adamw(device: torch.device, dtype: torch.dtype, bits: int) -> Measure:
    """Two steps of AdamW; 8-bit moments differ from the second step on."""
    draw = torch.Generator().manual_seed(3)
    start, *gradients = (torch.randn(8191, generator=draw).to(device, dtype) for _ in range(3))
    options: dict[str, Any] = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6}
    decay = 0.5

    def run(optimizer: torch.optim.Optimizer, after: float) -> list[Tensor]:
        (parameter,) = optimizer.param_groups[0]["params"]
        for gradient in gradients:
            parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
            parameter.detach().mul_(after)
        return [parameter.detach()]

    def naive(wider: torch.dtype) -> list[Tensor]:
        parameter = torch.nn.Parameter(start.to(wider, copy=True))
        # As bitsandbytes, ours decays after the step, and torch before it.
        return run(torch.optim.AdamW([parameter], **options, weight_decay=0.0), 1 - 0.1 * decay)

    parameter = torch.nn.Parameter(start.clone())
    mine = AdamW8bit([parameter], **options, weight_decay=decay, optim_bits=bits, min_8bit_size=1)
    # A step of 0.1 in values up to 4, with moments of about two digits.
    slack = 0.01 if bits == 8 else 0.0
    return Measure(run(mine, 1.0), naive(dtype), naive(torch.float64), slack)


@dataclass(frozen=True)
class Case:
    """A family; where `dtype` is given it is tried in that alone."""

    name: str
    run: Callable[[torch.device, torch.dtype], Measure]
    dtype: torch.dtype | None = None


CASES = (
    Case("head, forward", head_forward),
    Case("head, gradients", head_gradient),
    Case("head, loss of a batch", head_batch),
    Case("NF4, quantise", nf4_quantize),
    Case("NF4, dequantise", nf4_dequantize),
    Case("NF4, products", nf4_product),
    Case("8-bit blocks", blockwise8, torch.float32),
    Case("AdamW, 8 bits", lambda device, dtype: adamw(device, dtype, 8)),
    Case("AdamW, 32 bits", lambda device, dtype: adamw(device, dtype, 32)),
)


def cases(device: torch.device) -> Iterator[tuple[Case, torch.dtype]]:
    """Every family with every dtype that it serves on a device."""
    for case in CASES:
        for dtype in (case.dtype,) if case.dtype else dtypes(device):
            yield case, dtype


def outcome(case: Case, device: torch.device, dtype: torch.dtype) -> Trial:
    """What a family gives; an error of any kind is a result too."""
    named = str(device), case.name, str(dtype).removeprefix("torch.")
    try:
        measure = case.run(device, dtype)
        deviation = measure.deviation()
        if deviation == float("inf"):
            return Trial(*named, None, None, "the result has NaN, or the wrong shape")
        return Trial(*named, deviation, measure.allowed(dtype))
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        return Trial(*named, None, None, reason)
