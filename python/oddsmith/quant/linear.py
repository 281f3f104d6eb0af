"""The product with a 4-bit matrix as a differentiable function."""

from __future__ import annotations

from contextlib import AbstractContextManager

import torch
from torch import Tensor

from .. import _core
from ..bf16_products import bf16_products
from .arguments import packed_weight
from .nf4 import packed_bytes, scale_arguments
from .state import QuantState, dtype_name, layout

__all__ = ["linear_nf4", "linear_nf4_lora"]


@torch.library.custom_op("oddsmith::linear_nf4", mutates_args=())
def _linear_nf4(
    x: Tensor,
    bias: Tensor | None,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    nested_blocksize: int,
    blocksize: int,
    out_features: int,
    in_features: int,
) -> Tensor:
    scales = absmax, nested_absmax, nested_code, offset, nested_blocksize
    weight = packed_weight(packed, *scales, blocksize)
    return _core.linear_nf4(x, weight, (out_features, in_features), bias)


@_linear_nf4.register_fake
def _(x, bias, packed, *scales_and_sizes):
    out_features = scales_and_sizes[-2]
    return x.new_empty((*x.shape[:-1], out_features))


@torch.library.custom_op("oddsmith::linear_nf4_input_gradient", mutates_args=())
def _linear_nf4_input_gradient(
    grad: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_code: Tensor | None,
    offset: Tensor | None,
    nested_blocksize: int,
    blocksize: int,
    out_features: int,
    in_features: int,
    weight_dtype: torch.dtype,
) -> Tensor:
    scales = absmax, nested_absmax, nested_code, offset, nested_blocksize
    weight = packed_weight(packed, *scales, blocksize)
    shape = out_features, in_features
    return _core.linear_nf4_input_gradient(grad, weight, shape, dtype_name(weight_dtype))


@_linear_nf4_input_gradient.register_fake
def _(grad, packed, *scales_and_sizes):
    in_features = scales_and_sizes[-2]
    return grad.new_empty((*grad.shape[:-1], in_features))


class _LinearNF4(torch.autograd.Function):
    """Saves only the codes and their scales, which exist anyway."""

    @staticmethod
    def forward(ctx, x, bias, packed, absmax, nested_absmax, nested_code, offset, *rest):
        *sizes, weight_dtype = rest
        weight = packed, absmax, nested_absmax, nested_code, offset
        ctx.save_for_backward(*weight)
        ctx.sizes, ctx.weight_dtype = sizes, weight_dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return _linear_nf4(x, bias, *weight, *sizes)

    @staticmethod
    @torch.autograd.function.once_differentiable  # whose type has no names of parameters
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        d_x = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = _linear_nf4_input_gradient(grad, *ctx.saved_tensors, *ctx.sizes, ctx.weight_dtype)
        if ctx.needs_input_grad[1]:
            rows = grad.reshape(-1, grad.shape[-1])
            d_bias = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return (d_x, d_bias, *[None] * 10)


def linear_nf4(x: Tensor, packed: Tensor, state: QuantState, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias` with an NF4 weight, differentiable in `x` and `bias`.

    Equivalent to this code, which makes a full copy of the weight in forward and in backward:

    ```python
    F.linear(x, dequantize_nf4(packed, state, x.dtype), bias)
    ```

    On the CPU the weight is dequantised tile by tile, and a few tokens are multiplied directly with
    its codes, in `float32` for any dtype of `x`. On CUDA up to eight tokens are multiplied directly
    with the codes; for more the weight is dequantised to memory that the next layer reuses, and
    multiplied by the library. The gradient of `x` uses the weight as rounded to `state.dtype`, then
    to `x.dtype`, as bitsandbytes does.

    Args:
        x (`Tensor`): `(.., in_features)`, `float32`, `bfloat16` or `float16`.
        packed (`Tensor`): Codes of the weight.
        state ([`QuantState`]): State of the weight, whose `shape` is `(out_features, in_features)`.
        bias (`Tensor`, *optional*): `(out_features,)`.

    Returns:
        `Tensor`: `(.., out_features)`, dtype of `x`.

    Raises:
        ValueError: For a shape or device that does not fit; the message names the argument.
        TypeError: For a dtype that does not fit.
    """
    shape, blocksize, dtype = _check_weight(x, packed, state, bias)
    codes = packed_bytes(packed.detach())
    weight = *scale_arguments(state), blocksize, *shape
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return _LinearNF4.apply(x, bias, codes, *weight, dtype)
    return _linear_nf4(x, bias, codes, *weight)


def _check_weight(
    x: Tensor, packed: Tensor, state: QuantState, bias: Tensor | None
) -> tuple[tuple[int, int], int, torch.dtype]:
    """Shape, block size and dtype of the weight."""
    if state.quant_type != "nf4":
        raise ValueError(f'linear_nf4: quant_type is {state.quant_type!r}; must be "nf4"')
    shape, blocksize, dtype = layout(state)
    if len(shape) != 2:
        raise ValueError(f"linear_nf4: the weight has shape {tuple(shape)}; must be a matrix")
    for name, tensor in (("packed", packed), ("absmax", state.absmax), ("bias", bias)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(
                f"linear_nf4: {name} is on {tensor.device}; must be on the device of x, {x.device}"
            )
    return (shape[0], shape[1]), blocksize, dtype


class _LinearNF4Lora(torch.autograd.Function):
    """Saves the input, its low-rank product, the codes and their scales."""

    @staticmethod
    def forward(ctx, x, lora_a, lora_b, scaling, bias, packed, *weight):
        *weight, weight_dtype = weight
        out = _linear_nf4(x, bias, packed, *weight)
        rows = x.reshape(-1, x.shape[-1])
        with _products_of(x):
            low = rows.to(lora_a.dtype) @ lora_a.T
            _add_product(out.view(-1, out.shape[-1]), low, lora_b.T, scaling)
        tensors, ctx.sizes = weight[:4], weight[4:]
        ctx.save_for_backward(x, low, lora_a, lora_b, packed, *tensors)
        ctx.scaling, ctx.weight_dtype = scaling, weight_dtype
        ctx.bias_dtype = None if bias is None else bias.dtype
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable  # whose type has no names of parameters
    def backward(ctx, *grads):  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = grads
        x, low, lora_a, lora_b, packed, *tensors = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        given = rows.to(lora_b.dtype)
        d_x = d_a = d_b = d_bias = None
        with _products_of(x):
            d_low = (given @ lora_b).mul_(ctx.scaling)
            if ctx.needs_input_grad[0]:
                weight = packed, *tensors, *ctx.sizes, ctx.weight_dtype
                d_x = _linear_nf4_input_gradient(grad, *weight)
                _add_product(d_x.view(-1, d_x.shape[-1]), d_low, lora_a, 1.0)
            if ctx.needs_input_grad[1]:
                d_a = d_low.T @ x.reshape(-1, x.shape[-1]).to(lora_a.dtype)
            if ctx.needs_input_grad[2]:
                d_b = (given.T @ low).mul_(ctx.scaling)
        if ctx.needs_input_grad[4]:
            d_bias = rows.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
        return (d_x, d_a, d_b, None, d_bias, *[None] * 10)


def _products_of(x: Tensor) -> AbstractContextManager[None]:
    """The context of products with an adapter: as autocast, which casts its matrices too."""
    return bf16_products(x.dtype == torch.bfloat16 and x.device.type == "cpu")


def _add_product(to: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """`to += factor * left @ right`, rounded once if dtypes differ."""
    if to.dtype == left.dtype:
        to.addmm_(left, right, alpha=factor)
    else:
        to.copy_(torch.addmm(to.to(left.dtype), left, right, alpha=factor))


def linear_nf4_lora(
    x: Tensor,
    packed: Tensor,
    state: QuantState,
    lora_a: Tensor,
    lora_b: Tensor,
    scaling: float,
    bias: Tensor | None = None,
) -> Tensor:
    """The product with an NF4 weight and a low-rank addition to it (Hu et al. 2021, eq. 3).

    Equivalent to this code, with fewer copies of the output and of the gradient:

    ```python
    linear_nf4(x, packed, state, bias) + scaling * (x @ lora_a.T @ lora_b.T)
    ```

    Args:
        x (`Tensor`): `(.., in_features)`, `float32`, `bfloat16` or `float16`.
        packed (`Tensor`): Codes of the weight.
        state ([`QuantState`]): State of the weight.
        lora_a (`Tensor`): `(rank, in_features)`; its dtype is used for the low-rank products.
        lora_b (`Tensor`): `(out_features, rank)`, dtype of `lora_a`.
        scaling (`float`): Factor of the addition: alpha over the rank, in LoRA.
        bias (`Tensor`, *optional*): `(out_features,)`.

    Returns:
        `Tensor`: `(.., out_features)`, dtype of `x`.

    Raises:
        ValueError: For shapes or devices that do not fit.
        TypeError: For dtypes that do not fit.
    """
    adapter = (lora_b.shape[0], lora_a.shape[1])
    shape, blocksize, dtype = _check_weight(x, packed, state, bias)
    if lora_a.dim() != 2 or lora_b.dim() != 2 or lora_a.shape[0] != lora_b.shape[1]:
        raise ValueError(
            f"linear_nf4_lora: lora_a has shape {tuple(lora_a.shape)} and lora_b {tuple(lora_b.shape)}; "
            "must be (rank, in_features) and (out_features, rank)"
        )
    if adapter != shape:
        raise ValueError(
            f"linear_nf4_lora: the adapter makes a weight of {adapter}; must be {shape}"
        )
    if lora_a.dtype != lora_b.dtype:
        raise TypeError(
            f"linear_nf4_lora: lora_b has dtype {lora_b.dtype}; must be that of lora_a, {lora_a.dtype}"
        )
    codes = packed_bytes(packed.detach())
    weight = *scale_arguments(state), blocksize, *shape, dtype
    return _LinearNF4Lora.apply(x, lora_a, lora_b, scaling, bias, codes, *weight)
