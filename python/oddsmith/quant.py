"""NF4: tensors as 4-bit codes with a scale a block, in the format of bitsandbytes.

Use [`quantize_nf4`] and [`dequantize_nf4`] through `oddsmith.functional`. The algorithm is in
`src/quant`.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from . import _core

__all__ = ["QuantState", "dequantize_nf4", "dynamic_map", "quantize_nf4"]

# Values that may share a scale.
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)

# Scales that share one scale of their own, in double quantisation.
NESTED_BLOCKSIZE = 256

# The one key of a state dict that holds what is no tensor, as JSON.
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


def dynamic_map(signed: bool = True) -> Tensor:
    """The 256 values of 8-bit dynamic quantisation, ascending, `float32`.

    Dettmers et al. 2022 (arXiv 2110.02861): seven decades, each with twice as many fractions as the
    one below, and zero and one. The bits come from this machine's `torch.linspace`, as they do in
    bitsandbytes: between processors they differ in the last place, so a map is stored with what it
    has quantised.

    Args:
        signed (`bool`, *optional*, defaults to `True`): Values of both signs; otherwise none below
            zero, and twice as many fractions a decade.
    """
    values = [torch.tensor([0.0, 1.0])]
    for decade in range(7):
        edges = torch.linspace(0.1, 1, 2 ** (decade + (not signed)) + 1, dtype=torch.float32)
        middles = 10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2.0)
        values += [middles, -middles] if signed else [middles]
    return torch.cat(values).sort().values


@functools.cache
def _nf4_code(device: torch.device) -> Tensor:
    return _core.nf4_code().to(device)


class QuantState:
    """Everything but the codes of a quantised tensor, named as in bitsandbytes.

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

    __hash__ = None

    def to(self, device: torch.device | str) -> QuantState:
        """The state with its tensors on `device`; `self` if they are there already."""

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
        """The parts by the names they have in a checkpoint.

        Args:
            packed (`bool`, *optional*, defaults to `False`): Only tensors: the rest as the bytes of
                one JSON object, under `quant_state.bitsandbytes__nf4`. Prefixed with the name of
                the weight these are the entries of a state dict.
        """
        tensors = {"absmax": self.absmax, "quant_map": self.code}
        rest = {
            "quant_type": self.quant_type,
            "blocksize": self.blocksize,
            "dtype": dtype_name(self.dtype),
            "shape": tuple(self.shape),
        }
        if self.state2 is not None:
            tensors["nested_absmax"] = self.state2.absmax
            # Weights share the map; files of safetensors must not.
            tensors["nested_quant_map"] = self.state2.code.clone()
            rest["nested_blocksize"] = self.state2.blocksize
            rest["nested_dtype"] = dtype_name(self.state2.dtype)
            rest["nested_offset"] = self.offset.item()
        if not packed:
            return {**rest, **tensors}
        text = json.dumps(rest).encode()
        return {**tensors, PACKED_KEY: torch.frombuffer(bytearray(text), dtype=torch.uint8)}

    @classmethod
    def from_dict(
        cls, qs_dict: Mapping[str, Any], device: torch.device | str | None = None
    ) -> QuantState:
        """Reads what [`QuantState.as_dict`] or bitsandbytes has written.

        Args:
            qs_dict (`dict`): The parts, packed or not, under any prefix.
            device (`torch.device`, *optional*): Where the tensors go; where they are if not given.

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


def _unpack_json(name: str, value: object) -> dict[str, Any]:
    """The JSON object in a tensor of bytes."""
    kind = name.removeprefix("bitsandbytes__")
    if kind != "nf4":
        raise ValueError(f'quant_state: quant_type is "{kind}"; must be "nf4"')
    if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.dim() != 1:
        raise ValueError(f"quant_state: {name} is no tensor of bytes")
    try:
        parts = json.loads(bytes(value.tolist()))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, lists without end
        raise ValueError(f"quant_state: {name} is no JSON: {error}") from None
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
            raise ValueError(f"quant_state: {name} is no tensor")
        if tensor.dtype != dtype:
            found, wanted = dtype_name(tensor.dtype), dtype_name(dtype)
            raise ValueError(f"quant_state: {name} has dtype {found}; must be {wanted}")
        if length is not None and tensor.numel() != length:
            shape = tuple(tensor.shape)
            raise ValueError(f"quant_state: {name} has shape {shape}; must be ({length},)")
    code = parts["quant_map"]
    # Codes that other releases have written may differ in the last bit; they mean the same.
    if code.device.type != "meta" and not torch.allclose(
        code, _nf4_code(code.device), rtol=0, atol=1e-6
    ):
        raise ValueError("quant_state: quant_map has other values than NF4")


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
        raise ValueError(f"quant_state: shape is {shape!r}; must be that of a tensor")
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


def _check_offset(offset: object) -> None:
    number = isinstance(offset, (int, float)) and not isinstance(offset, bool)
    # NaN compares false.
    if not (number and abs(offset) <= torch.finfo(torch.float32).max):
        raise ValueError(f"quant_state: nested_offset is {offset!r}; must be a finite number")


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
    scales = nested_parts(nested_absmax, nested_code, offset, nested_blocksize)
    return _core.dequantize_nf4(packed, absmax, scales, blocksize, shape, dtype_name(dtype))


@_dequantize_nf4.register_fake
def _(
    packed, absmax, nested_absmax, nested_code, offset, nested_blocksize, blocksize, shape, dtype
):
    return packed.new_empty(shape, dtype=dtype)


def nested_parts(
    absmax: Tensor | None, code: Tensor | None, offset: Tensor | None, blocksize: int
) -> tuple[Tensor, Tensor, Tensor, int] | None:
    """What the core wants to know of quantised scales; `None` if they are not quantised."""
    return None if absmax is None else (absmax, code, offset, blocksize)


def scale_arguments(
    state: QuantState,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, int]:
    """`absmax`, and what its double quantisation needs, as arguments of the custom operators."""
    nested = state.state2
    if nested is None:
        return state.absmax, None, None, None, 0
    return state.absmax, nested.absmax, nested.code, state.offset, nested.blocksize


def packed_bytes(packed: Tensor) -> Tensor:
    """The codes as bytes: checkpoints may store them under another dtype of the same bytes."""
    return packed if packed.dtype == torch.uint8 else packed.contiguous().view(torch.uint8)


def quantize_nf4(
    tensor: Tensor, blocksize: int = 64, double_quant: bool = False, *, stepped: bool = False
) -> tuple[Tensor, QuantState]:
    """Quantises a tensor to NF4 (Dettmers et al. 2023, arXiv 2305.14314).

    Equivalent to, for sizes that blocks divide:

    ```python
    blocks = tensor.float().reshape(-1, blocksize)
    absmax = blocks.abs().amax(1)
    codes = (blocks / absmax[:, None])[..., None].sub(code).abs().argmin(-1).flatten()
    packed = codes[0::2] << 4 | codes[1::2]
    ```

    Bit-equal to bitsandbytes 0.50 on a CPU, but for the codes of scales under `double_quant`:
    bitsandbytes looks those up in a table that has no zero; here they are the nearest. A NaN makes
    its whole block NaN, an infinity its block NaN and infinite, as there. Under `double_quant` either
    would make the mean of the scales, and with it every value, NaN: such a tensor is refused.

    Args:
        tensor (`Tensor`): Any shape, `float32`, `bfloat16` or `float16`.
        blocksize (`int`, *optional*, defaults to 64): Values that share a scale: 32, 64, 128, 256,
            512, 1024, 2048 or 4096, counted along the flat tensor. The last block may be partial.
        double_quant (`bool`, *optional*, defaults to `False`): Quantise the scales to 8 bits, in
            blocks of 256: half a bit less a value.
        stepped (`bool`, *optional*, defaults to `False`): Choose the codes of scales as
            bitsandbytes does on a CPU, for comparisons with it.

    Returns:
        `(Tensor, QuantState)`: The codes, `((n + 1) // 2, 1)` `uint8`, the first of two in the high
        half; and what is needed to read them.

    Raises:
        ValueError: For another block size; with `double_quant` for NaN and infinite values.
        TypeError: For another dtype.
    """
    packed, absmax = _quantize_nf4(tensor.detach(), blocksize)
    state = QuantState(
        absmax=absmax,
        shape=tensor.shape,
        code=_nf4_code(tensor.device).clone(),
        blocksize=blocksize,
        quant_type="nf4",
        dtype=tensor.dtype,
    )
    if double_quant:
        # libtorch's own mean: the order in which it adds decides the last bits.
        state.offset = absmax.mean()
        if absmax.numel() and not state.offset.isfinite():
            raise ValueError(f"quantize_nf4: {_why_not_finite(absmax, blocksize, tensor.numel())}")
        code = dynamic_map().to(tensor.device)
        codes, largest = _core.quantize_blockwise(
            absmax - state.offset, code, NESTED_BLOCKSIZE, stepped
        )
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
    """The values of a tensor that [`quantize_nf4`] or bitsandbytes has quantised.

    Equivalent to, for sizes that blocks divide:

    ```python
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten().int()
    values = (state.code[codes].view(-1, state.blocksize) * state.absmax[:, None]).to(dtype)
    ```

    Args:
        packed (`Tensor`): The codes, two a byte, `uint8` or another dtype of the same bytes.
        state ([`QuantState`]): What `quantize_nf4` has returned with them.
        dtype (`torch.dtype`, *optional*): `float32`, `bfloat16` or `float16`; that of the tensor that
            was quantised if not given. Values are rounded to it once.

    Returns:
        `Tensor`: `state.shape`, `dtype`.

    Raises:
        ValueError: If codes and state do not belong together; the message names what does not fit.
        TypeError: For a dtype that does not fit.
    """
    if state.quant_type != "nf4":
        raise ValueError(f'dequantize_nf4: quant_type is {state.quant_type!r}; must be "nf4"')
    if packed.device != state.absmax.device:
        raise ValueError(
            f"dequantize_nf4: packed is on {packed.device}; must be on the device of absmax, "
            f"{state.absmax.device}"
        )
    dtype = dtype or state.dtype
    scales = scale_arguments(state)
    return _dequantize_nf4(packed_bytes(packed), *scales, state.blocksize, list(state.shape), dtype)
