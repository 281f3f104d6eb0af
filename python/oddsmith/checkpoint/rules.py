"""What becomes of the tensors of a checkpoint, as the core reads it (`src/python/checkpoint.rs`)."""

from __future__ import annotations

from dataclasses import dataclass

# Of values before and after.
DTYPES = ("float32", "bfloat16", "float16")
# safetensors' names of the floats that models have.
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Factor:
    """A small matrix of an adapter, by name; `transposed` if its transpose is meant."""

    name: str
    transposed: bool = False


@dataclass(frozen=True)
class Update:
    """
    What an adapter adds to a matrix: `scale * left @ right`.

    Args:
        left ([`Factor`]): `(rows, rank)`.
        right ([`Factor`], *optional*): `(rank, columns)`; none for a vector.
        scale (`float`, *optional*, defaults to 1.0): Factor on the product.
        magnitude (`str`, *optional*): Name of the lengths that DoRA gives the rows of the sum.
    """

    left: Factor
    right: Factor | None = None
    scale: float = 1.0
    magnitude: str | None = None


@dataclass(frozen=True)
class Rule:
    """
    What becomes of a tensor. Tensors without a rule are copied.

    Args:
        name (`str`): Its name in the checkpoint.
        dtype (`str`): `float32`, `bfloat16` or `float16`: of the values that are written, or that
            are quantised.
        replacement (`str`, *optional*): Name of a tensor of the adapter that takes its place.
        update ([`Update`], *optional*): What is added to it.
        transposed (`bool`, *optional*, defaults to `False`): Write its transpose.
        quantize (`bool`, *optional*, defaults to `False`): Write it as NF4.
        blocksize (`int`, *optional*, defaults to 64): Values that share a scale.
        double_quant (`bool`, *optional*, defaults to `False`): Quantise the scales too.
    """

    name: str
    dtype: str
    replacement: str | None = None
    update: Update | None = None
    transposed: bool = False
    quantize: bool = False
    blocksize: int = 64
    double_quant: bool = False
