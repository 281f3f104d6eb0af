"""Attention block by block with libtorch's kernels."""

import pytest
import torch

from oddsmith.packing.attention_blocks import packed_blocks
from oddsmith.packing.pattern import CAUSAL, Pattern
from support.packed_attention import SEGMENTS, TOLERANCE, attention, tensors


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("pattern", [CAUSAL, Pattern(window=3), Pattern(chunk=3)], ids=str)
def test_blocks_are_the_definition(dtype, pattern):
    q, k, v = tensors(SEGMENTS, dtype)
    out = packed_blocks(q, k, v, SEGMENTS, pattern, 0.6, 0.0)
    truth = attention(q, k, v, SEGMENTS, 0.6, pattern.window, pattern.chunk)
    torch.testing.assert_close(out.double(), truth, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_dropout():
    q, k, v = tensors(SEGMENTS, torch.float32)
    torch.manual_seed(0)
    dropped = packed_blocks(q, k, v, SEGMENTS, CAUSAL, 0.6, 0.5)
    assert not torch.allclose(dropped, packed_blocks(q, k, v, SEGMENTS, CAUSAL, 0.6, 0.0))
