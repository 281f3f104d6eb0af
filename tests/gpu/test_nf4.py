"""4-bit weights on a GPU: bit-identical to the CPU, and close to bitsandbytes."""

import pytest
import torch
import torch.nn.functional as F

from oddsmith.functional import dequantize_nf4, linear_nf4, quantize_nf4
from oddsmith.nn import Linear4bit
from support.gpu_cases import DTYPES, same, to, weights

SHAPES = [(1, 1), (5, 13), (64,), (63, 64), (130, 70), (3, 5, 7), (257, 128)]
BLOCK_SIZES = [32, 64, 128, 512, 4096]


def parts(packed, state):
    nested = [] if state.state2 is None else [state.state2.absmax, state.state2.code, state.offset]
    return [packed, state.absmax, *nested]


@pytest.mark.parametrize("nested", [False, True], ids=["scales", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", BLOCK_SIZES)
def test_codes_scales_and_values_equal_those_of_slices(gpu, blocksize, dtype, nested):
    for shape in SHAPES:
        values = weights(shape, dtype)
        with gpu.slices():
            expected, state = quantize_nf4(values, blocksize, nested)
            values_back = [dequantize_nf4(expected, state, out) for out in DTYPES]
        packed, ours = quantize_nf4(values.to(gpu.device), blocksize, nested)
        # The mean that double quantisation subtracts is libtorch's own on each device.
        if not nested or gpu.emulated:
            for mine, theirs in zip(parts(packed, ours), parts(expected, state), strict=True):
                assert same(mine, theirs), shape
        back = [dequantize_nf4(*to(gpu.device, expected, state), out) for out in DTYPES]
        assert all(map(same, back, values_back)), shape


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", [3, 69])
def test_a_value_that_is_not_finite_spoils_its_block(gpu, bad, place):
    values = weights((70,), torch.float32)
    values[place] = bad
    with gpu.slices():
        expected, state = quantize_nf4(values)
        back = dequantize_nf4(expected, state)
    packed, ours = quantize_nf4(values.to(gpu.device))
    assert torch.equal(packed.cpu(), expected) and same(ours.absmax, state.absmax)
    assert same(dequantize_nf4(packed, ours), back)


def close(ours, theirs, dtype):
    ours, theirs = ours.cpu().double(), theirs.double()
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert error <= 8 * torch.finfo(dtype).eps, f"{error:.2e}"


@pytest.mark.parametrize("nested", [False, True], ids=["scales", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 2, 5, 70])
def test_products(gpu, tokens, dtype, nested):
    """One token is multiplied directly with the codes, also if rows are not full blocks."""
    for rows, columns in ((40, 128), (33, 96), (70, 130)):
        packed, state = quantize_nf4(weights((rows, columns), dtype), 64, nested)
        generator = torch.Generator().manual_seed(tokens)
        x = torch.randn(tokens, columns, generator=generator).to(dtype)
        bias = torch.randn(rows, generator=generator).to(dtype)
        upstream = torch.randn(tokens, rows, generator=generator).to(dtype)
        with gpu.slices():
            full = dequantize_nf4(packed, state, torch.float32).double()
        out = F.linear(x.double(), full, bias.double())
        on_gpu = to(gpu.device, x, packed, state, bias)
        on_gpu[0].requires_grad_()
        ours = linear_nf4(*on_gpu)
        close(ours.detach(), out, dtype)
        with torch.no_grad():
            close(linear_nf4(*on_gpu), out, dtype)
        (gradient,) = torch.autograd.grad(ours, on_gpu[0], upstream.to(gpu.device))
        close(gradient, upstream.double() @ full, dtype)


def test_the_layer(gpu):
    linear = torch.nn.Linear(96, 40, dtype=torch.bfloat16)
    with gpu.slices():
        expected = Linear4bit.from_linear(linear)
    layer = Linear4bit.from_linear(linear).to(gpu.device)
    assert torch.equal(layer.weight.cpu(), expected.weight)
    x = torch.randn(3, 7, 96, generator=torch.Generator().manual_seed(1)).bfloat16()
    with gpu.slices():
        out = expected(x)
    close(layer(x.to(gpu.device)).detach(), out.detach().float(), torch.bfloat16)
    moved = layer.to("cpu")
    assert torch.equal(moved.weight, expected.weight)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("blocksize", [64, 256])
def test_bitsandbytes_on_the_gpu(dtype, blocksize):
    if not torch.cuda.is_available():
        pytest.skip("torch finds no CUDA device")
    peer = pytest.importorskip("bitsandbytes.functional")
    values = torch.randn(512, 1024, generator=torch.Generator().manual_seed(2)).to(dtype).cuda()
    packed, state = quantize_nf4(values, blocksize)
    codes, other = peer.quantize_4bit(values, blocksize=blocksize, quant_type="nf4")
    assert torch.equal(state.absmax, other.absmax)
    # Built with fast math, it may choose the neighbour for a value next to a midpoint.
    ours, theirs = (torch.stack([x >> 4, x & 15]).int() for x in (packed, codes.view_as(packed)))
    assert (ours - theirs).abs().max() <= 1 and (ours != theirs).float().mean() < 1e-4
    for out in DTYPES:
        other.dtype = out
        assert same(dequantize_nf4(codes, state, out), peer.dequantize_4bit(codes, other))
