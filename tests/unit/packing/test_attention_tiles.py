"""Attention in tiles of queries: softcap, sinks, windows, chunks, widths; values and gradients."""

import math

import pytest
import torch

from oddsmith.packing import attention_tiles
from oddsmith.packing.attention_tiles import PackedTiles, Rule, tiles
from oddsmith.packing.pattern import CAUSAL, Pattern
from support.packed_attention import SEGMENTS, TOLERANCE, attention, tensors

# Shorter than the prompts, ending within them and within the answers.
PATTERNS = (
    CAUSAL,
    Pattern(window=1),
    Pattern(window=3),
    Pattern(chunk=2),
    Pattern(chunk=3),
    Pattern(2, 5),
)


def size_of(place):
    return place.stop - place.start


def close(mine, true, tolerance):
    torch.testing.assert_close(mine.double(), true.double(), rtol=tolerance, atol=tolerance)


@pytest.fixture(params=[(4, 3), (8, 2), (256, 128)], ids=str)
def sizes(request, monkeypatch):
    """Tiles of few queries and keys, and of whole blocks."""
    rows, keys = request.param
    monkeypatch.setattr(attention_tiles, "_TILE_WEIGHTS", 1)
    monkeypatch.setattr(attention_tiles, "_TILE_ROWS", rows)
    monkeypatch.setattr(attention_tiles, "_FEWEST_KEYS", keys)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_values_and_gradients_are_those_of_the_definition(
    pattern, softcap, with_sinks, dtype, sizes
):
    inputs = tensors(SEGMENTS, dtype, value_width=5)
    if with_sinks:
        inputs.append(torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=dtype))
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v, sinks = (*inputs, None)[:4]
    out = PackedTiles.apply(q, k, v, sinks, SEGMENTS, Rule(pattern, 0.6, softcap))
    truth = attention(
        *exact[:3],
        SEGMENTS,
        0.6,
        pattern.window,
        pattern.chunk,
        softcap,
        exact[3] if with_sinks else None,
    )
    assert out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    close(out, truth, tolerance)
    upstream = torch.randn(truth.shape, dtype=torch.float64)
    grads = torch.autograd.grad(out, inputs, upstream.to(dtype))
    true_grads = torch.autograd.grad(truth, exact, upstream)
    for mine, true in zip(grads, true_grads, strict=True):
        assert mine.dtype == dtype
        close(mine, true, tolerance)


def test_bfloat16_is_rounded_once():
    inputs = [*tensors(SEGMENTS, torch.bfloat16), torch.tensor([0.5, -1.0, 2.0, 0.0])]
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    q, k, v, sinks = inputs
    rule = Rule(Pattern(window=3), 0.6, 2.0)
    out = PackedTiles.apply(q, k, v, sinks, SEGMENTS, rule)
    truth = attention(*exact[:3], SEGMENTS, 0.6, 3, None, 2.0, exact[3])
    # Half a unit in the last of 8 bits.
    assert ((out.double() - truth).abs() <= 2**-8 * truth.abs() + 1e-6).all()
    upstream = torch.randn(truth.shape).bfloat16()
    grads = torch.autograd.grad(out, inputs, upstream)
    true_grads = torch.autograd.grad(truth, exact, upstream.double())
    assert [g.dtype for g in grads] == [x.dtype for x in inputs]
    for mine, true in zip(grads, true_grads, strict=True):
        assert (mine.double() - true).norm() <= 0.01 * true.norm()


def test_dropout_is_the_same_in_both_passes():
    inputs = [x.requires_grad_() for x in tensors(SEGMENTS, torch.float64)]
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)

    def run(*x):
        torch.manual_seed(7)  # the same weights are dropped in each call
        return PackedTiles.apply(*x, SEGMENTS, Rule(Pattern(window=3), 0.6, 2.0, 0.4))

    assert torch.autograd.gradcheck(run, [*inputs, sinks], fast_mode=True)


def test_dropout_keeps_the_expected_value():
    q, k, v = tensors(((0, 40, 40),), torch.float64)
    v = torch.ones_like(v)
    torch.manual_seed(0)
    rule = Rule(CAUSAL, 0.01, None, 0.25)
    outs = torch.stack([PackedTiles.apply(q, k, v, None, ((0, 40, 40),), rule) for _ in range(20)])
    assert outs.std() > 0.05
    # The mean of 20 * 4 * 80 sums of weights, each of which is expected to be 1.
    assert abs(outs[..., 0].mean() - 1.0) < 0.02


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_each_query_is_in_one_tile_with_all_that_it_sees(pattern, sizes):
    for shared, length in ((0, 1), (0, 9), (4, 6), (5, 12)):
        found = torch.zeros(length, length, dtype=torch.int64)
        for tile in tiles(shared, length, pattern, (2, 2), torch.device("cpu")):
            for keys in tile.keys:
                seen = torch.ones(size_of(tile.queries), 1, size_of(keys.place), dtype=torch.bool)
                for place, unseen in keys.unseen:
                    seen[..., place] &= ~unseen
                queries = slice(shared + tile.queries.start, shared + tile.queries.stop)
                found[queries, keys.place] += seen[:, 0].long()
        mask = pattern.mask(range(shared, length), range(length), torch.device("cpu"))
        assert torch.equal(found[shared:], mask.long()) and not found[:shared].any()


@pytest.mark.parametrize("length", [700, 1 << 14])
def test_memory_grows_with_the_row_and_not_with_its_square(length):
    for heads in ((2, 4), (8, 1), (1, 48)):
        found = tiles(0, length, CAUSAL, heads, torch.device("cpu"))
        largest = max(
            math.prod(heads) * size_of(tile.queries) * size_of(keys.place)
            for tile in found
            for keys in tile.keys
        )
        assert largest <= attention_tiles._TILE_WEIGHTS


def test_low_precision_tolerances_are_those_of_the_flash_kernels():
    q, k, v = tensors(SEGMENTS, torch.bfloat16)
    out = PackedTiles.apply(q, k, v, None, SEGMENTS, Rule(CAUSAL, 0.6))
    close(out, attention(q, k, v, SEGMENTS, 0.6), TOLERANCE[torch.bfloat16])


def test_scores_and_sinks_of_any_size():
    """The sums of the weights neither overflow nor vanish."""
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-12)):
        for sink in (-1e4, 0.0, 1e4, -torch.inf):
            inputs = [x * 30.0 for x in tensors(SEGMENTS, dtype)]
            inputs = [*inputs, torch.tensor([sink, 5.0, -max(sink, -1e4), 1.0], dtype=dtype)]
            inputs = [x.requires_grad_() for x in inputs]
            exact = [x.detach().double().requires_grad_() for x in inputs]
            out = PackedTiles.apply(*inputs, SEGMENTS, Rule(CAUSAL, 0.6))
            truth = attention(*exact[:3], SEGMENTS, 0.6, None, None, None, exact[3])
            close(out, truth, tolerance * 30)
            (mine,) = torch.autograd.grad(out.sum(), inputs[2])
            (true,) = torch.autograd.grad(truth.sum(), exact[2])
            close(mine, true, tolerance)
