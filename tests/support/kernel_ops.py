"""Small operations of every family of kernels, with inputs that are the same each time."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from oddsmith import _core, functional
from oddsmith.optim.adamw.moments import encode
from oddsmith.optim.adamw.step import AdamUpdate, NonFinite, adamw_step, rule_of


def _draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def head_forward() -> list[Tensor]:
    return [functional.linear_logps(_draw(6, 64), _draw(40, 64), torch.arange(6))]


def head_expectation() -> list[Tensor]:
    hidden = _draw(6, 64).requires_grad_()
    logps = functional.linear_logps(hidden, _draw(40, 64), torch.arange(6))
    return [logps.detach(), *torch.autograd.grad(logps.sum(), hidden)]


def head_gradient() -> list[Tensor]:
    leaves = [_draw(6, 64).requires_grad_(), _draw(40, 64).requires_grad_()]
    logps = functional.linear_logps(*leaves, torch.arange(6))
    return [logps.detach(), *torch.autograd.grad(logps.sum(), leaves)]


def head_batch() -> list[Tensor]:
    leaves = [_draw(6, 64).requires_grad_(), _draw(40, 64).requires_grad_()]
    rows = torch.arange(6)
    sizes = {"num_pairs": 1, "num_scored": 5}
    result = functional.linear_orpo(*leaves, rows, rows // 3, rows % 3 > 0, 0.3, **sizes)
    return [result.loss.detach(), *torch.autograd.grad(result.loss, leaves)]


def nf4_quantize() -> list[Tensor]:
    packed, state = functional.quantize_nf4(_draw(32, 64))
    return [packed, state.absmax]


def nf4_dequantize() -> list[Tensor]:
    return [functional.dequantize_nf4(*functional.quantize_nf4(_draw(32, 64)))]


def nf4_product() -> list[Tensor]:
    return [functional.linear_nf4(_draw(3, 64), *functional.quantize_nf4(_draw(32, 64)))]


def blockwise8() -> list[Tensor]:
    code = torch.linspace(-1, 1, 256)
    codes, absmax = _core.quantize_blockwise(_draw(300), code, 64)
    return [codes, absmax, _core.dequantize_blockwise(codes, absmax, code, 64, "float32")]


def _adamw(bits: int) -> list[Tensor]:
    group = {"lr": 0.1, "betas": (0.8, 0.9), "eps": 1e-6, "weight_decay": 0.1}
    values, updates = [_draw(300), _draw(7)], []
    for value in values:
        zeros = [torch.zeros_like(value) for _ in range(2)]
        full: dict[str, Any] = {"state1": zeros[0], "state2": zeros[1]}
        state: dict[str, Any] = {**encode(*zeros)} if bits == 8 else full
        updates.append(AdamUpdate(value, value.cos(), state, rule_of(group, 1)))
    adamw_step(updates, NonFinite())
    return values


FAMILIES: dict[str, Callable[[], list[Tensor]]] = {
    "head_forward": head_forward,
    "head_expectation": head_expectation,
    "head_gradient": head_gradient,
    "head_batch": head_batch,
    "nf4_quantize": nf4_quantize,
    "nf4_dequantize": nf4_dequantize,
    "nf4_product": nf4_product,
    "blockwise8": blockwise8,
    "adamw8": lambda: _adamw(8),
    "adamw32": lambda: _adamw(32),
}
