"""Modules with 4-bit weights."""

from __future__ import annotations

import copy
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch._C._nn as torch_nn
from torch import Tensor, nn

from .linear import linear_nf4
from .nf4 import quantize_nf4
from .sharded import (
    dtype_after,
    entries_are_saved,
    entry,
    give_state,
    is_part,
    keep_state,
    load_part,
    why_no_state,
)
from .state import PACKED_KEY, QuantState, dtype_name, layout, nested_layout

__all__ = ["Linear4bit", "Params4bit"]


# Dtypes that the bytes of codes can be stored as.
_STORAGE = (torch.uint8, torch.int8, torch.float16, torch.bfloat16, torch.float32, torch.float64)


def _check_options(quant_type: str, quant_storage: torch.dtype) -> None:
    if quant_type != "nf4":
        raise ValueError(f'Params4bit: quant_type is {quant_type!r}; must be "nf4"')
    if quant_storage not in _STORAGE:
        allowed = ", ".join(dtype_name(dtype) for dtype in _STORAGE)
        raise ValueError(f"Params4bit: quant_storage is {quant_storage}; must be one of {allowed}")


def _entry(weight: Params4bit, name: str) -> Tensor:
    return entry(weight.quant_state, name)


class Params4bit(nn.Parameter):
    """A parameter that is quantised when it is moved to a device, as in bitsandbytes.

    transformers, accelerate and FSDP recognise 4-bit weights by this class name.

    Args:
        data (`Tensor`, *optional*): A weight of any float dtype, or its codes if there is a
            `quant_state`.
        requires_grad (`bool`, *optional*, defaults to `False`): Codes have no gradient; a weight
            that is not quantised yet can have one.
        quant_state ([`QuantState`], *optional*): State of the codes.
        blocksize (`int`, *optional*, defaults to 64): Values that share a scale.
        compress_statistics (`bool`, *optional*, defaults to `True`): Quantise the scales too.
        quant_type (`str`, *optional*, defaults to `"nf4"`): The only supported type.
        quant_storage (`torch.dtype`, *optional*, defaults to `torch.uint8`): Dtype in which the
            bytes of the codes are stored.
        bnb_quantized (`bool`, *optional*): Set by bitsandbytes for weights with a state; ignored.
        module (`nn.Module`, *optional*): For compatibility with bitsandbytes; ignored.
    """

    quant_state: QuantState | None
    blocksize: int
    compress_statistics: bool
    quant_type: str
    quant_storage: torch.dtype

    if TYPE_CHECKING:
        # torch's stubs describe the constructor of a parameter as an `__init__` of two arguments.
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __new__(
        cls,
        data: Tensor | None = None,
        requires_grad: bool = False,
        quant_state: QuantState | None = None,
        blocksize: int | None = None,
        compress_statistics: bool = True,
        quant_type: str = "nf4",
        quant_storage: torch.dtype = torch.uint8,
        bnb_quantized: bool = False,
        module: nn.Module | None = None,
        **kwargs: Any,
    ) -> Params4bit:
        _check_options(quant_type, quant_storage)
        self = torch.Tensor._make_subclass(
            cls, torch.empty(0) if data is None else data, requires_grad
        )
        self.quant_state = quant_state
        self.blocksize = 64 if blocksize is None else blocksize
        self.compress_statistics = compress_statistics
        self.quant_type = quant_type
        self.quant_storage = quant_storage
        return self

    @property
    def bnb_quantized(self) -> bool:
        """True if the data are codes."""
        return self.quant_state is not None

    # torch's distributed checkpoints look up each entry of a state dict.
    absmax = property(partial(_entry, name="absmax"))
    quant_map = property(partial(_entry, name="quant_map"))
    nested_absmax = property(partial(_entry, name="nested_absmax"))
    nested_quant_map = property(partial(_entry, name="nested_quant_map"))

    @classmethod
    def from_prequantized(
        cls,
        data: Tensor,
        quantized_stats: dict[str, Any],
        requires_grad: bool = False,
        device: torch.device | str | None = None,
        **kwargs: Any,
    ) -> Params4bit:
        """Create a weight from the entries of a checkpoint.

        Args:
            data (`Tensor`): The codes.
            quantized_stats (`dict`): The other entries of the weight, under any prefix.
            requires_grad (`bool`, *optional*, defaults to `False`): Passed on.
            device (`torch.device`, *optional*): Device of the weight; not moved if not given.
            kwargs: Arguments of other releases; ignored.

        Raises:
            ValueError: If codes and state do not fit each other.
        """
        state = QuantState.from_dict(quantized_stats, device)
        _check_size(data, state)
        return cls(
            data if device is None else data.to(device),
            requires_grad,
            state,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_storage=data.dtype,
        )

    def _settings(self) -> dict[str, Any]:
        names = ("blocksize", "compress_statistics", "quant_type", "quant_storage")
        return {name: getattr(self, name) for name in names}

    def with_data(self, data: Tensor, state: QuantState | None) -> Params4bit:
        """A parameter like this one with other data: codes if there is a `state`."""
        return type(self)(data, self.requires_grad, state, **self._settings())

    def quantize_(self, device: torch.device | str | None = None) -> Params4bit:
        """Quantises the weight on `device`, in place."""
        if self.quant_state is not None:
            return self
        data = self.data if device is None else self.data.to(device)
        packed, state = quantize_nf4(data, self.blocksize, self.compress_statistics)
        packed = _stored(packed, self.quant_storage)
        self.requires_grad = False
        self.data = packed
        self.quant_state = state
        return self

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """As `Tensor.to`: a weight that is moved to a device is quantised there, and the dtype of
        codes does not change.
        """
        device, dtype, non_blocking, _ = torch_nn._parse_to(*args, **kwargs)
        if self.quant_state is None:
            if device is not None and device.type != "meta":
                return self.quantize_(device)
            return self.with_data(self.data.to(device, dtype, non_blocking=non_blocking), None)
        if device is None:
            return self
        moved = self.data.to(device, non_blocking=non_blocking)
        return self.with_data(moved, self.quant_state.to(device))

    def cpu(self, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
        return self.to(device="cpu")

    def cuda(
        self,
        device: torch.device | int | str | None = None,
        non_blocking: bool = False,
        memory_format: torch.memory_format = torch.preserve_format,
    ) -> Tensor:
        return self.to(device="cuda" if device is None else device, non_blocking=non_blocking)

    def __deepcopy__(self, memo: dict[int, Any]) -> Params4bit:
        if id(self) not in memo:
            state = copy.deepcopy(self.quant_state, memo)
            memo[id(self)] = self.with_data(self.data.clone(), state)
        return memo[id(self)]

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        state = self.quant_state
        return _rebuild, (type(self), self.data, self.requires_grad, state, self._settings())


def _rebuild(
    cls: type[Params4bit],
    data: Tensor,
    requires_grad: bool,
    state: QuantState | None,
    settings: dict[str, Any],
) -> Params4bit:
    return cls(data, requires_grad, state, **settings)


def _stored(packed: Tensor, dtype: torch.dtype) -> Tensor:
    """Views the bytes as another dtype."""
    if dtype == torch.uint8:
        return packed
    if packed.numel() % dtype.itemsize:
        raise ValueError(
            f"Params4bit: the weight has {packed.numel()} bytes of codes; "
            f"quant_storage {dtype_name(dtype)} needs a multiple of {dtype.itemsize}"
        )
    return packed.flatten().view(dtype).unsqueeze(1)


def _check_size(data: Tensor, state: QuantState) -> None:
    shape, blocksize, _ = layout(state)
    codes = data.numel() * data.element_size()
    wanted = (shape.numel() + 1) // 2
    if codes != wanted:
        raise ValueError(
            f"quant_state: shape is {tuple(shape)}, {wanted} bytes of codes; the weight has {codes}"
        )
    scales = [("absmax", state.absmax, -(-shape.numel() // blocksize))]
    if state.state2 is not None:
        nested = nested_layout(state)
        groups = -(-state.absmax.numel() // nested.blocksize)
        scales.append(("nested_absmax", nested.absmax, groups))
    for name, tensor, blocks in scales:
        if tensor.numel() != blocks:
            raise ValueError(
                f"quant_state: {name} has {tensor.numel()} elements; must be {blocks}, one per block"
            )


class Linear4bit(nn.Linear):
    """A linear layer with a frozen NF4 weight.

    The weight is quantised when it is moved to a device:

    ```python
    layer = Linear4bit(64, 32)
    layer.load_state_dict(torch.nn.Linear(64, 32).state_dict())
    layer = layer.to("cpu")  # or "cuda"
    ```

    `state_dict` has the entries of bitsandbytes, and `load_state_dict` reads them, or a weight in
    full precision, which is quantised if the layer's weight is.

    Args:
        input_features (`int`): Size of the last dimension of the input.
        output_features (`int`): Size of the last dimension of the output.
        bias (`bool`, *optional*, defaults to `True`): Add a bias, which is trained.
        compute_dtype (`torch.dtype`, *optional*): Dtype that the input is cast to; that of the
            input if not given. The output has the dtype of the input.
        compress_statistics (`bool`, *optional*, defaults to `True`): Quantise the scales too.
        quant_type (`str`, *optional*, defaults to `"nf4"`): The only supported type.
        quant_storage (`torch.dtype`, *optional*, defaults to `torch.uint8`): Dtype in which the
            bytes of the codes are stored.
        device (`torch.device`, *optional*): Where the weight in full precision is made.
        blocksize (`int`, *optional*, defaults to 64): Values that share a scale.

    Raises:
        ValueError: For another type of quantisation.
    """

    weight: Params4bit

    def __init__(
        self,
        input_features: int,
        output_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        compress_statistics: bool = True,
        quant_type: str = "nf4",
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
        blocksize: int = 64,
    ) -> None:
        _check_options(quant_type, quant_storage)
        super().__init__(input_features, output_features, bias, device)
        self.weight = Params4bit(
            self.weight.data,
            blocksize=blocksize,
            compress_statistics=compress_statistics,
            quant_type=quant_type,
            quant_storage=quant_storage,
        )
        self.compute_dtype = compute_dtype

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> Linear4bit:
        """Create a layer with the quantised weight and the bias of `linear`, on its device.

        Args:
            linear (`nn.Linear`): The layer; not changed.
            options: Arguments of the constructor from `compute_dtype` on.
        """
        size = linear.in_features, linear.out_features
        layer = cls(*size, bias=linear.bias is not None, device="meta", **options)
        layer.weight = layer.weight.with_data(linear.weight.data, None).quantize_()
        layer.bias = linear.bias
        return layer.train(linear.training)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight" and isinstance(value, Tensor) and not isinstance(value, Params4bit):
            keep_state(value, self._parameters.get(name))
        super().__setattr__(name, value)

    @property
    def quant_state(self) -> QuantState | None:
        """State of the weight, `None` before it is quantised."""
        return getattr(self.weight, "quant_state", None)

    def forward(self, input: Tensor) -> Tensor:
        state = self.quant_state
        if state is None:
            raise RuntimeError(f"Linear4bit: the weight {why_no_state(self.weight)}")
        dtype = self.compute_dtype or input.dtype
        return linear_nf4(input.to(dtype), self.weight, state, self.bias).to(input.dtype)

    def _replace_weight(self, data: Tensor, state: QuantState | None, **settings: Any) -> None:
        """In place if possible, because optimizers and hooks refer to the parameter."""
        weight = self.weight
        # What `nn.Module._apply` asks too; torch does not export it.
        if torch._has_compatible_shallow_copy_type(weight, data):  # pyright: ignore[reportPrivateImportUsage]
            weight.data, weight.quant_state = data, state
            vars(weight).update(settings)
        else:  # from meta to a device, or back
            settings = {**weight._settings(), **settings}
            # Narrower than in the base class, whose weight is any tensor.
            self.weight = Params4bit(  # pyright: ignore[reportIncompatibleVariableOverride]
                data, weight.requires_grad, state, **settings
            )

    def _apply(self, fn: Any, recurse: bool = True) -> Linear4bit:
        weight = self.weight
        if is_part(weight):
            state = self.quant_state
            if dtype_after(fn, weight) == weight.dtype:
                super()._apply(fn, recurse)  # which may make another parameter
                if state is not None:
                    give_state(self.weight, state)
                return self
        elif weight.quant_state is None:
            applied = fn(weight)  # if this quantises, it returns the weight itself
            if applied is not weight:
                self._replace_weight(applied.data, getattr(applied, "quant_state", None))
        else:
            # As bytes, which a change of dtype does not convert.
            moved = fn(weight.data.view(torch.uint8))
            state = weight.quant_state.to(moved.device)
            self._replace_weight(moved.view(weight.dtype), state)
        # Only the bias is left.
        parameters = self._parameters
        self._parameters = {name: p for name, p in parameters.items() if name != "weight"}
        try:
            super()._apply(fn, recurse)
        finally:
            rest, self._parameters = self._parameters, parameters
            self._parameters.update(rest)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if (state := self.quant_state) is not None and entries_are_saved():
            for name, value in state.as_dict(packed=True).items():
                destination[f"{prefix}weight.{name}"] = value

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        name = f"{prefix}weight"
        parts = {key: value for key, value in state_dict.items() if key.startswith(f"{name}.")}
        rest = {key: value for key, value in state_dict.items() if key not in parts}
        data = rest.pop(name, None)
        arguments = (prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(rest, *arguments)
        if data is None:
            unexpected_keys.extend(parts)
            return
        if name in missing_keys:
            missing_keys.remove(name)
        if not parts and self._are_codes(data):
            missing_keys.append(f"{name}.{PACKED_KEY}")
        try:
            self._load_weight(data, parts)
        except (ValueError, TypeError) as error:
            error_msgs.append(f"{name}: {error}")

    def _are_codes(self, data: Tensor) -> bool:
        weight = self.weight
        codes = data.shape == weight.shape and data.dtype == weight.dtype
        return self.quant_state is not None and codes and data.shape != self._full_shape

    @property
    def _full_shape(self) -> torch.Size:
        return torch.Size([self.out_features, self.in_features])

    def _load_weight(self, data: Tensor, parts: dict[str, Any]) -> None:
        weight, shape = self.weight, self._full_shape
        if is_part(weight):
            load_part(weight, data, parts, shape)
            return
        if not parts and self._are_codes(data):
            # torch fills the rest of a part of a state dict with the model's own parameters.
            self._replace_weight(data.detach().clone(), weight.quant_state)
            return
        device = None if weight.device.type == "meta" else weight.device
        if not parts:
            if data.shape != shape:
                raise ValueError(f"has shape {tuple(data.shape)}; must be {tuple(shape)}")
            data = data.detach()
            if weight.quant_state is not None:
                fresh = weight.with_data(data, None).quantize_(device)
                self._replace_weight(fresh.data, fresh.quant_state)
            elif device is None:
                self._replace_weight(data.clone(), None)
            else:  # to the layer's dtype and device, as torch's layers do
                self._replace_weight(data.to(weight.data, copy=True), None)
            return
        if not any(key.endswith(PACKED_KEY) for key in parts):
            kinds = [key for key in parts if "bitsandbytes__" in key] or ["none"]
            raise ValueError(f"quant_state: found {', '.join(kinds)}; must be {PACKED_KEY}")
        loaded = Params4bit.from_prequantized(data.detach().clone(), parts, device=device)
        state = loaded.quant_state
        if state is not None and state.shape != shape:
            found = tuple(layout(state)[0])
            raise ValueError(f"quant_state: shape is {found}; must be {tuple(shape)}")
        self._replace_weight(loaded.data, state, **loaded._settings())
