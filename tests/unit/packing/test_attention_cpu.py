"""Flash attention over a packed row on the CPU: values, gradients, blocks."""

import pytest
import torch

from oddsmith.packing.attention_cpu import PackedFlash, blocks
from oddsmith.packing.pattern import CAUSAL, Pattern
from support.packed_attention import SEGMENTS, TOLERANCE, attention, mask, tensors


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


# The longest sequence of LONGER has 23 tokens: some windows and chunks are in it several times, with and without
# a rest; prompts end within them.
LONGER = ((9, 14, 8), (0, 20, 21), (5, 0, 3))
PATTERNS = (
    CAUSAL,
    *(Pattern(window=size) for size in (1, 2, 3, 4, 7, 9, 10, 22)),
    *(Pattern(chunk=size) for size in (1, 2, 3, 7, 9, 10)),
)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_patterns_and_sinks_are_the_definition(pattern, with_sinks, dtype):
    inputs = tensors(LONGER, dtype)
    if with_sinks:
        inputs.append(torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=dtype))
    inputs = [x.requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    sinks, exact_sinks = (inputs[3], exact[3]) if with_sinks else (None, None)
    out = PackedFlash.apply(*inputs[:3], LONGER, 0.6, pattern, sinks)
    truth = attention(
        *exact[:3], LONGER, 0.6, pattern.window, pattern.chunk, None, exact_sinks
    )  # fmt: skip
    assert out.dtype == dtype and out.transpose(1, 2).is_contiguous()
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(out.double(), truth, rtol=tolerance, atol=tolerance)
    upstream = torch.randn(truth.shape, dtype=torch.float64)
    grads = torch.autograd.grad(out, inputs, upstream.to(dtype))
    true_grads = torch.autograd.grad(truth, exact, upstream)
    for mine, true in zip(grads, true_grads, strict=True):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), true, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("pattern", [Pattern(window=7), Pattern(chunk=7)], ids=str)
def test_bfloat16_is_as_near_as_plain_attention(pattern):
    """Beside float64: not farther than libtorch's attention of the same row with a mask in bfloat16."""
    inputs = [x.requires_grad_() for x in tensors(LONGER, torch.bfloat16)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    out = PackedFlash.apply(*inputs, LONGER, 0.6, pattern, sinks)
    truth = attention(*exact, LONGER, 0.6, pattern.window, pattern.chunk, None, sinks)
    upstream = torch.randn(truth.shape).bfloat16()
    q, k, v = inputs
    scores = q @ k.repeat_interleave(2, 1).transpose(2, 3) * 0.6
    scores = scores.masked_fill(~mask(LONGER, pattern.window, pattern.chunk), -torch.inf)
    scores = torch.cat(
        [scores, sinks.bfloat16()[None, :, None, None].expand(1, 4, len(scores[0, 0]), 1)], -1
    )
    plain = scores.softmax(-1)[..., :-1] @ v.repeat_interleave(2, 1)
    results = [(out, plain, truth)]
    results += zip(
        torch.autograd.grad(out, inputs, upstream),
        torch.autograd.grad(plain, inputs, upstream),
        torch.autograd.grad(truth, exact, upstream.double()),
        strict=True,
    )
    for mine, theirs, true in results:
        assert (mine.double() - true).norm() <= 1.1 * (theirs.double() - true).norm()


def test_sinks_of_any_size():
    for sink in (-1e4, 0.0, 1e4, -torch.inf):
        inputs = [x * 30.0 for x in tensors(SEGMENTS, torch.float64)]
        inputs = [*inputs, torch.tensor([sink, 5.0, -sink if sink > -1e5 else 3.0, 1.0]).double()]
        inputs = [x.requires_grad_() for x in inputs]
        out = PackedFlash.apply(*inputs[:3], SEGMENTS, 0.6, CAUSAL, inputs[3])
        truth = attention(*inputs[:3], SEGMENTS, 0.6, None, None, None, inputs[3])
        torch.testing.assert_close(out, truth, rtol=1e-10, atol=1e-10)
        grads, true_grads = (torch.autograd.grad(x.sum(), inputs) for x in (out, truth))
        torch.testing.assert_close(grads, true_grads, rtol=1e-9, atol=1e-9)
