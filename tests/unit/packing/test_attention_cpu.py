"""Flash attention over a packed row on the CPU: values, gradients, blocks."""

import pytest
import torch

from oddsmith.packing.attention_cpu import PackedFlash, blocks
from support.packed_attention import SEGMENTS, TOLERANCE, attention, tensors


@pytest.mark.parametrize("heads", [(3, 3), (6, 2)])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_flash_has_the_gradient_of_its_value(heads, scale):
    segments = ((3, 2, 1), (0, 1, 3), (2, 0, 1), (1, 2, 0))
    count = sum(map(sum, segments))
    torch.manual_seed(3)
    shapes = [(1, heads[0], count, 3)] + 2 * [(1, heads[1], count, 3)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(lambda *x: PackedFlash.apply(*x, segments, scale), inputs)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_flash_is_the_definition(dtype):
    q, k, v = tensors(SEGMENTS, dtype)
    out = PackedFlash.apply(q, k, v, SEGMENTS, 0.6)
    truth = attention(q, k, v, SEGMENTS, 0.6)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), truth, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])
    # The model's reshape to (1, N, heads * d) needs no copy.
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_low_precision_are_those_of_the_definition(dtype):
    inputs = [x.requires_grad_() for x in tensors(SEGMENTS, dtype)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    upstream = torch.randn(inputs[0].shape, dtype=torch.float64)
    out = PackedFlash.apply(*inputs, SEGMENTS, 0.6)
    grads = torch.autograd.grad(out, inputs, upstream.to(dtype))
    true_grads = torch.autograd.grad(attention(*exact, SEGMENTS, 0.6), exact, upstream)
    tolerance = 1e-5 if dtype == torch.float32 else 5e-2
    for mine, true in zip(grads, true_grads, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), true, rtol=tolerance, atol=tolerance)


def test_blocks_by_hand():
    # A pair with a shared prompt, one without, one whose rejected answer is empty.
    assert list(blocks(((4, 3, 2), (0, 2, 5), (2, 4, 0)))) == [
        (slice(0, 7), None),
        (slice(7, 9), slice(0, 4)),
        (slice(9, 11), None),
        (slice(11, 16), None),
        (slice(16, 22), None),
    ]
    # The rest of the chosen sequence is empty, so there is no block for it.
    assert list(blocks(((0, 0, 3),))) == [(slice(0, 3), None)]
