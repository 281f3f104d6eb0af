"""Attention over a packed row, one call of libtorch's attention for each block: for devices other
than the CPU where no variable-length kernel can run, and for dropout.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .attention_cpu import blocks
from .pattern import Pattern, Segments


def packed_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    pattern: Pattern,
    scale: float,
    dropout: float,
) -> Tensor:
    """
    [`~oddsmith.packing.attention_tiles.PackedTiles`] without softcap and sinks, with libtorch's choice of
    kernel.

    Returns:
        `Tensor`: `(1, heads, N, d_v)`.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    out = []
    for own, prompt in blocks(segments):
        shared = 0 if prompt is None else prompt.stop - prompt.start
        length = shared + own.stop - own.start
        keys, values = key[:, :, own], value[:, :, own]
        if prompt is not None:
            keys, values = (torch.cat([x[:, :, prompt], x[:, :, own]], dim=2) for x in (key, value))
        limits = pattern.within(length)
        whole = prompt is None and limits == Pattern()
        mask = None if whole else limits.mask(range(shared, length), range(length), key.device)
        out.append(
            F.scaled_dot_product_attention(
                query[:, :, own],
                keys,
                values,
                attn_mask=mask,
                dropout_p=dropout,
                is_causal=whole,
                scale=scale,
            )
        )
    return torch.cat(out, dim=2)
