"""Attention over a packed row in tiles of queries, for what no flash kernel computes.

A softcap, attention sinks, windows, chunks, keys and values of different widths and dropout, on any
device. Weights are computed for one tile of queries at a time, in at least float32, and again in the
backward pass, so that memory grows with the row and not with its square.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention_cpu import blocks
from .pattern import Pattern, Segments

# Attention weights in memory at a time, over all heads, and the numbers of queries.
_TILE_WEIGHTS = 1 << 21
_TILE_QUERIES, _SMALLEST = 256, 16


class Rule(NamedTuple):
    """
    How a layer attends.

    Args:
        pattern ([`~oddsmith.packing.pattern.Pattern`]): Which tokens a token sees.
        scale (`float`): Factor on the products of queries and keys.
        softcap (`float`, *optional*): Bound of the scores: `softcap * tanh(score / softcap)`.
        dropout (`float`): Rate of dropout on the weights.
    """

    pattern: Pattern
    scale: float
    softcap: float | None = None
    dropout: float = 0.0


class _Tile(NamedTuple):
    rows: slice  # of the queries in the packed row
    pieces: tuple[slice, ...]  # of the keys
    # Keys that some query does not see, and for which: (keys, (queries, keys) bool), up to two.
    unseen: tuple[tuple[slice, Tensor], ...]


def tiles(
    segments: Segments, pattern: Pattern, heads: int, device: torch.device
) -> Iterator[_Tile]:
    """The tiles of a packed row: each query is in one of them, with all keys that it sees."""
    for own, prompt in blocks(segments):
        shared = 0 if prompt is None else prompt.stop - prompt.start
        length = shared + own.stop - own.start
        offset = own.start - shared  # place of a position behind the prompt
        step = max(_SMALLEST, min(_TILE_QUERIES, _TILE_WEIGHTS // (heads * length)))
        begin = shared
        while begin < length:
            end = min(begin + step, length)
            if pattern.chunk is not None:
                end = min(end, begin - begin % pattern.chunk + pattern.chunk)
            first = pattern.first_seen(begin)
            pieces = []
            if prompt is not None and first < shared:
                pieces.append(slice(prompt.start + first, prompt.start + min(shared, end)))
            pieces.append(slice(offset + max(first, shared), offset + end))
            unseen = tuple(_edges(pattern, range(begin, end), first, device))
            yield _Tile(slice(offset + begin, offset + end), tuple(pieces), unseen)
            begin = end


def _edges(
    pattern: Pattern, queries: range, first: int, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """Where a tile needs a mask: before the window of its last query, and behind its first query."""
    last = pattern.first_seen(queries.stop - 1)
    edges = [range(first, last), range(queries.start + 1, queries.stop)]
    if last > queries.start:  # a window narrower than the tile
        edges = [range(first, queries.stop)]
    for keys in edges:
        if len(keys):
            place = slice(keys.start - first, keys.stop - first)
            yield place, ~pattern.mask(queries, keys, device)


class PackedTiles(torch.autograd.Function):
    """
    Attention of each block to itself (causal) and to its prompt, by a rule.

    Equivalent to `softmax(softcap(scale * q @ k^T) + mask)` with a mask `(N, N)`, where the softmax has
    one more column per head if there are sinks, which is dropped after it.

    Args:
        query (`Tensor`): `(1, heads, N, d)`.
        key (`Tensor`): `(1, key heads, N, d)`; heads are a multiple of them.
        value (`Tensor`): `(1, key heads, N, d_v)`.
        sinks (`Tensor`, *optional*): A score for each head that no value belongs to, `(heads,)`.
        segments (`tuple`): See [`~oddsmith.packing.batch.PackedBatch`].
        rule ([`Rule`]): How the layer attends.

    Returns:
        `Tensor`: `(1, heads, N, d_v)`, in the dtype of `query`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        segments: Segments,
        rule: Rule,
    ) -> Tensor:
        """See the class."""
        heads, count = query.shape[1:3]
        # In this layout the model reshapes to (1, N, heads * d) without a copy.
        out = query.new_empty(1, count, heads, value.shape[-1]).transpose(1, 2)
        wide = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_empty(heads, count, dtype=wide)
        ctx.rule, ctx.segments = rule, segments
        # From the state that checkpointing restores before it computes a layer again.
        ctx.seed = int(torch.randint(1 << 62, ())) if rule.dropout else 0
        drop = _Dropout(rule.dropout, ctx.seed, query.device)
        for tile in tiles(segments, rule.pattern, heads, query.device):
            q, k, v = _taken(query, key, value, tile, wide)
            scores, _ = _scores(q, k, tile, rule)
            # Every query sees itself, so the largest score is finite.
            largest = scores.amax(-1)
            weights = scores.sub_(largest[..., None]).exp_()
            total = weights.sum(-1)
            if sinks is not None:
                # A sink far above the scores would overflow here, without it they would not count.
                sink = _of_heads(sinks.to(wide), largest) - largest
                total = torch.logaddexp(total.log(), sink)
            else:
                total = total.log()
            kept = drop.factor(weights)
            if kept is not None:
                weights = weights * kept
            # Dividing the few sums is less than dividing all weights.
            part = _product(weights, v).mul_((-total).exp_()[..., None])
            out[0, :, tile.rows] = _joined(part)
            lse[:, tile.rows] = (total + largest).flatten(0, 1)
        ctx.save_for_backward(query, key, value, sinks, out, lse)
        return out

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *gradients: Tensor
    ) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value and sinks."""
        (d_out,) = gradients
        query, key, value, sinks, out, lse = ctx.saved_tensors
        rule: Rule = ctx.rule
        groups = (key.shape[1], query.shape[1] // key.shape[1])
        d_query = torch.empty_like(query)
        # Several tiles add to one key.
        d_key, d_value = (torch.zeros_like(x[0], dtype=lse.dtype) for x in (key, value))
        d_sinks = None if sinks is None else lse.new_zeros(groups)
        drop = _Dropout(rule.dropout, ctx.seed, query.device)
        for tile in tiles(ctx.segments, rule.pattern, query.shape[1], query.device):
            q, k, v = _taken(query, key, value, tile, lse.dtype)
            scores, slope = _scores(q, k, tile, rule)
            total = lse[:, tile.rows].unflatten(0, groups)
            weights = scores.sub_(total[..., None]).exp_()
            d_o, o = (x[0, :, tile.rows].unflatten(0, groups).to(lse.dtype) for x in (d_out, out))
            mean = (d_o * o).sum(-1)  # of the weights' gradient, by the weights
            d_weights = _product(d_o, v.transpose(1, 2))
            kept = drop.factor(weights)
            used = weights
            if kept is not None:
                used, d_weights = weights * kept, d_weights.mul_(kept)
            _add(d_value, tile, _over_queries(used, d_o))
            if d_sinks is not None and sinks is not None:
                d_sinks -= ((_of_heads(sinks.to(lse.dtype), total) - total).exp() * mean).sum(-1)
            d_scores = d_weights.sub_(mean[..., None]).mul_(weights)
            if slope is not None:
                d_scores.mul_(slope)
            d_query[0, :, tile.rows] = _joined(_product(d_scores, k, rule.scale))
            _add(d_key, tile, _over_queries(d_scores, q).mul_(rule.scale))
        if d_sinks is not None and sinks is not None:
            d_sinks = d_sinks.flatten().view_as(sinks).to(sinks.dtype)
        d_key, d_value = d_key[None].to(key.dtype), d_value[None].to(value.dtype)
        return d_query, d_key, d_value, d_sinks, None, None


class _Dropout:
    """The same factors on the weights in the forward and the backward pass."""

    def __init__(self, rate: float, seed: int, device: torch.device):
        self.rate = rate
        self.generator = torch.Generator(device).manual_seed(seed) if rate else None

    def factor(self, weights: Tensor) -> Tensor | None:
        """0 or `1 / (1 - rate)` for each weight; None without dropout."""
        if self.generator is None:
            return None
        drawn = torch.rand(weights.shape, generator=self.generator, device=weights.device)
        return (drawn >= self.rate).to(weights.dtype).div_(1.0 - self.rate)


def _taken(
    query: Tensor, key: Tensor, value: Tensor, tile: _Tile, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """A tile's query `(key heads, group, queries, d)`, and its keys and values `(key heads, keys, d)`."""
    q = query[0, :, tile.rows].unflatten(0, (key.shape[1], -1))
    k, v = (torch.cat([x[0, :, piece] for piece in tile.pieces], dim=1) for x in (key, value))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _scores(q: Tensor, k: Tensor, tile: _Tile, rule: Rule) -> tuple[Tensor, Tensor | None]:
    """Scores `(key heads, group, queries, keys)`, -inf where not seen, and the softcap's slope."""
    scores, slope = _product(q, k.transpose(1, 2), rule.scale / (rule.softcap or 1.0)), None
    if rule.softcap is not None:
        scores = scores.tanh_()
        slope = torch.addcmul(scores.new_ones(()), scores, scores, value=-1.0)
        scores = scores.mul_(rule.softcap)
    for keys, unseen in tile.unseen:
        scores[..., keys].masked_fill_(unseen, -torch.inf)
    return scores, slope


def _product(x: Tensor, matrix: Tensor, factor: float = 1.0) -> Tensor:
    """
    `x` `(key heads, group, queries, n)` times the matrix of its key head, `(key heads, n, m)`, times
    a factor, which costs no pass over the result here.
    """
    flat = x.flatten(1, 2)
    nothing = flat.new_empty(())
    return torch.baddbmm(nothing, flat, matrix, beta=0.0, alpha=factor).unflatten(1, x.shape[1:3])


def _over_queries(weights: Tensor, x: Tensor) -> Tensor:
    """Sum over group and queries of weights times `x`, `(key heads, keys, d)`."""
    return torch.bmm(weights.flatten(1, 2).transpose(1, 2), x.flatten(1, 2))


def _joined(x: Tensor) -> Tensor:
    return x.flatten(0, 1)


def _of_heads(sinks: Tensor, like: Tensor) -> Tensor:
    """Sinks `(heads,)` as `(key heads, group, 1)`."""
    return sinks.flatten().view(*like.shape[:2], 1)


def _add(total: Tensor, tile: _Tile, part: Tensor) -> None:
    begin = 0
    for piece in tile.pieces:
        end = begin + piece.stop - piece.start
        total[:, piece] += part[:, begin:end]
        begin = end
