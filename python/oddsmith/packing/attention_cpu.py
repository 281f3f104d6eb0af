"""Flash attention over a packed row of pairs, forward and backward, on the CPU.

libtorch's flash kernels compute one causal block at a time. A rejected answer with a shared prompt
attends to two blocks, the prompt (all of it) and itself (causal), whose outputs are merged by their
log-sum-exp; windows and chunks are more of such blocks, see [`oddsmith.packing.parts`]. Given the merged
output and log-sum-exp, the kernel's backward is exact for each block alone, and a sink is no more than
another term of that sum. One autograd function does the complete row: gradients are written in place,
and keys and values are not repeated for each query head.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .parts import Kind, Part, parts
from .pattern import CAUSAL, Pattern, Segments

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
    another, and one more column per head if there are sinks, which is dropped after the softmax.

    Args:
        query (`Tensor`): `(1, heads, N, d)`.
        key (`Tensor`): `(1, key heads, N, d)`; heads are a multiple of them.
        value (`Tensor`): As `key`.
        segments (`tuple`): See [`~oddsmith.packing.batch.PackedBatch`].
        scale (`float`, *optional*): Factor on the products; one over the root of d if None.
        pattern ([`~oddsmith.packing.pattern.Pattern`]): A window or a chunk or neither.
        sinks (`Tensor`, *optional*): A score for each head that no value belongs to, `(heads,)`.

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
        pattern: Pattern = CAUSAL,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """See the class."""
        keys, values = (_repeated(x, query.shape[1]) for x in (key, value))
        # In this layout the model reshapes to (1, N, heads * d) without a copy.
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        out = out.transpose(1, 2)
        lse = query.new_empty(query.shape[:3], dtype=torch.promote_types(query.dtype, torch.float))
        for own, prompt in blocks(segments):
            block = _Block.of(own, prompt, pattern)
            k, v = block.gathered(keys), block.gathered(values)
            for part in parts(block.shared, block.length, pattern):
                place = block.key_place(part)
                q = block.queries(query, part)
                made, weight = _forward(
                    q, _of(k, place, part.keys, part), _of(v, place, part.keys, part), 0.0,
                    part.kind is not Kind.ALL, scale=scale,
                )  # fmt: skip
                if part.kind is Kind.REVERSED:
                    made, weight = made.flip(2), weight.flip(2)
                merged = block.queries(out, part, flip=False)
                total = block.queries(lse, part, flip=False)
                if part.kind is not Kind.CAUSAL:
                    made, weight = _merge(merged, total, made, weight)
                merged.copy_(made)
                total.copy_(weight)
        if sinks is not None:
            whole = torch.logaddexp(lse, sinks.to(lse.dtype).view(1, -1, 1))
            out.mul_((lse - whole).exp_()[..., None])
            lse = whole
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        ctx.segments, ctx.scale, ctx.pattern = segments, scale, pattern
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value and sinks."""
        (d_out,) = gradients
        query, key, value, sinks, out, lse = ctx.saved_tensors
        keys, values = (_repeated(x, query.shape[1]) for x in (key, value))
        d_query = torch.empty_like(query)
        d_keys, d_values = torch.empty_like(keys), torch.empty_like(values)
        for own, prompt in blocks(ctx.segments):
            block = _Block.of(own, prompt, ctx.pattern)
            k, v = block.gathered(keys), block.gathered(values)
            d_k, d_v = (
                (torch.zeros_like(k), torch.zeros_like(v)) if block.copied else (d_keys, d_values)
            )
            for part in parts(block.shared, block.length, ctx.pattern):
                place = block.key_place(part)
                # The kernel expects the log-sum-exp in its output layout, heads innermost.
                total = block.queries(lse, part).transpose(1, 2).contiguous().transpose(1, 2)
                found = _backward(
                    block.queries(d_out, part),
                    block.queries(query, part),
                    _of(k, place, part.keys, part),
                    _of(v, place, part.keys, part),
                    block.queries(out, part),
                    total,
                    0.0,
                    part.kind is not Kind.ALL,
                    scale=ctx.scale,
                )
                if part.kind is Kind.REVERSED:
                    found = [x.flip(2) for x in found]
                targets = (
                    block.queries(d_query, part, flip=False),
                    _of(d_k, place, part.keys, part, flip=False),
                    _of(d_v, place, part.keys, part, flip=False),
                )
                for target, gradient in zip(targets, found, strict=True):
                    # A causal part is the first of its queries, and of its keys behind the prompt. Those of a
                    # prompt are already written by the chosen block of the pair, which has the prompt.
                    if part.kind is Kind.CAUSAL:
                        target.copy_(gradient)
                    else:
                        target += gradient
            if block.copied:
                block.scatter(d_k, d_keys)
                block.scatter(d_v, d_values)
        d_sinks = None
        if sinks is not None:
            share = (sinks.to(lse.dtype).view(1, -1, 1) - lse).exp_()
            mean = (d_out.to(lse.dtype) * out).sum(-1)  # of the weights' gradient, by the weights
            d_sinks = (share * mean).sum((0, 2)).neg_().view_as(sinks).to(sinks.dtype)
        d_key, d_value = _summed(d_keys, key), _summed(d_values, value)
        return d_query, d_key, d_value, None, None, None, d_sinks


class _Block(NamedTuple):
    own: slice
    prompt: slice | None
    shared: int
    length: int
    copied: bool  # prompt and answer are copied into one sequence, as a window lies in both

    @classmethod
    def of(cls, own: slice, prompt: slice | None, pattern: Pattern) -> "_Block":
        shared = 0 if prompt is None else prompt.stop - prompt.start
        length = shared + own.stop - own.start
        return cls(own, prompt, shared, length, bool(shared) and pattern.window is not None)

    def gathered(self, x: Tensor) -> Tensor:
        if not self.copied:
            return x
        return torch.cat([x[:, :, self.prompt], x[:, :, self.own]], dim=2)

    def scatter(self, gradient: Tensor, total: Tensor) -> None:
        total[:, :, self.prompt] += gradient[:, :, : self.shared]
        total[:, :, self.own] = gradient[:, :, self.shared :]

    def key_place(self, part: Part) -> int:
        """Where a part's keys begin in what `gathered` returns."""
        if self.copied:
            return part.key
        if self.prompt is not None and part.key < self.shared:
            return self.prompt.start + part.key
        return self.own.start + part.key - self.shared

    def queries(self, x: Tensor, part: Part, flip: bool = True) -> Tensor:
        return _of(x, self.own.start + part.query - self.shared, part.queries, part, flip)


def _of(x: Tensor, place: int, size: int, part: Part, flip: bool = True) -> Tensor:
    """
    The tokens of a part, `(repeats, heads, size, ..)`: a view of `x` `(1, heads, N, ..)`, or a copy
    backwards.
    """
    if part.repeats == 1:
        x = x[:, :, place : place + size]
    else:
        x = x[0, :, place : place + (part.repeats - 1) * part.step + size]
        x = x.unfold(1, size, part.step).movedim(-1, 2).transpose(0, 1)
    return x.flip(2) if flip and part.kind is Kind.REVERSED else x


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
