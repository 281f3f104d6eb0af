"""Properties of all tensors, block sizes and state files."""

import json

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import reference
from oddsmith import functional
from oddsmith.quant.state import PACKED_KEY, QuantState

# A slow machine is not a failure.
patiently = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])

block_sizes = st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096])
dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
any_float = st.floats(allow_nan=False, allow_infinity=False, width=32)
ordinary = st.floats(-100, 100, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)


@st.composite
def tensors(draw, elements=any_float, most=600):
    """A few drawn values, repeated and scaled over a length that need not fill a block."""
    length = draw(st.integers(1, most))
    seeds = torch.tensor(draw(st.lists(elements, min_size=1, max_size=40)))
    values = seeds.repeat(-(-length // len(seeds)))[:length]
    return values * torch.linspace(1, 0.3, length)


@patiently
@given(tensors(), block_sizes, dtypes)
def test_codes_and_values_equal_the_reference(values, blocksize, dtype):
    values = values.to(dtype).nan_to_num()  # values beyond float16 become its largest
    packed, state = functional.quantize_nf4(values, blocksize)
    truth, scales = reference.quantize_nf4(values, state.code, blocksize)
    assert torch.equal(packed, truth) and torch.equal(state.absmax, scales)
    back = functional.dequantize_nf4(packed, state)
    expected = reference.dequantize_nf4(packed, scales, state.code, blocksize, values.shape, dtype)
    assert torch.equal(back, expected)


@patiently
@given(tensors(ordinary), block_sizes)
def test_no_value_moves_further_than_half_a_gap(values, blocksize):
    packed, state = functional.quantize_nf4(values, blocksize)
    back = functional.dequantize_nf4(packed, state)
    scales = state.absmax.repeat_interleave(blocksize)[: len(values)]
    gap = state.code.diff().max()
    assert ((back - values).abs() <= scales * gap / 2 * (1 + 1e-5)).all()
    largest = values.abs() == scales
    assert torch.equal(back[largest], values[largest]), "the largest of a block is kept"


@patiently
@given(tensors(ordinary), block_sizes)
def test_quantising_again_changes_nothing(values, blocksize):
    packed, state = functional.quantize_nf4(values, blocksize)
    again, other = functional.quantize_nf4(functional.dequantize_nf4(packed, state), blocksize)
    assert torch.equal(again, packed) and torch.equal(other.absmax, state.absmax)


@patiently
@given(tensors(ordinary), st.integers(-20, 20).map(lambda power: 2.0**power))
def test_a_power_of_two_scales_the_scales_alone(values, factor):
    packed, state = functional.quantize_nf4(values)
    scaled, other = functional.quantize_nf4(values * factor)
    assert torch.equal(scaled, packed)
    # A partial block of zeros has the smallest possible scale.
    least = state.absmax < 1e-37
    assert torch.equal(other.absmax, torch.where(least, state.absmax, state.absmax * factor))


@patiently
@given(tensors(ordinary, most=3000), st.integers(0, 20))
def test_whole_blocks_are_independent(values, first):
    """A range of full blocks is quantised and read in the same way as within the tensor."""
    packed, state = functional.quantize_nf4(values)
    start = min(first, len(values) // 64) * 64
    if start == len(values):
        return
    part, other = functional.quantize_nf4(values[start:])
    assert torch.equal(part, packed[start // 2 :])
    assert torch.equal(other.absmax, state.absmax[start // 64 :])
    back = functional.dequantize_nf4(part, other)
    assert torch.equal(back, functional.dequantize_nf4(packed, state)[start:])


@patiently
@given(tensors(ordinary, most=5000))
def test_double_quantisation_moves_scales_by_less_than_a_step(values):
    packed, plain = functional.quantize_nf4(values, 32)
    same, state = functional.quantize_nf4(values, 32, double_quant=True)
    assert torch.equal(packed, same)
    spread = (plain.absmax - plain.absmax.mean()).abs().max()
    moved = (reference.restored_scales(state) - plain.absmax).abs().max()
    # Half the widest gap of the map, and two roundings.
    gap = state.state2.code.diff().max()
    assert moved <= spread * gap / 2 * 1.01 + 1e-5 * plain.absmax.max()


@patiently
@given(
    st.integers(1, 40),
    st.integers(1, 50),
    st.integers(1, 5).map(lambda n: 32 * n) | st.integers(1, 200),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_linear_equals_the_product_with_the_unpacked_weight(tokens, rows, columns, nested, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator).requires_grad_()
    packed, state = functional.quantize_nf4(weight, 32, double_quant=nested)
    out = functional.linear_nf4(x, packed, state)
    full = functional.dequantize_nf4(packed, state).double()
    torch.testing.assert_close(out.double(), x.double() @ full.T, rtol=1e-5, atol=1e-4)
    upstream = torch.randn(tokens, rows, generator=generator)
    (d_x,) = torch.autograd.grad(out, x, upstream)
    torch.testing.assert_close(d_x.double(), upstream.double() @ full, rtol=1e-5, atol=1e-4)


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=6,
)
keys = st.sampled_from(
    "quant_type blocksize dtype shape nested_blocksize nested_dtype nested_offset".split()
)


@patiently
@given(st.dictionaries(keys | st.text(max_size=6), json_values, max_size=3), st.booleans())
def test_a_state_with_other_parts_is_refused_or_read(changes, double_quant):
    """A reader either raises ValueError or returns a state that is written back equally."""
    _, state = functional.quantize_nf4(torch.ones(8, 64), double_quant=double_quant)
    parts = state.as_dict(packed=True)
    plain = json.loads(bytes(parts[PACKED_KEY].tolist())) | changes
    text = json.dumps(plain).encode()
    parts[PACKED_KEY] = torch.tensor(list(text), dtype=torch.uint8)
    try:
        read = QuantState.from_dict(parts)
    except ValueError as error:
        assert str(error).startswith("quant_state: ")
    else:
        again = json.loads(bytes(read.as_dict(packed=True)[PACKED_KEY].tolist()))
        if "nested_offset" in plain:
            assert again.pop("nested_offset") == torch.tensor(float(plain.pop("nested_offset")))
        assert again == plain


@patiently
@given(st.binary(max_size=60))
def test_bytes_that_are_no_state_are_refused(data):
    _, state = functional.quantize_nf4(torch.ones(8, 64))
    parts = state.as_dict(packed=True)
    parts[PACKED_KEY] = torch.tensor(list(data), dtype=torch.uint8)
    try:
        QuantState.from_dict(parts)
    except ValueError as error:
        assert str(error).startswith("quant_state: ")
    else:
        raise AssertionError("no state has so few bytes")
