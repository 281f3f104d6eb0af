"""NF4: tensors as 4-bit codes with one scale per block, in the format of bitsandbytes.

Use [`quantize_nf4`] and [`dequantize_nf4`] through `oddsmith.functional`. The algorithm is in
`src/quant`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _core
from .arguments import packed_weight
from .state import QuantState, dtype_name, layout, nested_layout, nf4_code

__all__ = ["dequantize_nf4", "dynamic_map", "quantize_nf4"]

# Scales that share one scale in double quantisation.
NESTED_BLOCKSIZE = 256


def dynamic_map(signed: bool = True) -> Tensor:
    """The 256 values of 8-bit dynamic quantisation, ascending, `float32`.

    Dettmers et al. 2022 (arXiv 2110.02861): seven decades, each with twice as many fractions as the
    one below, and zero and one. As in bitsandbytes, the bits come from this machine's
    `torch.linspace`: they differ in the last place between processors, so a map is stored with the
    tensor that it quantised.

    Args:
        signed (`bool`, *optional*, defaults to `True`): Values of both signs; otherwise no negative
            values, and twice as many fractions per decade.
    """
    # The caller may have set another default dtype or device.
    dtype, device = torch.float32, "cpu"
    values = [torch.tensor([0.0, 1.0], dtype=dtype, device=device)]
    for decade in range(7):
        steps = 2 ** (decade + (not signed)) + 1
        edges = torch.linspace(0.1, 1, steps, dtype=dtype, device=device)
        middles = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


@torch.library.custom_op("oddsmith::quantize_nf4", mutates_args=())
def _quantize_nf4(tensor: Tensor, blocksize: int) -> tuple[Tensor, Tensor]:
    return _core.quantize_nf4(tensor, blocksize)


@_quantize_nf4.register_fake
def _(tensor, blocksize):
    count = tensor.numel()
    packed = tensor.new_empty(((count + 1) // 2, 1), dtype=torch.uint8)
    absmax = tensor.new_empty((count + blocksize - 1) // blocksize, dtype=torch.float32)
    return packed, absmax


@torch.library.custom_op("oddsmith::dequantize_nf4", mutates_args=())
def _dequantize_nf4(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    nested_blocksize: int,
    blocksize: int,
    shape: list[int],
    dtype: torch.dtype,
) -> Tensor:
    scales = absmax, nested_absmax, nested_code, offset, nested_blocksize
    weight = packed_weight(packed, *scales, blocksize)
    return _core.dequantize_nf4(weight, shape, dtype_name(dtype))


@_dequantize_nf4.register_fake
def _(
    packed, absmax, nested_absmax, nested_code, offset, nested_blocksize, blocksize, shape, dtype
):
    return packed.new_empty(shape, dtype=dtype)


def scale_arguments(
    state: QuantState,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, int]:
    """`absmax` and the tensors of its double quantisation, as arguments of the custom operators."""
    if state.state2 is None:
        return state.absmax, None, None, None, 0
    nested = nested_layout(state)
    return state.absmax, nested.absmax, nested.code, nested.offset, nested.blocksize


def packed_bytes(packed: Tensor) -> Tensor:
    """The codes as bytes: checkpoints may store them under another dtype of the same bytes."""
    return packed if packed.dtype == torch.uint8 else packed.contiguous().view(torch.uint8)


def quantize_nf4(
    tensor: Tensor, blocksize: int = 64, double_quant: bool = False
) -> tuple[Tensor, QuantState]:
    """Quantises a tensor to NF4 (Dettmers et al. 2023, arXiv 2305.14314).

    For sizes that are multiples of the block size, equivalent to:

    ```python
    blocks = tensor.float().reshape(-1, blocksize)
    absmax = blocks.abs().amax(1)
    codes = (blocks / absmax[:, None])[..., None].sub(code).abs().argmin(-1).flatten()
    packed = codes[0::2] << 4 | codes[1::2]
    ```

    Bit-identical to bitsandbytes 0.50 on a CPU, except for the codes of scales with `double_quant`:
    bitsandbytes uses a table without zero; here they are the nearest. As in bitsandbytes, a NaN
    makes all of its block NaN, and an infinity makes its block NaN and infinite. With
    `double_quant` either would make the mean of the scales, and so every value, NaN: such a tensor
    is refused.

    Args:
        tensor (`Tensor`): Any shape, `float32`, `bfloat16` or `float16`.
        blocksize (`int`, *optional*, defaults to 64): Values that share a scale: 32, 64, 128, 256,
            512, 1024, 2048 or 4096, counted along the flat tensor. The last block may be partial.
        double_quant (`bool`, *optional*, defaults to `False`): Quantise the scales to 8 bits, in
            blocks of 256, which saves almost half a bit per value.

    Returns:
        `(Tensor, QuantState)`: The codes, `((n + 1) // 2, 1)` `uint8`, the first of two in the high
        half; and their state.

    Raises:
        ValueError: For another block size; with `double_quant` for NaN and infinite values.
        TypeError: For another dtype.
    """
    packed, absmax = _quantize_nf4(tensor.detach(), blocksize)
    state = QuantState(
        absmax=absmax,
        shape=tensor.shape,
        code=nf4_code(tensor.device).clone(),
        blocksize=blocksize,
        quant_type="nf4",
        dtype=tensor.dtype,
    )
    if double_quant:
        # libtorch's mean: the order of its additions decides the last bits.
        state.offset = absmax.mean()
        if absmax.numel() and not state.offset.isfinite():
            raise ValueError(f"quantize_nf4: {_why_not_finite(absmax, blocksize, tensor.numel())}")
        code = dynamic_map().to(tensor.device)
        codes, largest = _core.quantize_blockwise(absmax - state.offset, code, NESTED_BLOCKSIZE)
        state.absmax = codes
        state.state2 = QuantState(
            absmax=largest, code=code, blocksize=NESTED_BLOCKSIZE, dtype=torch.float32
        )
    return packed, state


def _why_not_finite(absmax: Tensor, blocksize: int, count: int) -> str:
    bad = absmax.isfinite().logical_not().nonzero().flatten()
    if not len(bad):
        return f"the mean of the scales is {absmax.mean().item()}; must be finite for double_quant"
    first = int(bad[0]) * blocksize
    return (
        f"tensor has NaN or infinite values in {len(bad)} of {len(absmax)} blocks of {blocksize}, "
        f"the first at {first}..{min(first + blocksize, count)} of the flat tensor; "
        "must be finite for double_quant"
    )


def dequantize_nf4(packed: Tensor, state: QuantState, dtype: torch.dtype | None = None) -> Tensor:
    """Dequantises a tensor of [`quantize_nf4`] or bitsandbytes.

    For sizes that are multiples of the block size, equivalent to:

    ```python
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten().int()
    values = (state.code[codes].view(-1, state.blocksize) * state.absmax[:, None]).to(dtype)
    ```

    Args:
        packed (`Tensor`): The codes, two per byte, `uint8` or another dtype of the same bytes.
        state ([`QuantState`]): Their state, as returned by `quantize_nf4`.
        dtype (`torch.dtype`, *optional*): `float32`, `bfloat16` or `float16`; that of the tensor that
            was quantised if not given. Values are rounded to it once.

    Returns:
        `Tensor`: `state.shape`, `dtype`.

    Raises:
        ValueError: If codes and state do not fit each other; the message names the part.
        TypeError: For a dtype that does not fit.
    """
    if state.quant_type != "nf4":
        raise ValueError(f'dequantize_nf4: quant_type is {state.quant_type!r}; must be "nf4"')
    if packed.device != state.absmax.device:
        raise ValueError(
            f"dequantize_nf4: packed is on {packed.device}; must be on the device of absmax, "
            f"{state.absmax.device}"
        )
    shape, blocksize, stored = layout(state)
    scales = scale_arguments(state)
    return _dequantize_nf4(packed_bytes(packed), *scales, blocksize, list(shape), dtype or stored)
