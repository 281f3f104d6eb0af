"""NF4 against bitsandbytes, bit for bit.

bitsandbytes 0.50.2 has two implementations on a CPU. The plain one defines the format. The one with
AVX-512 reads wrong scales if rows are not full blocks, and flushes subnormal values of bfloat16: it
is compared only in other cases.
"""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load, save

from oddsmith import functional
from oddsmith.nn import Linear4bit, Params4bit
from oddsmith.quant.nf4 import dynamic_map
from oddsmith.quant.state import QuantState
from support.bitsandbytes_rounding import stepped_codes

bnb = pytest.importorskip("bitsandbytes", reason="the peer is not installed")
peer = pytest.importorskip("bitsandbytes.functional")

BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Odd, partial, less than a block, full; for odd last dimensions bitsandbytes takes another path.
SHAPES = [(1, 2), (5, 13), (63,), (64, 64), (1, 4097), (130, 70), (33, 4096), (3, 5, 7), (257, 8)]


@pytest.fixture(autouse=True)
def eager():
    """bitsandbytes compiles its fallback for every shape; the values are the same."""
    with torch.compiler.set_stance("force_eager"):
        yield


def weights(shape, dtype, seed=5, specks=True):
    """Values over four decades; with a block of zeros, exact ties and codes."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(shape, generator=generator) * 4 - 3
    values = torch.randn(shape, generator=generator) * 10**size
    flat = values.view(-1)
    code = functional.quantize_nf4(torch.ones(1))[1].code
    midpoints = (code[1:] + code[:-1]) / 2
    exact = torch.cat([torch.ones(1), code, midpoints])
    flat[64:128] = 0
    flat[128 : 128 + len(exact)] = exact[: max(len(flat) - 128, 0)]
    if specks:
        flat[192:256] = 1e-39
    return values.to(dtype)


def same(ours, theirs):
    """Equal bits, NaN for NaN."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    return torch.equal(ours.isnan(), theirs.isnan()) and torch.equal(
        ours.nan_to_num(), theirs.nan_to_num()
    )


def theirs_of(values, blocksize=64, nested=False):
    return peer.quantize_4bit(
        values, blocksize=blocksize, compress_statistics=nested, quant_type="nf4"
    )


def their_values(codes, state, dtype=None):
    """By the plain implementation, which is used for odd last dimensions."""
    parts = state.as_dict()
    column = peer.QuantState.from_dict({**parts, "shape": (state.shape.numel(), 1)}, codes.device)
    column.dtype = dtype or state.dtype
    return peer.dequantize_4bit(codes, column).reshape(state.shape)


def their_kernel_s_values(codes, state, dtype=None):
    assert state.shape[-1] % state.blocksize == 0
    state = peer.QuantState.from_dict(state.as_dict(), codes.device)
    state.dtype = dtype or state.dtype
    return peer.dequantize_4bit(codes, state).reshape(state.shape)


@pytest.mark.parametrize("blocksize", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_scales_and_values_are_bit_equal(dtype, blocksize):
    for shape in SHAPES:
        values = weights(shape, dtype)
        packed, state = functional.quantize_nf4(values, blocksize)
        codes, other = theirs_of(values, blocksize)
        assert torch.equal(packed, codes) and packed.shape == codes.shape, shape
        assert same(state.absmax, other.absmax), shape
        assert torch.equal(state.code, other.code)
        assert (state.shape, state.dtype, state.blocksize) == (
            other.shape,
            other.dtype,
            other.blocksize,
        )
        for out in DTYPES:
            back = functional.dequantize_nf4(packed, state, out)
            assert same(back, their_values(codes, other, out)), (shape, out)


@pytest.mark.parametrize("nested", [False, True], ids=["scales", "nested"])
@pytest.mark.parametrize("blocksize", BLOCK_SIZES)
def test_values_are_bit_equal_to_their_kernel(blocksize, nested):
    values = weights((33, 8192), torch.float32, specks=False)
    codes, other = theirs_of(values, blocksize, nested)
    state = QuantState.from_dict(other.as_dict())
    for out in DTYPES:
        back = functional.dequantize_nf4(codes, state, out)
        assert same(back, their_kernel_s_values(codes, other, out)), out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", [64, 70, 4096 + 33])
def test_zeros_nan_and_infinity_are_as_theirs(dtype, length):
    cases = [torch.zeros(length, dtype=dtype)]
    for bad in (torch.nan, torch.inf, -torch.inf):
        for place in (3, length - 1):
            cases.append(weights((length,), dtype))
            cases[-1][place] = bad
    for values in cases:
        packed, state = functional.quantize_nf4(values)
        codes, other = theirs_of(values)
        assert torch.equal(packed, codes) and same(state.absmax, other.absmax)
        back = functional.dequantize_nf4(packed, state)
        assert same(back, their_values(codes, other))


def test_strided_tensors_are_as_theirs():
    whole = weights((130, 96), torch.float32)
    for view in (whole.t(), whole[::3], whole[:, 7:], whole[:1].expand(50, 96)):
        packed, state = functional.quantize_nf4(view)
        codes, other = theirs_of(view)
        assert torch.equal(packed, codes) and torch.equal(state.absmax, other.absmax)


def test_dynamic_maps_are_theirs():
    for signed in (True, False):
        assert torch.equal(dynamic_map(signed), peer.create_dynamic_map(signed=signed))


def quantize_with_their_codes(values, blocksize):
    """Double quantisation, with the codes of scales that their table has."""
    packed, state = functional.quantize_nf4(values, blocksize, double_quant=True)
    _, plain = functional.quantize_nf4(values, blocksize)
    state.absmax, largest = stepped_codes(plain.absmax - state.offset, state.state2.code)
    assert torch.equal(largest, state.state2.absmax)
    return packed, state


@pytest.mark.parametrize("blocksize", [64, 256])
@pytest.mark.parametrize("shape", [(64,), (65, 64), (300, 256), (1000, 333), (512, 2048)])
def test_nested_codes_but_for_the_table_are_theirs(shape, blocksize):
    values = weights(shape, torch.bfloat16)
    packed, state = quantize_with_their_codes(values, blocksize)
    codes, other = theirs_of(values, blocksize, nested=True)
    assert torch.equal(packed, codes)
    assert torch.equal(state.offset, other.offset) and torch.equal(state.absmax, other.absmax)
    assert torch.equal(state.state2.absmax, other.state2.absmax)
    assert torch.equal(state.state2.code, other.state2.code)
    ours, theirs = state.as_dict(packed=True), other.as_dict(packed=True)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for out in DTYPES:
        back = functional.dequantize_nf4(packed, state, out)
        assert same(back, their_values(codes, other, out))


def test_our_own_nested_codes_are_no_further_off():
    """The nearest codes and the table of 65,536 steps, on scales of typical weights."""
    values = weights((4096, 256), torch.float32)
    packed, plain = functional.quantize_nf4(values)
    _, ours = functional.quantize_nf4(values, double_quant=True)
    _, theirs = quantize_with_their_codes(values, 64)
    truth = functional.dequantize_nf4(packed, plain)
    error, other = (
        (functional.dequantize_nf4(packed, state) - truth).abs().mean() for state in (ours, theirs)
    )
    assert error <= other


def their_layer(weight, bias, nested=True, compute_dtype=None):
    rows, columns = weight.shape
    layer = bnb.nn.Linear4bit(
        columns, rows, bias=bias is not None, compute_dtype=compute_dtype, quant_type="nf4"
    )
    layer.weight = bnb.nn.Params4bit(
        weight.clone(),
        requires_grad=False,
        compress_statistics=nested,
        quant_type="nf4",
        module=layer,
    )
    if bias is not None:
        layer.bias = torch.nn.Parameter(bias.clone())
    return layer.to("cpu")


def our_layer(weight, bias, **options):
    linear = torch.nn.Linear(*weight.shape[::-1], bias=bias is not None, dtype=weight.dtype)
    linear.weight = torch.nn.Parameter(weight.clone())
    if bias is not None:
        linear.bias = torch.nn.Parameter(bias.clone())
    return Linear4bit.from_linear(linear, **options)


def entries_of(layer):
    return {name: entry.clone() for name, entry in layer.state_dict().items()}


@pytest.mark.parametrize("nested", [False, True], ids=["scales", "nested"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
class TestCheckpoints:
    def layers(self, dtype, nested):
        weight, bias = weights((40, 192), dtype, specks=False), weights((40,), dtype)
        theirs = their_layer(weight, bias, nested)
        return our_layer(weight, bias, compress_statistics=nested), theirs

    def test_keys_dtypes_and_shapes_are_theirs(self, dtype, nested):
        ours, theirs = map(entries_of, self.layers(dtype, nested))
        assert ours.keys() == theirs.keys() and len(ours) == (7 if nested else 5)
        for name, entry in theirs.items():
            assert (ours[name].dtype, ours[name].shape) == (entry.dtype, entry.shape), name
        if not nested:
            assert all(torch.equal(ours[name], theirs[name]) for name in theirs)

    def test_loading_theirs_and_saving_is_byte_equal(self, dtype, nested):
        _, theirs = self.layers(dtype, nested)
        before = save(entries_of(theirs))
        ours = Linear4bit(192, 40).to(dtype)
        ours.load_state_dict(load(before))
        assert save(entries_of(ours)) == before

    def test_they_load_ours(self, dtype, nested):
        ours, _ = self.layers(dtype, nested)
        entries = entries_of(ours)
        weight = entries.pop("weight")
        parts = {k.removeprefix("weight."): v for k, v in entries.items() if k != "bias"}
        taken = bnb.nn.Params4bit.from_prequantized(weight, dict(parts), device="cpu")
        back = their_kernel_s_values(taken.data, taken.quant_state)
        assert torch.equal(back, functional.dequantize_nf4(ours.weight, ours.quant_state))
        again = taken.quant_state.as_dict(packed=True)
        assert again.keys() == parts.keys()
        assert all(torch.equal(again[name], parts[name]) for name in parts)

    def test_our_parameter_loads_theirs(self, dtype, nested):
        _, theirs = self.layers(dtype, nested)
        entries = {k: v for k, v in entries_of(theirs).items() if k.startswith("weight.")}
        taken = Params4bit.from_prequantized(theirs.weight.data, entries, device="cpu")
        assert (taken.blocksize, taken.compress_statistics) == (64, nested)
        back = functional.dequantize_nf4(taken, taken.quant_state)
        state = theirs.weight.quant_state
        assert torch.equal(back, their_kernel_s_values(theirs.weight.data, state))

    def test_unpacked_parts_of_theirs(self, dtype, nested):
        _, theirs = self.layers(dtype, nested)
        state = QuantState.from_dict(theirs.weight.quant_state.as_dict(), "cpu")
        parts, others = state.as_dict(packed=True), theirs.weight.quant_state.as_dict(packed=True)
        assert all(torch.equal(parts[name], others[name]) for name in others)


@pytest.mark.parametrize("storage", DTYPES, ids=str)
def test_other_storage_holds_the_same_bytes(storage):
    weight = weights((16, 64), torch.float32)
    ours = our_layer(weight, None, quant_storage=storage, compress_statistics=False)
    codes, _ = peer.quantize_4bit(weight, quant_type="nf4", quant_storage=storage)
    assert ours.weight.dtype == codes.dtype and ours.weight.shape == codes.shape
    assert torch.equal(ours.weight.data.view(torch.uint8), codes.view(torch.uint8))


def outcome(layer, x, upstream):
    x = x.detach().clone().requires_grad_()
    out = layer(x)
    gradients = torch.autograd.grad(out, [x, layer.bias], upstream)
    return [tensor.detach().double() for tensor in (out, *gradients)]


@pytest.mark.parametrize("tokens", [1, 3, 50])
@pytest.mark.parametrize("compute_dtype", [None, *DTYPES], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_is_no_further_from_the_truth_than_theirs(dtype, compute_dtype, tokens):
    """Truth in float64 from the same codes; two last places of the dtype for the order of sums."""
    torch.manual_seed(2)
    weight, bias = torch.randn(72, 320).to(dtype) * 0.1, torch.randn(72).to(dtype)
    ours = our_layer(weight, bias, compute_dtype=compute_dtype, compress_statistics=False)
    theirs = their_layer(weight, bias, False, compute_dtype)
    assert torch.equal(ours.weight, theirs.weight)
    x, upstream = torch.randn(tokens, 320).to(dtype), torch.randn(tokens, 72).to(dtype)
    full = functional.dequantize_nf4(ours.weight, ours.quant_state, torch.float32).double()
    wide = x.double().requires_grad_()
    out = F.linear(wide, full, bias.double())
    truth = [out, *torch.autograd.grad(out, wide, upstream.double()), upstream.double().sum(0)]
    results = zip(outcome(ours, x, upstream), outcome(theirs, x, upstream), truth, strict=True)
    dtypes = (dtype, compute_dtype or dtype)
    tolerance = 2 * max(torch.finfo(d).eps for d in dtypes)
    for mine, other, true in results:
        scale = true.abs().max()
        error, peer_error = ((value - true).abs().max() / scale for value in (mine, other))
        assert error <= peer_error + tolerance, f"{error} against {peer_error}"
