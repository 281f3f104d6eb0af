"""Attention over a packed row: the fastest implementation that computes it exactly."""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from .attention_blocks import packed_blocks
from .attention_cpu import PackedFlash
from .attention_cuda import can_run, packed_varlen
from .attention_tiles import PackedTiles, Rule
from .pattern import CAUSAL, Pattern, Segments, longest_sequence


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    *,
    pattern: Pattern = CAUSAL,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """
    Causal attention within each sequence of a packed row.

    What is installed and the device decide who computes it: libtorch's flash kernels for the CPU, a
    variable-length flash kernel on CUDA, or tiles of queries for what neither knows (on a CPU a softcap).

    Args:
        query (`Tensor`): `(1, heads, N, d)`.
        key (`Tensor`): `(1, key heads, N, d)`; heads are a multiple of them.
        value (`Tensor`): `(1, key heads, N, d_v)`.
        segments (`tuple`): See [`~oddsmith.packing.batch.PackedBatch`].
        pattern ([`~oddsmith.packing.pattern.Pattern`]): Which tokens a token sees.
        scale (`float`, *optional*): Factor on the products; one over the root of d if None.
        softcap (`float`, *optional*): Bound of the scores: `softcap * tanh(score / softcap)`.
        sinks (`Tensor`, *optional*): A score for each head that no value belongs to, `(heads,)`.
        dropout (`float`): Rate of dropout on the weights.

    Returns:
        `Tensor`: `(1, heads, N, d_v)`.
    """
    width, value_width = query.shape[-1], value.shape[-1]
    factor: float = 1.0 / math.sqrt(width) if scale is None else scale
    pattern = pattern.within(longest_sequence(segments))
    on_cpu = query.device.type == "cpu"
    plain = softcap is None and sinks is None
    if value_width <= width and can_run(query, pattern, softcap, sinks, dropout):
        value = _widened(value, width)
        out = packed_varlen(query, key, value, segments, factor, pattern.window, softcap)
    elif on_cpu and softcap is None and not dropout and None in pattern:
        common = max(width, value_width)
        query, key, value = (_widened(x, common) for x in (query, key, value))
        out = PackedFlash.apply(query, key, value, segments, factor, pattern, sinks)
    elif plain and (dropout or not on_cpu):
        return packed_blocks(query, key, value, segments, pattern, factor, dropout)
    else:
        rule = Rule(pattern, factor, softcap, dropout)
        return PackedTiles.apply(query, key, value, sinks, segments, rule)
    return out[..., :value_width] if value_width < width else out


def _widened(value: Tensor, width: int) -> Tensor:
    """With zeros up to a width, which change no product; the flash kernels know only one width."""
    missing = width - value.shape[-1]
    return F.pad(value, (0, missing)) if missing else value
