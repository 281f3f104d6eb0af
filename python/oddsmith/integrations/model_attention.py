"""Attention over a packed row of pairs, for the models of transformers.

A [`~oddsmith.packing.batch.PackedBatch`] is one row of tokens without padding, `[prompt | chosen |
rejected]` for each pair. Each answer sees the prompt and itself, and no pair sees another.

The row is passed through the model as a keyword argument to the attention function that
transformers registers as `sdpa`. While there is such a row, ours is registered instead: it computes
packed rows and passes every other call on. Neither the model nor its configuration is changed, and
a layer that is recomputed in the backward pass gets the same arguments from its checkpoint.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..packing.attention_cpu import PackedFlash, Segments, blocks
from ..packing.attention_cuda import can_run, packed_varlen
from ..packing.batch import PackedBatch
from .patch import Patch, Unsupported, find

__all__ = [
    "NAME",
    "SDPA",
    "CannotPack",
    "PackedRow",
    "SdpaAttention",
    "check_seen",
    "packed_inputs",
    "row_of",
]

#: The attention that ours replaces.
NAME = "sdpa"

_INTERFACE = "transformers.modeling_utils:AttentionInterface"
_SDPA_FORWARD = "transformers.integrations.sdpa_attention:sdpa_attention_forward"

# Keyword that carries a packed row through the model to `attend`.
ROW = "oddsmith_row"

# Arguments of some models' attention that are not supported here.
_UNKNOWN = ("softcap", "position_bias", "s_aux")


class CannotPack(Exception):
    """A model's attention cannot work on packed rows. The message is the reason."""


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """
    Causal attention within each sequence of a packed row.

    Args:
        module (`nn.Module`): The attention layer.
        query (`Tensor`): `(1, heads, N, d)`.
        key (`Tensor`): `(1, key heads, N, d)`.
        value (`Tensor`): As `key`.
        attention_mask (`Tensor`, *optional*): Of a packed row, the one of [`packed_inputs`].
        dropout (`float`, *optional*): Rate of dropout on the attention weights.
        scaling (`float`, *optional*): Factor on the products; one over the root of d if not given.
        sliding_window (`int`, *optional*): Positions that a token sees, itself included.
        kwargs: `oddsmith_row`, a [`PackedRow`]; without it the call goes to the previous `sdpa`.

    Returns:
        `tuple`: `(1, N, heads, d)`, and None for the weights.

    Raises:
        [`CannotPack`]: If the layer needs something that is not supported here.
    """
    row = kwargs.pop(ROW, None)
    if row is None:
        if sliding_window is not None:
            kwargs["sliding_window"] = sliding_window
        return SDPA.theirs(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    row.seen.add(module)
    segments = row.segments
    if attention_mask is not None and attention_mask.numel() > 1:
        raise CannotPack("its attention has a mask of its own")
    unknown = [name for name in _UNKNOWN if kwargs.get(name) is not None]
    if unknown:
        raise CannotPack(f"its attention has a {', '.join(unknown)}")
    if not getattr(module, "is_causal", True):
        raise CannotPack("its attention is not causal")
    if torch.is_autocast_enabled(query.device.type):  # as autocast does for libtorch's attention
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = (x.to(dtype) for x in (query, key, value))
    if sliding_window is not None and all(
        shared + max(chosen, rejected) <= sliding_window for shared, chosen, rejected in segments
    ):
        sliding_window = None
    if query.device.type == "cpu" and not dropout and sliding_window is None:
        out = PackedFlash.apply(query, key, value, segments, scaling)
    elif can_run(query, dropout):
        out = packed_varlen(query, key, value, segments, scaling, sliding_window)
    else:
        out = _blockwise(query, key, value, segments, dropout, scaling, sliding_window)
    return out.transpose(1, 2).contiguous(), None


def _blockwise(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    dropout: float,
    scaling: float | None,
    sliding_window: int | None,
) -> Tensor:
    """[`PackedFlash`] with libtorch's choice of kernel: any device, dropout, a window."""
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out = []
    for own, prompt in blocks(segments):
        seen = own.stop - own.start
        keys, values = key[:, :, own], value[:, :, own]
        if prompt is not None:
            seen += prompt.stop - prompt.start
            keys, values = (torch.cat([x[:, :, prompt], x[:, :, own]], dim=2) for x in (key, value))
        window = seen if sliding_window is None else sliding_window
        whole = prompt is None and seen <= window
        out.append(
            F.scaled_dot_product_attention(
                query[:, :, own],
                keys,
                values,
                attn_mask=None if whole else _band(own.stop - own.start, seen, window, key.device),
                dropout_p=dropout,
                is_causal=whole,
                scale=scaling,
            )
        )
    return torch.cat(out, dim=2)


def _band(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Which keys each of the last `queries` positions sees, `(queries, keys)`."""
    position = torch.arange(keys, device=device)
    distance = position[keys - queries :, None] - position
    return (distance >= 0) & (distance < window)


class SdpaAttention(Patch):
    """Registers [`attend`] as transformers' `sdpa`."""

    target = 'transformers.AttentionInterface, entry "sdpa"'
    purpose = "Attention over packed rows; every other call goes to what was registered before."
    tested = "transformers 5.17 and 5.24"
    fallback = "batches go through models with their padding"
    needs = (
        _INTERFACE,
        _SDPA_FORWARD,
    )

    def _check(self) -> None:
        self.theirs = _registered()
        if self.theirs is not find(_SDPA_FORWARD):
            raise Unsupported("another library has registered its own function")

    def _change(self) -> None:
        _register(attend)

    def _restore(self) -> None:
        if _registered() is attend:  # no other function was registered since
            _register(self.theirs)

    def _try_out(self) -> None:
        if _registered() is not attend:
            raise Unsupported("the registered function is not the one that is called")


def _registered() -> Any:
    return find(_INTERFACE)()[NAME]


def _register(function: Any) -> None:
    find(_INTERFACE).register(NAME, function)


SDPA = SdpaAttention()


class PackedRow:
    """
    The segments of a packed row for [`attend`], which is registered while there is one.

    Not a tuple or dataclass, because wrappers of models copy these.

    Args:
        segments (`tuple`): Those of a [`~oddsmith.packing.batch.PackedBatch`].

    Raises:
        [`CannotPack`]: If transformers' table does not accept the function.
    """

    def __init__(self, segments: Segments):
        self.segments = segments
        self.seen: set[nn.Module] = set()  # attention layers that got it
        if not SDPA.apply():
            raise CannotPack("transformers' table of attention functions has changed")
        weakref.finalize(self, SDPA.undo).atexit = False


def packed_inputs(batch: PackedBatch) -> dict[str, Any]:
    """Arguments of a model's forward for a packed batch."""
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        # With four dimensions, transformers uses it as the final mask and makes none.
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device),
        ROW: PackedRow(batch.segments),
    }


def row_of(inputs: dict[str, Any]) -> PackedRow:
    """The row in [`packed_inputs`]."""
    return inputs[ROW]


def check_seen(inputs: dict[str, Any]) -> None:
    """
    Check a model after a run on [`packed_inputs`].

    Raises:
        RuntimeError: If none of its layers got the packed row.
    """
    if not inputs[ROW].seen:
        raise RuntimeError(
            "the model's attention did not get the packed row: it has changed since the trainer "
            'was created; set attn_implementation="sdpa" again, or padding_free=False'
        )
