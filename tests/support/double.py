"""Models of transformers in `float64` throughout."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

__all__ = ["stay_in_double"]


@contextmanager
def stay_in_double() -> Iterator[None]:
    """Norms and rotations stay in float64, which the models' code casts to float32, and positions join them."""
    to, as_float = torch.Tensor.to, torch.Tensor.float

    @functools.wraps(to)
    def keep(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        wide = x.dtype == torch.float64 and torch.float32 in (*args, *kwargs.values())
        return x if wide else to(x, *args, **kwargs)

    def widen(x: torch.Tensor) -> torch.Tensor:
        # transformers 5.17 multiplies positions and frequencies as matrices, which takes one dtype.
        narrow = x.is_floating_point() and x.dtype != torch.float64
        return as_float(x) if narrow else x.double()

    with (
        mock.patch.object(torch.Tensor, "to", keep),
        mock.patch.object(torch.Tensor, "float", widen),
    ):
        yield
