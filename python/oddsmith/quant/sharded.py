"""4-bit weights that FSDP2 has split over processes: codes in parts, their state on each process.

FSDP2 replaces a layer's weight by a parameter of its own class, one for the part and one for the
gathered codes. Both carry the state of the weight that they replace, and its entries under the names
of a checkpoint, which torch's distributed checkpoints look up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .state import PACKED_KEY, QuantState, dtype_name

__all__ = [
    "dtype_after",
    "entries_are_saved",
    "entry",
    "is_part",
    "give_state",
    "keep_state",
    "load_part",
    "why_no_state",
    "without_entries",
]

# Entries of a state that are tensors of their own; the last two with double quantisation.
_ENTRIES = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")

_SAVED: ContextVar[bool] = ContextVar("entries_are_saved", default=True)


@contextmanager
def without_entries() -> Iterator[None]:
    """
    A context in which state dicts have the codes of 4-bit weights without their other entries.

    For checkpoints of an adapter alone: torch leaves frozen parameters out of them, but it cannot load
    a state dict with entries that are neither parameters nor buffers on several processes.
    """
    token = _SAVED.set(False)
    try:
        yield
    finally:
        _SAVED.reset(token)


def entries_are_saved() -> bool:
    """Whether state dicts have all entries of 4-bit weights, as outside of [`without_entries`]."""
    return _SAVED.get()


def is_part(weight: Any) -> bool:
    """Whether a weight is split over processes."""
    return hasattr(weight, "device_mesh")


def entry(state: QuantState | None, name: str) -> Tensor:
    """
    An entry of a state by its name in a checkpoint.

    Raises:
        AttributeError: If there is none.
    """
    found = None
    if state is not None:
        of = state.state2 if name.startswith("nested_") else state
        if of is not None:
            found = of.absmax if name.endswith("absmax") else of.code
    if found is None:
        raise AttributeError(f"the weight has no {name}")
    return found


def keep_state(new: Any, old: Any) -> None:
    """
    Gives a parameter the state of the weight that it replaces, if it can be its codes.

    Args:
        new (`Tensor`): What FSDP2 puts into the layer: a part of the codes, or all of them.
        old (`Tensor`, *optional*): What it takes out.
    """
    state = getattr(old, "quant_state", None)
    known = getattr(new, "quant_state", None)
    if state is None or known is state:
        return
    # Another shape or dtype is another weight: one in full precision, or codes that were cast.
    if new.shape == old.shape and new.dtype == old.dtype:
        give_state(new, state)


def give_state(weight: Any, state: QuantState) -> None:
    """Gives a parameter a state, on its device."""
    state = state.to(weight.device)
    weight.quant_state = state
    for name in _ENTRIES:
        try:
            setattr(weight, name, entry(state, name))
        except AttributeError:
            vars(weight).pop(name, None)


def why_no_state(weight: Any) -> str:
    """Why a layer's weight has no state, as a predicate."""
    if hasattr(weight, "quant_state"):
        return "is not quantised yet; move the layer to a device first"
    return (
        f"is a {dtype_name(weight.dtype)} {tuple(weight.shape)} without a quant_state; FSDP2 must not "
        "cast codes: its param_dtype must be quant_storage, or None"
    )


def dtype_after(fn: Any, weight: Any) -> torch.dtype:
    """The dtype that a function of [`torch.nn.Module._apply`] gives to a part."""
    return fn(torch.empty(0, dtype=weight.dtype, device=weight.device)).dtype


@torch.no_grad()
def load_part(weight: Any, data: Tensor, parts: dict[str, Any], shape: torch.Size) -> None:
    """
    Loads codes, split or whole, into a part; and their state, if it is there.

    Args:
        weight (`Tensor`): The layer's weight.
        data (`Tensor`): The codes.
        parts (`dict`): The other entries of the weight, under any prefix.
        shape (`torch.Size`): Shape of the weight in full precision.

    Raises:
        ValueError: If they do not fit the layer.
    """
    if data.shape != weight.shape or data.dtype != weight.dtype:
        raise ValueError(
            f"codes are {dtype_name(data.dtype)} {tuple(data.shape)}; must be "
            f"{dtype_name(weight.dtype)} {tuple(weight.shape)}, as they are split over processes"
        )
    state = weight.quant_state
    if any(key.endswith(PACKED_KEY) for key in parts):
        state = QuantState.from_dict(parts)
        if state.shape != shape:
            raise ValueError(
                f"quant_state: shape is {tuple(state.shape or ())}; must be {tuple(shape)}"
            )
    if not is_part(data):
        from torch.distributed.tensor import distribute_tensor

        data = distribute_tensor(data, weight.device_mesh, weight.placements)
    weight.copy_(data)
    give_state(weight, state)
