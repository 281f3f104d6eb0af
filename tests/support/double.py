"""Models of transformers in `float64` throughout."""

import functools
from typing import Any

import pytest
import torch

__all__ = ["stay_in_double"]


def stay_in_double(monkeypatch: pytest.MonkeyPatch) -> None:
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

    monkeypatch.setattr(torch.Tensor, "to", keep)
    monkeypatch.setattr(torch.Tensor, "float", widen)
