"""Checks of the options of parameter groups."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def is_count(value: Any) -> bool:
    """Whether a value is a positive integer."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_number(value: Any) -> bool:
    """Whether a value is an integer or a float."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_positive(value: Any) -> bool:
    """Whether a value is a positive, finite number, also in the dtype that optimizers compute in."""
    return is_number(value) and 0 < in_float32(value) < math.inf


def in_float32(value: float) -> float:
    """A number as `float32` has it: infinite if it is too large, 0 if it is too small."""
    try:
        return ctypes.c_float(value).value
    except OverflowError:  # an integer that no float has
        return math.inf if value > 0 else -math.inf


def check_not_captured(name: str, parameters: Iterable[Tensor]) -> None:
    """
    Checks that no CUDA graph is captured, which would repeat a step with the numbers of the first.

    Args:
        name (`str`): Of the optimizer.
        parameters (`Iterable[Tensor]`): What the step changes.

    Raises:
        RuntimeError: If one is.
    """
    on_gpu = any(parameter.is_cuda for parameter in parameters)
    if on_gpu and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"{name}: a step cannot be captured in a CUDA graph, because every replay would have the learning "
            "rate, the bias correction and the random numbers of the same step; capture the forward and "
            "backward pass, and call step() after each replay"
        )


def check_adam(options: dict[str, Any]) -> None:
    """
    Checks the options that every group has.

    Raises:
        ValueError: If `lr`, `betas`, `eps` or `weight_decay` is out of range.
    """
    lr = options.get("lr", 0.0)
    if isinstance(lr, Tensor):
        raise ValueError("lr is a tensor; must be a number")
    if lr is not None and not (is_number(lr) and 0.0 <= in_float32(lr) < math.inf and lr >= 0.0):
        raise ValueError(f"lr is {lr!r}; must be a number of at least 0, and finite in float32")
    betas = options.get("betas", (0.0, 0.0))
    if len(betas) != 2 or not all(is_number(beta) and 0.0 <= beta < 1.0 for beta in betas):
        raise ValueError(f"betas is {betas!r}; must be two numbers in [0, 1)")
    if any(in_float32(beta) == 1.0 for beta in betas):
        raise ValueError(f"betas is {betas!r}; must be less than 1 in float32, or a moment stays 0")
    for name in ("eps", "weight_decay"):
        values = options.get(name, 0.0)
        for value in values if isinstance(values, (tuple, list)) else (values,):
            if not (is_number(value) and value >= 0.0):
                raise ValueError(f"{name} is {values!r}; must be at least 0")
            if in_float32(value) == math.inf or (in_float32(value) == 0.0) != (value == 0.0):
                raise ValueError(f"{name} is {values!r}; must be 0 or a number that float32 has")
