"""An optimiser's state in bitsandbytes' layout, so that a run can switch between the two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .moments import blocks_of, decode, encode, has_our_maps, is_8bit, maps

# bitsandbytes' name of the dictionary that hides tensors from FSDP's gathering.
WRAPPED = "__bnb_optimizer_quant_state__"

_WRAPPED_KEYS = ("state1", "qmap1", "state2", "qmap2", "absmax1", "absmax2")


def wrap(state: dict[str, Any]) -> dict[str, Any]:
    """A parameter's state in bitsandbytes' layout."""
    inner = {key: state[key] for key in _WRAPPED_KEYS if key in state}
    outer = {key: value for key, value in state.items() if key not in inner}
    return {**outer, WRAPPED: inner} if inner else outer


def unwrap(state: dict[str, Any]) -> dict[str, Any]:
    """The inverse of [`wrap`]."""
    return {key: value for key, value in state.items() if key != WRAPPED} | state.get(WRAPPED, {})


def check(state: dict[str, Any], numel: int, where: str) -> None:
    """
    Checks a parameter's unwrapped state.

    Raises:
        ValueError: If an entry is missing, or does not have the parameter's size.
    """
    for key in ("step", "state1", "state2"):
        if key not in state:
            raise ValueError(f"{where} has no {key}, so it is not a state of AdamW")
    sizes = {"state1": numel, "state2": numel}
    if is_8bit(state):
        sizes |= {
            "absmax1": blocks_of(numel),
            "absmax2": blocks_of(numel),
            "qmap1": 256,
            "qmap2": 256,
        }
    for key, size in sizes.items():
        found = state.get(key)
        if not isinstance(found, Tensor) or found.numel() != size:
            found = tuple(found.shape) if isinstance(found, Tensor) else found
            raise ValueError(f"{where}: {key} is {found}; must have {size} elements")
        if key.startswith("state") and found.dtype != state["state1"].dtype:
            raise ValueError(f"{where}: {key} is {found.dtype}; must be {state['state1'].dtype}")


def converted(state: dict[str, Any], bits: int) -> dict[str, Any]:
    """
    A checked state with moments of `bits`, and codes of ours.

    Args:
        state (`dict`): Saved by bitsandbytes or by this package.
        bits (`int`): 8 or 32.
    """
    rest = {key: value for key, value in state.items() if key not in _WRAPPED_KEYS}
    moments = {key: state[key] for key in _WRAPPED_KEYS if key in state}
    if is_8bit(state) and bits == 8:
        if has_our_maps(state):
            # Tensors that all states share.
            moments |= dict(zip(("qmap1", "qmap2"), maps(state["state1"].device)))
            return {**rest, **moments}
        return {**rest, **encode(*decode(state))}
    first, second = (each.to(torch.float32) for each in decode(state))
    return {**rest, **(encode(first, second) if bits == 8 else {"state1": first, "state2": second})}
