"""NF4 tensors: codes, scales, states, and errors."""

import os
import subprocess
import sys

import pytest
import torch

import reference
from oddsmith import _core, functional
from oddsmith.quant.nf4 import dynamic_map
from oddsmith.quant.state import QuantState
from support.quantized import heavy_tailed, spoilt

BLOCK_SIZES = [32, 64, 128, 256, 512, 1024, 2048, 4096]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(params=[False, True], ids=["slices", "tensor_ops"])
def path(request, tensor_ops_switch):
    tensor_ops_switch(request.param)
    return request.param


def test_a_block_by_hand(path):
    # Scale 2: 1, 0.5 and -0.25 are nearest to codes 15 (1), 12 (0.4407; 0.5626 is further) and 4
    # (-0.2844; -0.1848 is further). The second block has one value, -3, and padding.
    values = torch.zeros(33)
    values[0], values[1], values[2], values[32] = 2.0, 1.0, -0.5, -3.0
    packed, state = functional.quantize_nf4(values, blocksize=32)
    assert state.absmax.tolist() == [2.0, 3.0]
    assert packed.flatten().tolist() == [0xFC, 0x47] + [0x77] * 14 + [0x07]
    back = functional.dequantize_nf4(packed, state)
    assert back[0] == 2.0 and back[32] == -3.0 and not back[3:32].any()
    assert back[1] == state.code[12] * 2


@pytest.mark.parametrize("blocksize", BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_codes_and_values_equal_the_reference(path, dtype, blocksize):
    for shape in [(1,), (2,), (63, 1), (64,), (5, 13), (3, 7, 11), (4097,), (130, 64), (2, 8192)]:
        values = heavy_tailed(*shape, dtype=dtype)
        packed, state = functional.quantize_nf4(values, blocksize)
        truth, scales = reference.quantize_nf4(values, state.code, blocksize)
        assert packed.dtype == torch.uint8 and torch.equal(packed, truth), shape
        assert torch.equal(state.absmax, scales), shape
        assert (state.shape, state.dtype) == (values.shape, dtype)
        assert (state.blocksize, state.quant_type, state.nested) == (blocksize, "nf4", False)
        for out in DTYPES:
            back = functional.dequantize_nf4(packed, state, out)
            wanted = reference.dequantize_nf4(
                packed, scales, state.code, blocksize, values.shape, out
            )
            assert back.dtype == out and torch.equal(back, wanted), (shape, out)
        assert functional.dequantize_nf4(packed, state).dtype == dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strides_do_not_matter(path, dtype):
    whole = heavy_tailed(70, 96, dtype=dtype)
    for view in (whole.t(), whole[::2], whole[:, 5:77], whole[3], whole[:, :1].expand(70, 8)):
        ours, state = functional.quantize_nf4(view, 32)
        same, other = functional.quantize_nf4(view.contiguous(), 32)
        assert torch.equal(ours, same) and torch.equal(state.absmax, other.absmax)
        strided = torch.stack([ours, ours], 2)[..., 0]
        assert not strided.is_contiguous() or len(ours) == 1
        values = functional.dequantize_nf4(strided, state)
        assert torch.equal(values, functional.dequantize_nf4(same, other))


def test_blocks_of_zeros_and_of_tiny_values(path):
    packed, state = functional.quantize_nf4(torch.zeros(70))
    assert state.absmax.tolist() == [0.0, pytest.approx(1e-38)]
    assert packed.unique().tolist() == [0x77]
    assert not functional.dequantize_nf4(packed, state).any()
    packed, state = functional.quantize_nf4(torch.full((64,), -1e-40))
    # Below 1e-38 a scale has no inverse: the codes are those of x / 1e-38, the scale is kept.
    assert state.absmax.tolist() == [pytest.approx(1e-40, rel=1e-3)]
    assert packed.unique().tolist() == [0x77]


def test_empty_tensors(path):
    packed, state = functional.quantize_nf4(torch.empty(0, 5))
    assert packed.shape == (0, 1) and state.absmax.shape == (0,)
    assert functional.dequantize_nf4(packed, state).shape == (0, 5)


def test_nan_and_infinity_stay_in_their_blocks(path):
    values = heavy_tailed(4 * 64 + 10)
    values[70], values[130], values[257] = torch.nan, -torch.inf, torch.inf
    packed, state = functional.quantize_nf4(values)
    assert state.absmax.isfinite().tolist() == [True, False, False, True, False]
    back = functional.dequantize_nf4(packed, state)
    whole = torch.cat([torch.arange(64), torch.arange(192, 256)])
    assert back[whole].isfinite().all()
    assert back[64:128].isnan().all() and back[257].isinf()
    # 0 * inf: as in bitsandbytes, an infinity makes its block NaN.
    assert back[128:192].isfinite().sum() == 0


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_double_quantisation_refuses_nan_and_infinity(path, bad):
    values = heavy_tailed(5, 64)
    values[3, 17] = bad
    with pytest.raises(ValueError, match=r"1 of 5 blocks .* the first at 192\.\.256"):
        functional.quantize_nf4(values, double_quant=True)
    values[3, 17] = 0.0
    functional.quantize_nf4(values, double_quant=True)


def test_double_quantisation_refuses_scales_without_a_mean():
    with pytest.raises(ValueError, match="mean of the scales is inf"):
        functional.quantize_nf4(torch.full((4, 64), 3e38), double_quant=True)


@pytest.mark.parametrize("shape", [(64,), (1000,), (300, 256), (7, 4096)])
def test_double_quantisation_equals_the_reference(path, shape):
    values = heavy_tailed(*shape)
    values.view(-1)[:64] = 0
    plain_packed, plain = functional.quantize_nf4(values)
    packed, state = functional.quantize_nf4(values, double_quant=True)
    assert torch.equal(packed, plain_packed) and state.nested
    assert torch.equal(state.offset, plain.absmax.mean()) and state.offset.dim() == 0
    codes, largest = reference.quantize_blockwise(
        plain.absmax - state.offset, state.state2.code, 256
    )
    assert torch.equal(state.absmax, codes) and state.absmax.dtype == torch.uint8
    assert torch.equal(state.state2.absmax, largest)
    assert (state.state2.blocksize, state.state2.dtype) == (256, torch.float32)
    assert torch.equal(state.state2.code, dynamic_map())
    for dtype in DTYPES:
        back = functional.dequantize_nf4(packed, state, dtype)
        assert torch.equal(back, reference.unpacked(packed, state).to(dtype))
    assert not functional.dequantize_nf4(packed, state).flatten()[:64].any()


def test_blockwise_bytes_round_trip():
    values, code = heavy_tailed(3, 1001), dynamic_map()
    for blocksize in (1, 7, 256, 5000):
        codes, absmax = _core.quantize_blockwise(values, code, blocksize)
        truth, scales = reference.quantize_blockwise(values, code, blocksize)
        assert torch.equal(codes, truth) and torch.equal(absmax, scales)
        spread = absmax.repeat_interleave(blocksize)[: values.numel()].view(values.shape)
        for dtype, name in zip(DTYPES, ("float32", "bfloat16", "float16"), strict=True):
            back = _core.dequantize_blockwise(codes, absmax, code, blocksize, name)
            assert torch.equal(back, (code[codes.long()] * spread).to(dtype))


def test_the_dynamic_maps():
    signed, unsigned = dynamic_map(), dynamic_map(signed=False)
    for values in (signed, unsigned):
        assert values.shape == (256,) and values.dtype == torch.float32
        assert (values.diff() > 0).all()
        assert 0.0 in values and 1.0 in values
    assert signed.min() == pytest.approx(-0.9929687) and unsigned.min() == 0.0
    # The smallest fraction: the middle of 0.1 and 1, six decades down.
    assert signed[signed > 0].min() == pytest.approx(0.55e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_double_quantisation_does_not_depend_on_the_defaults(dtype):
    values = heavy_tailed(3, 1001)
    expected = functional.quantize_nf4(values, double_quant=True)[1]
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            state = functional.quantize_nf4(values, double_quant=True)[1]
    finally:
        torch.set_default_dtype(before)
    assert torch.equal(state.absmax, expected.absmax)
    assert torch.equal(state.state2.code, expected.state2.code)


def test_values_that_need_a_gradient_are_quantised_without_one():
    values = heavy_tailed(64, 2).requires_grad_()
    packed, state = functional.quantize_nf4(values)
    assert not packed.requires_grad and not state.absmax.requires_grad
    with torch.inference_mode():
        same, _ = functional.quantize_nf4(values)
    assert torch.equal(packed, same)


@pytest.mark.parametrize("blocksize", [0, -64, 1, 48, 63, 8192])
def test_other_block_sizes_are_refused(blocksize):
    message = f"quantize_nf4: blocksize is {blocksize}; must be 32, 64, 128, .* or 4096"
    with pytest.raises(ValueError, match=message):
        functional.quantize_nf4(torch.ones(64), blocksize)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8, torch.bool])
def test_other_dtypes_are_refused(dtype):
    message = "tensor has dtype .*; must be float32, bfloat16, float16"
    with pytest.raises(TypeError, match=message):
        functional.quantize_nf4(torch.ones(64).to(dtype))
    packed, state = functional.quantize_nf4(torch.ones(64))
    with pytest.raises(TypeError, match="dtype is .*; must be float32, bfloat16, float16"):
        functional.dequantize_nf4(packed, state, dtype)


SPOILT = [
    ({"shape": torch.Size([5, 130])}, r"packed has shape \[320, 1\]; must be 325 elements"),
    ({"shape": torch.Size([10, 65])}, r"packed has shape"),
    ({"shape": torch.Size([1 << 33, 1 << 33])}, "shape is .*; must be sizes of a tensor"),
    ({"blocksize": 128}, r"absmax has shape \[10\]; must be 5 elements"),
    ({"blocksize": 63}, "blocksize is 63; must be 32"),
    ({"absmax": torch.ones(10)}, "absmax has dtype float32; must be uint8"),
    ({"absmax": torch.zeros(9, dtype=torch.uint8)}, "absmax has shape"),
    ({"nested_absmax": torch.ones(2)}, "nested absmax has shape"),
    ({"nested_absmax": torch.ones(1).half()}, "nested absmax has dtype float16"),
    ({"nested_code": torch.ones(255)}, "nested code has shape"),
    ({"nested_blocksize": 0}, "nested blocksize is 0; must be a positive number"),
    ({"offset": torch.ones(2)}, "offset has shape"),
    ({"quant_type": "fp4"}, "quant_type is 'fp4'; must be \"nf4\""),
    ({"quant_type": "int8"}, "quant_type is 'int8'; must be \"nf4\""),
]


@pytest.mark.parametrize(("changes", "message"), SPOILT)
def test_a_state_that_does_not_fit_is_refused(path, changes, message):
    packed, state = functional.quantize_nf4(heavy_tailed(5, 128), double_quant=True)
    state = spoilt(state, **changes)
    with pytest.raises((ValueError, TypeError), match=message):
        functional.dequantize_nf4(packed, state)
    x = torch.ones(1, 1).expand(1, state.shape[1])
    with pytest.raises((ValueError, TypeError), match=message):
        functional.linear_nf4(x, packed, state)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("shape", "quant_state: shape missing"),
        ("blocksize", "quant_state: blocksize missing"),
        ("dtype", "quant_state: dtype missing"),
        ("offset", "quant_state: state2, its code and blocksize, or offset missing"),
    ],
)
def test_a_state_that_lacks_a_part_is_refused(name, message):
    packed, state = functional.quantize_nf4(torch.ones(64, 64), double_quant=True)
    setattr(state, name, None)
    x = torch.ones(1, 64)
    for use in (
        lambda: functional.dequantize_nf4(packed, state),
        lambda: functional.linear_nf4(x, packed, state),
        state.as_dict,
    ):
        with pytest.raises(ValueError, match=message):
            use()


def test_codes_that_do_not_fit_are_refused(path):
    packed, state = functional.quantize_nf4(heavy_tailed(5, 128))
    with pytest.raises(ValueError, match=r"packed has shape \[319, 1\]; must be 320 elements"):
        functional.dequantize_nf4(packed[:-1], state)
    with pytest.raises(ValueError, match="packed has shape"):
        functional.dequantize_nf4(torch.cat([packed, packed[:1]]), state)
    with pytest.raises(ValueError, match="packed is on meta; must be on the device of absmax, cpu"):
        functional.dequantize_nf4(packed.to("meta"), state)


def test_bytes_may_be_stored_as_floats(path):
    values = heavy_tailed(8, 64)
    packed, state = functional.quantize_nf4(values)
    for dtype in DTYPES:
        stored = packed.view(-1).view(dtype)[:, None]
        back = functional.dequantize_nf4(stored, state)
        assert torch.equal(back, functional.dequantize_nf4(packed, state))


LIMITED = """
import sys, torch
from oddsmith import functional
values, x, expected = torch.load(sys.argv[1])
for dtype, (packed, absmax, back, out) in expected.items():
    ours, state = functional.quantize_nf4(values.to(dtype))
    assert torch.equal(ours, packed) and torch.equal(state.absmax, absmax), dtype
    assert torch.equal(functional.dequantize_nf4(ours, state), back), dtype
    torch.testing.assert_close(functional.linear_nf4(x, ours, state), out, rtol=1e-4, atol=1e-3)
"""


@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_processors_without_the_best_vector_code_get_the_same_bits(capability, tmp_path):
    values, x, expected = heavy_tailed(33, 192), torch.randn(3, 192), {}
    for dtype in DTYPES:
        packed, state = functional.quantize_nf4(values.to(dtype))
        back, out = (
            functional.dequantize_nf4(packed, state),
            functional.linear_nf4(x, packed, state),
        )
        expected[dtype] = packed, state.absmax, back, out
    torch.save((values, x, expected), tmp_path / "expected.pt")
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": capability}
    command = [sys.executable, "-c", LIMITED, str(tmp_path / "expected.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


class TestOperators:
    def test_torch_compile_without_a_graph_break(self):
        values = heavy_tailed(33, 64)

        @torch.compile(fullgraph=True, backend="aot_eager")
        def both(values):
            packed, absmax = torch.ops.oddsmith.quantize_nf4(values, 64)
            state = QuantState(
                absmax, values.shape, blocksize=64, quant_type="nf4", dtype=values.dtype
            )
            return packed, functional.dequantize_nf4(packed, state)

        packed, back = both(values)
        truth, state = functional.quantize_nf4(values)
        assert torch.equal(packed, truth)
        assert torch.equal(back, functional.dequantize_nf4(truth, state))

    @pytest.mark.parametrize("double_quant", [False, True])
    def test_the_operators_keep_torch_s_rules(self, double_quant):
        from oddsmith.quant.nf4 import _dequantize_nf4, _quantize_nf4, scale_arguments

        checks = ("test_schema", "test_faketensor")
        values = heavy_tailed(9, 31)
        torch.library.opcheck(_quantize_nf4, (values, 64), test_utils=checks)
        packed, state = functional.quantize_nf4(values, double_quant=double_quant)
        arguments = packed, *scale_arguments(state), 64, [9, 31], torch.bfloat16
        torch.library.opcheck(_dequantize_nf4, arguments, test_utils=checks)
