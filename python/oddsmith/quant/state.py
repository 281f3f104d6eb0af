"""The state of a quantised tensor, and its entries in a checkpoint."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _core
from .block_sizes import BLOCK_SIZES

__all__ = ["PACKED_KEY", "QuantState", "dtype_name", "layout", "nested_layout", "nf4_code"]

# The state dict key of the parts that are not tensors, as JSON.
PACKED_KEY = "quant_state.bitsandbytes__nf4"

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")


def _named_dtype(argument: str, name: object) -> torch.dtype:
    if not isinstance(name, str) or name not in _DTYPES:
        raise ValueError(f"quant_state: {argument} is {name!r}; must be one of {sorted(_DTYPES)}")
    return _DTYPES[name]


@functools.cache
def nf4_code(device: torch.device) -> Tensor:
    """The 16 values of NF4, `float32`."""
    return _core.nf4_code().to(device)


class QuantState:
    """All parts of a quantised tensor except its codes, named as in bitsandbytes.

    Args:
        absmax (`Tensor`): The scale of each block, `float32`; with double quantisation its 8-bit
            codes, `uint8`.
        shape (`torch.Size`, *optional*): Shape of the tensor.
        code (`Tensor`, *optional*): Values of the codes, `(16,)` `float32`.
        blocksize (`int`, *optional*): Values in a block of the flat tensor.
        quant_type (`str`, *optional*): `"nf4"`.
        dtype (`torch.dtype`, *optional*): Dtype of the tensor.
        offset (`Tensor`, *optional*): Mean of the scales, 0-dim, with double quantisation.
        state2 (`QuantState`, *optional*): State of the quantised scales: its `absmax`, `code`,
            `blocksize` and `dtype`.
    """

    def __init__(
        self,
        absmax: Tensor,
        shape: torch.Size | None = None,
        code: Tensor | None = None,
        blocksize: int | None = None,
        quant_type: str | None = None,
        dtype: torch.dtype | None = None,
        offset: Tensor | None = None,
        state2: QuantState | None = None,
    ) -> None:
        self.absmax = absmax
        self.shape = shape
        self.code = code
        self.blocksize = blocksize
        self.quant_type = quant_type
        self.dtype = dtype
        self.offset = offset
        self.state2 = state2

    @property
    def nested(self) -> bool:
        """True with double quantisation."""
        return self.state2 is not None

    @property
    def bitsandbytes__nf4(self) -> Tensor:
        """The entry of this name: the parts that are not tensors, as bytes."""
        return self.as_dict(packed=True)[PACKED_KEY]

    def __repr__(self) -> str:
        return (
            f"QuantState(shape={self.shape}, dtype={self.dtype}, blocksize={self.blocksize}, "
            f"quant_type={self.quant_type!r}, nested={self.nested})"
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, QuantState):
            return NotImplemented
        plain = ("shape", "blocksize", "quant_type", "dtype", "state2")
        tensors = ("absmax", "code", "offset")
        pairs = [(getattr(self, name), getattr(other, name)) for name in tensors]
        return all(getattr(self, name) == getattr(other, name) for name in plain) and all(
            (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))
            for a, b in pairs
        )

    def to(self, device: torch.device | str) -> QuantState:
        """The state with its tensors on `device`; `self` if they are already there."""

        def moved(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device)

        device = torch.empty(0, device=device).device  # with its index
        if self.absmax.device == device and (
            self.state2 is None or self.state2.to(device) is self.state2
        ):
            return self
        return QuantState(
            absmax=self.absmax.to(device),
            shape=self.shape,
            code=moved(self.code),
            blocksize=self.blocksize,
            quant_type=self.quant_type,
            dtype=self.dtype,
            offset=moved(self.offset),
            state2=None if self.state2 is None else self.state2.to(device),
        )

    def as_dict(self, packed: bool = False) -> dict[str, Any]:
        """The parts by their names in a checkpoint.

        Args:
            packed (`bool`, *optional*, defaults to `False`): Return only tensors: the other parts
                become the bytes of a JSON object, `quant_state.bitsandbytes__nf4`. With the
                weight's name as prefix these are the entries of a state dict.
        """
        shape, blocksize, dtype = layout(self)
        tensors = {"absmax": self.absmax, "quant_map": self.code}
        rest: dict[str, Any] = {
            "quant_type": self.quant_type,
            "blocksize": blocksize,
            "dtype": dtype_name(dtype),
            "shape": tuple(shape),
        }
        if self.state2 is not None:
            nested = nested_layout(self)
            tensors["nested_absmax"] = nested.absmax
            # Weights share the map, which safetensors files do not allow.
            tensors["nested_quant_map"] = nested.code.clone()
            rest["nested_blocksize"] = nested.blocksize
            rest["nested_dtype"] = dtype_name(self.state2.dtype or torch.float32)
            rest["nested_offset"] = nested.offset.item()
        if not packed:
            return {**rest, **tensors}
        text = json.dumps(rest).encode()
        return {**tensors, PACKED_KEY: torch.frombuffer(bytearray(text), dtype=torch.uint8)}

    @classmethod
    def from_dict(
        cls, qs_dict: Mapping[str, Any], device: torch.device | str | None = None
    ) -> QuantState:
        """Read the parts from [`QuantState.as_dict`] or bitsandbytes.

        Args:
            qs_dict (`dict`): The parts, packed or not, under any prefix.
            device (`torch.device`, *optional*): Device of the tensors; not moved if not given.

        Raises:
            ValueError: If a part is missing, unknown or out of range; the message names it.
        """
        parts: dict[str, Any] = {}
        for key, value in qs_dict.items():
            name = key.rsplit(".", 1)[-1]
            if name.startswith("bitsandbytes__"):
                parts |= _unpack_json(name, value)
            else:
                parts[name] = value
        _check_parts(parts)
        nested = "nested_absmax" in parts

        def tensor(name: str) -> Tensor:
            value = parts[name]
            return value if device is None else value.to(device)

        absmax = tensor("absmax")
        state2 = offset = None
        if nested:
            offset = torch.tensor(float(parts["nested_offset"]), device=absmax.device)
            state2 = cls(
                absmax=tensor("nested_absmax"),
                code=tensor("nested_quant_map"),
                blocksize=parts["nested_blocksize"],
                dtype=_named_dtype("nested_dtype", parts["nested_dtype"]),
            )
        return cls(
            absmax=absmax,
            shape=torch.Size(parts["shape"]),
            code=tensor("quant_map"),
            blocksize=parts["blocksize"],
            quant_type="nf4",
            dtype=_named_dtype("dtype", parts["dtype"]),
            offset=offset,
            state2=state2,
        )


def layout(state: QuantState) -> tuple[torch.Size, int, torch.dtype]:
    """Shape, block size and dtype of the tensor of the codes.

    Raises:
        ValueError: If the state has none, as a state of quantised scales.
    """
    if state.shape is None or state.blocksize is None or state.dtype is None:
        missing = [name for name in ("shape", "blocksize", "dtype") if getattr(state, name) is None]
        raise ValueError(f"quant_state: {', '.join(missing)} missing")
    return state.shape, state.blocksize, state.dtype


class NestedLayout(NamedTuple):
    """What scales are read with that are quantised themselves."""

    absmax: Tensor
    code: Tensor
    offset: Tensor
    blocksize: int


def nested_layout(state: QuantState) -> NestedLayout:
    """The parts of double quantisation.

    Raises:
        ValueError: If the state lacks one.
    """
    nested = state.state2
    if nested is None or nested.code is None or nested.blocksize is None or state.offset is None:
        raise ValueError("quant_state: state2, its code and blocksize, or offset missing")
    return NestedLayout(nested.absmax, nested.code, state.offset, nested.blocksize)


def _unpack_json(name: str, value: object) -> dict[str, Any]:
    """The JSON object in a tensor of bytes."""
    kind = name.removeprefix("bitsandbytes__")
    if kind != "nf4":
        raise ValueError(f'quant_state: quant_type is "{kind}"; must be "nf4"')
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.dim() != 1:
        raise ValueError(f"quant_state: {name} is not a tensor of bytes")
    try:
        parts = json.loads(bytes(value.tolist()))
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deeply
        raise ValueError(f"quant_state: {name} is not JSON: {error}") from None
    if not isinstance(parts, dict):
        raise ValueError(f"quant_state: {name} is {parts!r}; must be a JSON object")
    return parts


_PLAIN_PARTS = frozenset({"absmax", "quant_map", "quant_type", "blocksize", "dtype", "shape"})
_NESTED_PARTS = frozenset(
    f"nested_{name}" for name in ("absmax", "quant_map", "blocksize", "dtype", "offset")
)


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_tensors(parts: dict[str, Any]) -> None:
    scale_dtype = torch.uint8 if "nested_absmax" in parts else torch.float32
    tensors = {
        "absmax": (scale_dtype, None),
        "quant_map": (torch.float32, 16),
        "nested_absmax": (torch.float32, None),
        "nested_quant_map": (torch.float32, 256),
    }
    for name, (dtype, length) in tensors.items():
        if name not in parts:
            continue
        tensor = parts[name]
        if not isinstance(tensor, Tensor):
            raise ValueError(f"quant_state: {name} is not a tensor")
        if tensor.dtype != dtype:
            found, wanted = dtype_name(tensor.dtype), dtype_name(dtype)
            raise ValueError(f"quant_state: {name} has dtype {found}; must be {wanted}")
        if length is not None and tensor.numel() != length:
            shape = tuple(tensor.shape)
            raise ValueError(f"quant_state: {name} has shape {shape}; must be ({length},)")
    code = parts["quant_map"]
    # The map of other releases may differ in the last bit; the codes are the same.
    if code.device.type != "meta" and not torch.allclose(
        code, nf4_code(code.device), rtol=0, atol=1e-6
    ):
        raise ValueError("quant_state: quant_map does not have the values of NF4")


def _check_parts(parts: dict[str, Any]) -> None:
    wanted = _PLAIN_PARTS | (_NESTED_PARTS if parts.keys() & _NESTED_PARTS else frozenset())
    if missing := sorted(wanted - parts.keys()):
        raise ValueError(f"quant_state: {', '.join(missing)} missing")
    if unknown := sorted(parts.keys() - wanted):
        raise ValueError(f"quant_state: {', '.join(unknown)} unknown")
    if parts["quant_type"] != "nf4":
        raise ValueError(f'quant_state: quant_type is {parts["quant_type"]!r}; must be "nf4"')
    for name in ("dtype", "nested_dtype"):
        if name in parts:
            _named_dtype(name, parts[name])
    _check_tensors(parts)
    shape, blocksize = parts["shape"], parts["blocksize"]
    if not isinstance(shape, (list, tuple)) or not all(_is_size(size) for size in shape):
        raise ValueError(f"quant_state: shape is {shape!r}; must be a list of sizes")
    if any(size >= 1 << 62 for size in shape) or math.prod(shape) >= 1 << 62:
        raise ValueError(f"quant_state: shape is {shape!r}; must be the shape of a tensor")
    if not _is_size(blocksize) or blocksize not in BLOCK_SIZES:
        allowed = ", ".join(map(str, BLOCK_SIZES))
        raise ValueError(f"quant_state: blocksize is {blocksize!r}; must be one of {allowed}")
    if "nested_absmax" in parts:
        nested = parts["nested_blocksize"]
        if not _is_size(nested) or not 0 < nested < 1 << 62:
            raise ValueError(
                f"quant_state: nested_blocksize is {nested!r}; must be a positive number"
            )
        _check_offset(parts["nested_offset"])


def _check_offset(offset: Any) -> None:
    number = isinstance(offset, (int, float)) and not isinstance(offset, bool)
    # NaN compares false.
    if not (number and abs(offset) <= torch.finfo(torch.float32).max):
        raise ValueError(f"quant_state: nested_offset is {offset!r}; must be a finite number")
