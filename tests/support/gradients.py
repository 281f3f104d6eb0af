"""Tensors from seeds, and steps with given gradients, for the optimisers' tests."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers that depend only on the seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weights_of(
    shapes: Iterable[tuple[int, ...]], dtype: torch.dtype = torch.float32
) -> list[nn.Parameter]:
    """Parameters of normal numbers, the same at every call."""
    return [nn.Parameter(randn(*shape, seed=i).to(dtype)) for i, shape in enumerate(shapes)]


def values(weights: Iterable[nn.Parameter]) -> list[Tensor]:
    """Copies, to compare with."""
    return [each.detach().clone() for each in weights]


def train(
    optimizer: Optimizer, weight: Tensor, steps: int | Iterable[int], gradient: Callable
) -> None:
    """Steps of one parameter, with `gradient(step)` in each."""
    for step in range(steps) if isinstance(steps, int) else steps:
        weight.grad = gradient(step)
        optimizer.step()


def given(optimizer: Optimizer, grads: Iterable[Tensor | None]) -> None:
    """A step of all parameters with one gradient each, in order."""
    weights = [each for group in optimizer.param_groups for each in group["params"]]
    for weight, grad in zip(weights, grads, strict=True):
        weight.grad = None if grad is None else grad.to(weight.dtype)
    optimizer.step()
