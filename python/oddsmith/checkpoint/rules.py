"""Rules: how the core converts each tensor of a checkpoint (`src/python/checkpoint.rs`)."""

from __future__ import annotations

from dataclasses import dataclass

# Dtypes of values before and after.
DTYPES = ("float32", "bfloat16", "float16")
# safetensors' names of the float dtypes of models.
FLOATS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


@dataclass(frozen=True)
class Factor:
    """A small matrix of an adapter, by name; `transposed` to use its transpose."""

    name: str
    transposed: bool = False


@dataclass(frozen=True)
class MergeUpdate:
    """
    The update of an adapter to a matrix: `scale * left @ right`.

    Args:
        left ([`Factor`]): `(rows, rank)`.
        right ([`Factor`], *optional*): `(rank, columns)`; none for a vector.
        scale (`float`, *optional*, defaults to 1.0): Factor on the product.
        magnitude (`str`, *optional*): Name of the norms that DoRA gives the rows of the sum.
    """

    left: Factor
    right: Factor | None = None
    scale: float = 1.0
    magnitude: str | None = None


@dataclass(frozen=True)
class TensorRule:
    """
    How a tensor is converted. Tensors without a rule are copied.

    Args:
        name (`str`): Name of the tensor in the checkpoint.
        dtype (`str`): `float32`, `bfloat16` or `float16`: dtype of the written values, or of the
            values before quantisation.
        replacement (`str`, *optional*): Name of a tensor of the adapter that replaces it.
        update ([`MergeUpdate`], *optional*): Update to add.
        transposed (`bool`, *optional*, defaults to `False`): Write its transpose.
        quantize (`bool`, *optional*, defaults to `False`): Write it as NF4.
        blocksize (`int`, *optional*, defaults to 64): Values that share a scale.
        double_quant (`bool`, *optional*, defaults to `False`): Quantise the scales too.
    """

    name: str
    dtype: str
    replacement: str | None = None
    update: MergeUpdate | None = None
    transposed: bool = False
    quantize: bool = False
    blocksize: int = 64
    double_quant: bool = False
