"""The moments of AdamW as an optimiser's state: 32 bits, or 8 with a scale for every 256.

The entries have bitsandbytes' names: `state1` and `state2` are the moments; with 8 bits they are
`uint8` codes, and `absmax1`, `absmax2` (`fp32`, one per block of 256 elements of the flat
parameter) and the values of the codes, `qmap1` and `qmap2`, give `moment = qmap[code] *
absmax[block]`. The maps differ from bitsandbytes': their steps grow with the value, so that vector
code needs no table, and the second moment has squares of such numbers, which span twice as many
decades (`src/optim/octave.rs`).
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from ... import _core

BLOCKSIZE = 256
# Tensors smaller than this keep fp32 moments: 8 bits would save little.
MIN_8BIT_SIZE = 4096

State = dict[str, Any]

_FLOAT = torch.float32


@functools.cache
def maps(device: torch.device) -> tuple[Tensor, Tensor]:
    """Values of the codes of first and second moments, `(256,)` `fp32` each, shared by all states."""
    first, second = _core.moment_maps()
    return first.to(device), second.to(device)


def blocks_of(numel: int) -> int:
    """Number of blocks, and so of scales, of `count` elements."""
    return -(-numel // BLOCKSIZE)


def layout(shape: torch.Size, bits: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of each tensor in a parameter's state."""
    dtype = torch.uint8 if bits == 8 else _FLOAT
    entries = {"state1": (tuple(shape), dtype), "state2": (tuple(shape), dtype)}
    if bits == 8:
        scales = ((blocks_of(shape.numel()),), _FLOAT)
        entries |= {"absmax1": scales, "absmax2": scales}
    return entries


def is_8bit(state: State) -> bool:
    """Whether a state's moments are codes."""
    return state["state1"].dtype == torch.uint8


def has_our_maps(state: State) -> bool:
    """Whether an 8-bit state has our codes, not bitsandbytes'."""
    ours = maps(state["qmap1"].device)
    return all(torch.equal(state[key], own) for key, own in zip(("qmap1", "qmap2"), ours))


def decode(state: State) -> tuple[Tensor, Tensor]:
    """Both moments of a state, `fp32`."""
    if not is_8bit(state):
        return state["state1"], state["state2"]
    first, second = (
        _spread(state[f"absmax{i}"], state[f"state{i}"].numel())
        .mul_(state[f"qmap{i}"][state[f"state{i}"].flatten().long()])
        .view(state[f"state{i}"].shape)
        for i in (1, 2)
    )
    return first, second


def encode(first: Tensor, second: Tensor) -> State:
    """
    Encode `fp32` moments as the nearest 8-bit codes; for the second moment, nearest to its root.

    The result of [`decode`] is encoded to the same codes.
    """
    first, second = first.to(_FLOAT), second.to(_FLOAT)
    qmap1, qmap2 = maps(first.device)
    absmax1, absmax2 = _absmax(first), _absmax(second)
    codes1 = _nearest(first, absmax1, qmap1)
    codes2 = _nearest(second.sqrt(), absmax2.sqrt(), qmap2.sqrt())
    return {
        "state1": codes1,
        "state2": codes2,
        "qmap1": qmap1,
        "qmap2": qmap2,
        "absmax1": absmax1,
        "absmax2": absmax2,
    }


def _spread(absmax: Tensor, numel: int) -> Tensor:
    """The scale of each element."""
    return absmax.repeat_interleave(BLOCKSIZE)[:numel]


def _absmax(values: Tensor) -> Tensor:
    flat = values.flatten()
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCKSIZE))
    return padded.view(-1, BLOCKSIZE).abs().amax(1)


def _nearest(values: Tensor, absmax: Tensor, qmap: Tensor) -> Tensor:
    scaled = values.flatten() / _spread(absmax, values.numel()).clamp(min=1e-38)
    return torch.bucketize(scaled, (qmap[1:] + qmap[:-1]) / 2).to(torch.uint8).view(values.shape)
