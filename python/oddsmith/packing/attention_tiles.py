"""Attention over a packed row in tiles of queries and keys, for what no flash kernel computes.

A softcap, a window and a chunk at once, attention sinks on devices other than the CPU and dropout, on any
device. Weights are computed for one tile at a time, in at least float32, and again in the backward pass,
so that memory grows with the row and not with its square.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .attention_cpu import blocks
from .pattern import Pattern, Segments

# Weights of a tile over all heads: three such tensors fit into a processor's second cache. Fewer rows (queries
# times the heads of a key head) or keys would make the products slow.
_TILE_WEIGHTS = 1 << 18
_TILE_ROWS, _FEWEST_KEYS = 256, 128


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

    @property
    def bound(self) -> float:
        """The softcap, or 1 without one."""
        return 1.0 if self.softcap is None else self.softcap


class _Keys(NamedTuple):
    place: slice  # in the sequence
    # Among them those that some query does not see, and for which: (queries, 1, keys) bool, up to two.
    unseen: tuple[tuple[slice, Tensor], ...]


class _Tile(NamedTuple):
    queries: slice  # behind the shared prompt
    keys: tuple[_Keys, ...]


def tiles(
    shared: int, length: int, pattern: Pattern, heads: tuple[int, int], device: torch.device
) -> Iterator[_Tile]:
    """
    The tiles of a sequence: each query is in one of them, with all keys that it sees.

    Args:
        shared (`int`): Position of the first query: keys before it have no queries here.
        length (`int`): Tokens of the sequence.
        pattern ([`~oddsmith.packing.pattern.Pattern`]): Which tokens a token sees.
        heads (`tuple[int, int]`): Key heads, and query heads of each.
        device (`torch.device`): Where masks are needed.
    """
    step = max(1, _TILE_ROWS // heads[1])
    most = max(_FEWEST_KEYS, _TILE_WEIGHTS // (heads[0] * heads[1] * step))
    begin = shared
    while begin < length:
        end = min(begin + step, length)
        if pattern.chunk is not None:
            end = min(end, begin - begin % pattern.chunk + pattern.chunk)
        queries = range(begin, end)
        first = pattern.first_seen(begin)
        count = -(-(end - first) // most)
        ends = [first + (end - first) * i // count for i in range(count + 1)]
        keys = (range(*pair) for pair in pairwise(ends))
        yield _Tile(
            slice(begin - shared, end - shared),
            tuple(
                _Keys(slice(x.start, x.stop), tuple(_edges(pattern, queries, x, device)))
                for x in keys
            ),
        )
        begin = end


def _edges(
    pattern: Pattern, queries: range, keys: range, device: torch.device
) -> Iterator[tuple[slice, Tensor]]:
    """Where a tile needs a mask: before the window of its last query, and behind its first query."""
    last = pattern.first_seen(queries.stop - 1)
    edges = [(keys.start, last), (queries.start + 1, keys.stop)]
    if last > queries.start:  # a window narrower than the tile
        edges = [(keys.start, keys.stop)]
    for begin, end in edges:
        inside = range(max(begin, keys.start), min(end, keys.stop))
        if len(inside):
            place = slice(inside.start - keys.start, inside.stop - keys.start)
            yield place, ~pattern.mask(queries, inside, device)[:, None]


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
        groups = (key.shape[1], heads // key.shape[1])
        # In this layout the model reshapes to (1, N, heads * d) without a copy.
        out = query.new_empty(1, count, heads, value.shape[-1])
        wide = torch.promote_types(query.dtype, torch.float32)
        lse = query.new_empty(groups[0], count, groups[1], dtype=wide)
        ctx.rule, ctx.segments = rule, segments
        # From the state that checkpointing restores before it computes a layer again.
        ctx.seed = int(torch.randint(1 << 62, ())) if rule.dropout else 0
        drop = _Dropout(rule.dropout, ctx.seed, query.device)
        space = _Space(lse)
        for own, prompt in blocks(segments):
            block = _Block.of(query, key, value, own, prompt, rule, wide)
            result = lse.new_empty(*block.query.shape[:2], value.shape[-1])
            for tile in block.tiles(rule.pattern, groups, query.device):
                rows = block.rows(tile)
                q = block.query[:, rows]
                largest, total = _begin(q, sinks, groups)
                part = q.new_zeros(*q.shape[:2], value.shape[-1])
                for keys in tile.keys:
                    scores = _scores(q, block.key[:, keys.place], rule, space)
                    _fill(scores, keys, groups[1], -torch.inf)
                    now = torch.maximum(largest, scores.amax(-1).mul_(rule.bound))
                    weights = _exponentials(scores, now, rule, scores)
                    before = largest.sub_(now).exp_()
                    total.mul_(before).add_(weights.sum(-1))
                    kept = drop.factor(weights)
                    if kept is not None:
                        weights = weights * kept
                    part.mul_(before[..., None]).baddbmm_(weights, block.value[:, keys.place])
                    largest = now
                # Dividing the few sums is less than dividing all weights.
                torch.div(part, total[..., None], out=result[:, rows])
                place = slice(own.start + tile.queries.start, own.start + tile.queries.stop)
                lse[:, place] = total.log_().add_(largest).unflatten(1, (-1, groups[1]))
            # (key heads, queries * group, d_v) to (queries, key heads, group, d_v).
            result = result.unflatten(1, (-1, groups[1])).transpose(0, 1)
            out[0, own].unflatten(1, groups).copy_(result)
        out = out.transpose(1, 2)
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
        # The sequences of a pair add to one key.
        d_key, d_value = (torch.zeros_like(x[0], dtype=lse.dtype) for x in (key, value))
        d_sinks = None if sinks is None else lse.new_zeros(sinks.shape)
        drop = _Dropout(rule.dropout, ctx.seed, query.device)
        space, other, third = (_Space(lse) for _ in range(3))
        for own, prompt in blocks(ctx.segments):
            block = _Block.of(query, key, value, own, prompt, rule, lse.dtype)
            d_o, o = (_by_key_head(x, own, groups, lse.dtype) for x in (d_out, out))
            mean = (d_o * o).sum(-1, keepdim=True)  # of the weights' gradient, by the weights
            sums = lse[:, own].flatten(1, 2)
            if d_sinks is not None and sinks is not None:
                share = (_of_rows(sinks.to(lse.dtype), sums.shape[1], groups) - sums).exp_()
                share = share.mul_(mean[..., 0]).unflatten(1, (-1, groups[1]))
                d_sinks -= share.sum(1).flatten().view_as(d_sinks)
            d_q, d_k, d_v = (torch.zeros_like(x) for x in (block.query, block.key, block.value))
            for tile in block.tiles(rule.pattern, groups, query.device):
                rows = block.rows(tile)
                q, d_result, average, whole = (x[:, rows] for x in (block.query, d_o, mean, sums))
                part = torch.zeros_like(q)
                for keys in tile.keys:
                    k, v = block.key[:, keys.place], block.value[:, keys.place]
                    scores = _scores(q, k, rule, space)
                    target = scores if rule.softcap is None else other.of(scores.shape)
                    weights = _exponentials(scores, whole, rule, target)
                    _fill(weights, keys, groups[1], 0.0)
                    d_weights = third.of(weights.shape)
                    torch.bmm(d_result, v.transpose(1, 2), out=d_weights)
                    kept = drop.factor(weights)
                    used = weights
                    if kept is not None:
                        used, d_weights = weights * kept, d_weights.mul_(kept)
                    d_v[:, keys.place] += torch.bmm(used.transpose(1, 2), d_result)
                    d_scores = d_weights.sub_(average).mul_(weights)
                    if rule.softcap is not None:
                        # Times the softcap's slope, 1 - tanh^2.
                        d_scores.addcmul_(
                            torch.mul(d_scores, scores, out=weights), scores, value=-1
                        )
                    part.baddbmm_(d_scores, k)
                    d_k[:, keys.place] += torch.bmm(d_scores.transpose(1, 2), q)
                d_q[:, rows] = part
            d_q = d_q.mul_(rule.scale).unflatten(1, (-1, groups[1])).transpose(1, 2)
            d_query[0, :, own].unflatten(0, groups).copy_(d_q)
            # The queries were multiplied by the scale and divided by the bound.
            for total, x in ((d_key, d_k.mul_(rule.bound)), (d_value, d_v)):
                if prompt is not None:
                    total[:, prompt] += x[:, : block.shared]
                total[:, own] += x[:, block.shared :]
        if d_sinks is not None and sinks is not None:
            d_sinks = d_sinks.to(sinks.dtype)
        d_key, d_value = d_key[None].to(key.dtype), d_value[None].to(value.dtype)
        return d_query, d_key, d_value, d_sinks, None, None


class _Block(NamedTuple):
    """Queries of a block, and the keys and values that they see, widened, once for all of its tiles."""

    query: Tensor  # (key heads, queries * group, d), times the scale, over the bound
    key: Tensor  # (key heads, keys, d)
    value: Tensor
    shared: int
    group: int

    @classmethod
    def of(
        cls,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        own: slice,
        prompt: slice | None,
        rule: Rule,
        dtype: torch.dtype,
    ) -> _Block:
        group = query.shape[1] // key.shape[1]
        q = _by_key_head(query, own, (key.shape[1], group), dtype) * (rule.scale / rule.bound)
        pieces = (own,) if prompt is None else (prompt, own)
        k, v = (torch.cat([x[0, :, piece] for piece in pieces], 1).to(dtype) for x in (key, value))
        shared = 0 if prompt is None else prompt.stop - prompt.start
        return cls(q, k, v, shared, group)

    def tiles(
        self, pattern: Pattern, heads: tuple[int, int], device: torch.device
    ) -> Iterator[_Tile]:
        return tiles(self.shared, self.key.shape[1], pattern, heads, device)

    def rows(self, tile: _Tile) -> slice:
        return slice(tile.queries.start * self.group, tile.queries.stop * self.group)


class _Space:
    """Memory that is used again for each tile: fresh pages cost as much as a pass over them."""

    def __init__(self, like: Tensor):
        self.memory = like.new_empty(0)

    def of(self, shape: torch.Size | tuple[int, ...]) -> Tensor:
        """A tensor of a shape, with any content."""
        count = torch.Size(shape).numel()
        if self.memory.numel() < count:
            self.memory = self.memory.new_empty(count)
        return self.memory[:count].view(shape)


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


def _by_key_head(x: Tensor, own: slice, groups: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """`(1, heads, N, d)` of a block as `(key heads, queries * group, d)`."""
    return x[0, :, own].unflatten(0, groups).transpose(1, 2).to(dtype).flatten(1, 2)


def _of_rows(sinks: Tensor, rows: int, groups: tuple[int, int]) -> Tensor:
    """Sinks `(heads,)` as `(key heads, queries * group)`."""
    return sinks.flatten().view(groups).repeat(1, rows // groups[1])


def _begin(q: Tensor, sinks: Tensor | None, groups: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The largest score and the sum of the weights before any key: those of the sinks."""
    # Finite, so that no difference of two of them is NaN.
    lowest = torch.finfo(q.dtype).min
    if sinks is None:
        return q.new_full(q.shape[:2], lowest), q.new_zeros(q.shape[:2])
    largest = _of_rows(sinks.to(q.dtype), q.shape[1], groups)
    return largest.clamp_(min=lowest), (largest > lowest).to(q.dtype)


def _scores(q: Tensor, k: Tensor, rule: Rule, space: _Space) -> Tensor:
    """Scores over their bound, `(key heads, queries * group, keys)`."""
    scores = space.of((*q.shape[:2], k.shape[1]))
    torch.bmm(q, k.transpose(1, 2), out=scores)
    return scores if rule.softcap is None else scores.tanh_()


def _exponentials(scores: Tensor, shift: Tensor, rule: Rule, out: Tensor) -> Tensor:
    """`exp(bound * scores - shift)`."""
    return torch.add(shift.neg()[..., None], scores, alpha=rule.bound, out=out).exp_()


def _fill(x: Tensor, keys: _Keys, group: int, value: float) -> None:
    for place, unseen in keys.unseen:
        x.unflatten(1, (-1, group))[..., place].masked_fill_(unseen, value)
