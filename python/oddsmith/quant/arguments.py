"""Arguments of the operators on 4-bit weights, as the core reads them (`src/python/quant.rs`)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

__all__ = ["NestedScales", "PackedWeight", "packed_weight"]


class NestedScales(NamedTuple):
    """The parts of quantised scales other than their codes."""

    absmax: Tensor
    code: Tensor
    offset: Tensor
    blocksize: int


class PackedWeight(NamedTuple):
    """A 4-bit tensor: its codes, and its scales or, with `nested`, the codes of its scales."""

    packed: Tensor
    absmax: Tensor
    nested: NestedScales | None
    blocksize: int


def packed_weight(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    nested_blocksize: int,
    blocksize: int,
) -> PackedWeight:
    """A 4-bit tensor from its parts in the order of the operators' schemas."""
    nested = None
    if nested_absmax is not None:
        if nested_code is None or offset is None:
            raise ValueError("nested_absmax is given without nested_code and offset")
        nested = NestedScales(nested_absmax, nested_code, offset, nested_blocksize)
    return PackedWeight(packed, absmax, nested, blocksize)
