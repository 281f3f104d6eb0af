"""Flash attention over a packed row of pairs, forward and backward, on the CPU.

libtorch's flash kernels compute one causal block at a time. A rejected answer with a shared prompt
attends to two blocks, the prompt (all of it) and itself (causal), whose outputs are merged by their
log-sum-exp. Given the merged output and log-sum-exp, the kernel's backward is exact for each block
alone. One autograd function does the complete row: gradients are written in place, and keys and
values are not repeated for each query head.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .pattern import Segments

_forward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def blocks(segments: Segments) -> Iterator[tuple[slice, slice | None]]:
    """
    Causal blocks of a packed row: `(own, prompt)`, the positions of the queries and of the shared
    prompt that they see too, if there is one.
    """
    start = 0
    for shared, chosen, rejected in segments:
        end = start + shared + chosen
        prompt = slice(start, start + shared) if shared else None
        if end > start:
            yield slice(start, end), None
        start = end + rejected
        if rejected:
            yield slice(end, start), prompt


class PackedFlash(torch.autograd.Function):
    """
    Attention of each block to itself (causal) and to its prompt.

    Equivalent to scaled dot product attention with a mask `(N, N)` that is true where a token sees
    another.

    Args:
        query (`Tensor`): `(1, heads, N, d)`.
        key (`Tensor`): `(1, key heads, N, d)`; heads are a multiple of them.
        value (`Tensor`): As `key`.
        segments (`tuple`): See [`~oddsmith.packing.batch.PackedBatch`].
        scale (`float`, *optional*): Factor on the products; one over the root of d if None.

    Returns:
        `Tensor`: `(1, heads, N, d)`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Segments,
        scale: float | None,
    ) -> Tensor:
        """See the class."""
        keys, values = (_repeated(x, query.shape[1]) for x in (key, value))
        # In this layout the model reshapes to (1, N, heads * d) without a copy.
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        out = out.transpose(1, 2)
        lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float))
        for own, prompt in blocks(segments):
            q = query[:, :, own]
            merged, total = _forward(q, keys[:, :, own], values[:, :, own], 0.0, True, scale=scale)
            if prompt is not None:
                seen, weight = _forward(
                    q, keys[:, :, prompt], values[:, :, prompt], 0.0, False, scale=scale
                )
                merged, total = _merge(merged, total, seen, weight)
            out[:, :, own], lse[:, :, own] = merged, total
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.segments, ctx.scale = segments, scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and value."""
        (d_out,) = gradients
        query, key, value, out, lse = ctx.saved_tensors
        keys, values = (_repeated(x, query.shape[1]) for x in (key, value))
        d_query = torch.empty_like(query)
        d_keys, d_values = torch.empty_like(keys), torch.empty_like(values)
        for own, prompt in blocks(ctx.segments):
            given = (d_out[:, :, own], query[:, :, own])
            # The kernel expects the log-sum-exp in its output layout, heads innermost.
            kept = (out[:, :, own], lse[:, :, own].transpose(1, 2).contiguous().transpose(1, 2))

            def run(place: slice, causal: bool, given=given, kept=kept) -> tuple[Tensor, ...]:
                return _backward(
                    *given,
                    keys[:, :, place],
                    values[:, :, place],
                    *kept,
                    0.0,
                    causal,
                    scale=ctx.scale,
                )

            dq, d_keys[:, :, own], d_values[:, :, own] = run(own, True)
            if prompt is not None:
                dq_prompt, dk, dv = run(prompt, False)
                dq = dq + dq_prompt
                # The chosen block of the pair, which has the prompt, is already written.
                d_keys[:, :, prompt] += dk
                d_values[:, :, prompt] += dv
            d_query[:, :, own] = dq
        return d_query, _summed(d_keys, key), _summed(d_values, value), None, None


def _merge(a: Tensor, lse_a: Tensor, b: Tensor, lse_b: Tensor) -> tuple[Tensor, Tensor]:
    """Merge attention over two sets of keys into attention over their union."""
    total = torch.logaddexp(lse_a, lse_b)
    share_a, share_b = ((lse - total).exp()[..., None] for lse in (lse_a, lse_b))
    return (a * share_a + b * share_b).to(a.dtype), total


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Repeat each key head for its query heads."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], dim=1)


def _summed(gradient: Tensor, like: Tensor) -> Tensor:
    """Sum the gradients of repeated heads."""
    if gradient.shape == like.shape:
        return gradient
    return gradient.unflatten(1, (like.shape[1], -1)).sum(dim=2)
