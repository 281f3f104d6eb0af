"""The kernels of kernels/nf4.cu on the emulated GPU, compared with the slice algorithms."""

import pytest
import torch

from oddsmith import _core
from oddsmith.functional import dequantize_nf4, linear_nf4, quantize_nf4
from oddsmith.quant.arguments import NestedScales, PackedWeight
from support.slices import DTYPES, at_a_page_s_end, same_bits, slices

pytestmark = pytest.mark.usefixtures("emulated_driver")

NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}


def values(count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, generator=generator) * 0.3).to(dtype)


def kernels(driver) -> list[str]:
    return [launch.kernel for launch in driver.launches()]


# ---- quantise ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("count", [0, 1, 2, 31, 63, 64, 65, 1003, 4097, 8192])
def test_codes_and_scales_equal_the_cpu(dtype, blocksize, count, emulated_driver):
    x = values(count, dtype)
    packed, state = quantize_nf4(x, blocksize)
    assert kernels(emulated_driver) == ([f"nf4_quantize_{NAMES[dtype]}"] if count else [])
    with slices():
        expected_packed, expected = quantize_nf4(x, blocksize)
    assert same_bits(packed, expected_packed)
    assert same_bits(state.absmax, expected.absmax)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_of_every_kind(dtype, emulated_driver):
    """Zeros, NaN, infinities, the smallest and the largest numbers; full blocks, and a partial
    one."""
    tiny, huge = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    specials = [0.0, -0.0, float("nan"), float("inf"), float("-inf"), tiny, -tiny / 4, huge, -huge]
    for special in specials:
        for base in (torch.zeros(77), values(77, torch.float32)):
            x = base.to(dtype)
            x[[3, 70]] = special
            with emulated_driver.reversed():
                packed, state = quantize_nf4(x, 32)
            with slices():
                expected_packed, expected = quantize_nf4(x, 32)
            assert same_bits(packed, expected_packed), special
            assert same_bits(state.absmax, expected.absmax), special
            back = dequantize_nf4(packed, state)
            with slices():
                assert same_bits(back, dequantize_nf4(packed, state)), special


def test_ties_go_down():
    code = _core.nf4_code()
    middles = (code[1:].double() + code[:-1].double()).div(2).float()
    around = [middles, middles.nextafter(torch.tensor(2.0)), middles.nextafter(torch.tensor(-2.0))]
    x = torch.cat([torch.ones(1), *around, torch.zeros(18)])  # the value one makes the scale one
    packed, _ = quantize_nf4(x, 64)
    codes = torch.stack([packed >> 4, packed & 15], -1).flatten()
    assert codes[1:46].tolist() == [*range(15), *range(1, 16), *range(15)]


def test_a_partial_block_is_divided():
    """By its scale; a full block is multiplied by the inverse, which rounds differently."""
    middles = (_core.nf4_code()[1:] + _core.nf4_code()[:-1]) / 2
    generator = torch.Generator().manual_seed(3)
    differ = 0
    for scale in torch.rand(40, generator=generator) + 0.5:
        around = middles * scale
        partial = torch.cat([scale[None], around, around.nextafter(torch.zeros(()))])
        whole = torch.cat([partial, torch.zeros(1)])
        packed, _ = quantize_nf4(partial, 32)
        packed_whole, _ = quantize_nf4(whole, 32)
        differ += not torch.equal(packed[:15], packed_whole[:15])
        with slices():
            assert torch.equal(packed, quantize_nf4(partial, 32)[0])
            assert torch.equal(packed_whole, quantize_nf4(whole, 32)[0])
    assert differ > 5


# ---- dequantise ----


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("count", [0, 1, 7, 9, 64, 1003, 8192, 20_001])
def test_values_equal_the_cpu(dtype, double_quant, count, emulated_driver):
    with slices():
        packed, state = quantize_nf4(values(count, torch.float32), 64, double_quant)
        expected = dequantize_nf4(packed, state, dtype)
    with emulated_driver.reversed():
        ours = dequantize_nf4(packed, state, dtype)
    assert kernels(emulated_driver) == ([f"nf4_dequantize_{NAMES[dtype]}"] if count else [])
    assert same_bits(ours, expected)


@pytest.mark.parametrize("blocksize", [32, 64, 128, 512, 4096])
def test_every_block_size(blocksize):
    with slices():
        packed, state = quantize_nf4(values(9000, torch.bfloat16), blocksize)
        expected = dequantize_nf4(packed, state)
    assert same_bits(dequantize_nf4(packed, state), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_at_odd_addresses(dtype):
    with slices():
        packed, state = quantize_nf4(values(1000, torch.float32), 64)
        expected = dequantize_nf4(packed, state, dtype)
    for offset in (1, 2, 3):
        shifted = torch.cat([packed.new_zeros(offset, 1), packed])[offset:]
        assert shifted.data_ptr() % 4 == offset
        assert same_bits(dequantize_nf4(shifted, state, dtype), expected)


@pytest.mark.parametrize("nested_blocksize", [1, 3, 8, 256, 1000])
def test_any_nested_block_size(nested_blocksize):
    blocks = 40
    generator = torch.Generator().manual_seed(1)
    packed = torch.randint(0, 256, (blocks * 16,), dtype=torch.uint8, generator=generator)
    codes = torch.randint(0, 256, (blocks,), dtype=torch.uint8, generator=generator)
    absmax = torch.rand(-(-blocks // nested_blocksize), generator=generator)
    nested = NestedScales(
        absmax, torch.linspace(-1, 1, 256), torch.tensor([0.37]), nested_blocksize
    )
    arguments = PackedWeight(packed, codes, nested, 32), [blocks, 32], "bfloat16"
    ours = _core.dequantize_nf4(*arguments)
    with slices():
        assert same_bits(ours, _core.dequantize_nf4(*arguments))


# ---- the linear layer ----


def layer(rows: int, columns: int, double_quant: bool, dtype: torch.dtype):
    with slices():
        packed, state = quantize_nf4(values(rows * columns, dtype), 64, double_quant)
        state.shape = torch.Size([rows, columns])
        return packed, state, dequantize_nf4(packed, state, torch.float32).double()


def near(ours: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias=None) -> bool:
    """Within the rounding of weight, result and sums of the true product."""
    x = x.double()
    truth = x @ weight.T
    size = x.abs() @ weight.abs().T
    if bias is not None:
        truth, size = truth + bias.double(), size + bias.double().abs()
    eps = torch.finfo(ours.dtype).eps
    return bool(
        ((ours.double() - truth).abs() <= eps * truth.abs() + (eps / 2 + 1e-6) * size).all()
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("tokens", range(1, 10))
def test_products_of_a_few_tokens(dtype, double_quant, tokens, emulated_driver):
    packed, state, weight = layer(37, 328, double_quant, dtype)
    x, bias = values(tokens * 328, dtype, 1).view(tokens, 328), values(37, dtype, 2)
    ours = linear_nf4(x, packed, state, bias)
    width = {1: 1, 2: 4, 3: 4, 4: 4}.get(tokens, 8)
    expected = "nf4_dequantize" if tokens > 8 else f"nf4_multiply{width}"
    assert kernels(emulated_driver) == [f"{expected}_{NAMES[dtype]}"]
    assert ours.shape == (tokens, 37) and ours.dtype == dtype
    assert near(ours, x, weight, bias)
    # A token's product does not depend on other tokens or on the order of blocks and threads.
    with emulated_driver.reversed():
        again = linear_nf4(x, packed, state, bias)
    assert torch.equal(again, ours)


@pytest.mark.parametrize(
    "rows, columns", [(1, 8), (2, 64), (3, 72), (9, 256), (16, 264), (5, 1032), (4, 2304)]
)
@pytest.mark.parametrize("tokens, width", [(1, 1), (3, 4), (5, 8)])
def test_products_of_any_shape(rows, columns, tokens, width, emulated_driver):
    packed, state, weight = layer(rows, columns, True, torch.float32)
    x = values(tokens * columns, torch.float32, 1).view(1, tokens, columns)
    ours = linear_nf4(x, packed, state)
    assert kernels(emulated_driver) == [f"nf4_multiply{width}_f32"]
    assert ours.shape == (1, tokens, rows)
    assert near(ours[0], x[0], weight)


def test_cases_without_a_product_from_codes(emulated_driver):
    """Rows that are not full words, tokens and codes at odd addresses: the full weight is
    dequantised."""
    packed, state, weight = layer(5, 67, False, torch.float32)
    x = values(2 * 67, torch.float32, 1).view(2, 67)
    assert near(linear_nf4(x, packed, state), x, weight)
    packed, state, weight = layer(5, 64, False, torch.float32)
    x = values(2 * 64 + 1, torch.float32, 1)[1:].view(2, 64)
    assert near(linear_nf4(x, packed, state), x, weight)
    shifted = torch.cat([packed.new_zeros(1, 1), packed])[1:]
    assert near(linear_nf4(x.clone(), shifted, state), x, weight)
    assert kernels(emulated_driver) == ["nf4_dequantize_f32"] * 3


def test_strided_tokens_and_a_bias_of_another_dtype(emulated_driver):
    packed, state, weight = layer(6, 64, False, torch.bfloat16)
    x, bias = values(64 * 4, torch.bfloat16, 1).view(64, 4).T, values(6, torch.float32, 2)
    ours = linear_nf4(x, packed, state, bias)
    assert kernels(emulated_driver) == ["nf4_multiply4_bf16"]
    assert near(ours, x, weight, bias.bfloat16())


def test_no_tokens_no_rows():
    packed, state, _ = layer(6, 64, False, torch.float32)
    assert linear_nf4(torch.empty(0, 64), packed, state).shape == (0, 6)
    packed, state, _ = layer(0, 64, False, torch.float32)
    assert linear_nf4(torch.ones(2, 64), packed, state).shape == (2, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 20])
def test_the_gradient_of_the_input(dtype, tokens, emulated_driver):
    packed, state, weight = layer(24, 64, True, dtype)
    x = values(tokens * 64, dtype, 1).view(tokens, 64).requires_grad_()
    grad = values(tokens * 24, dtype, 2).view(tokens, 24)
    linear_nf4(x, packed, state).backward(grad)
    assert kernels(emulated_driver)[-1] == f"nf4_dequantize_{NAMES[dtype]}"
    assert near(x.grad, grad, weight.T)


def test_the_gradient_goes_through_the_dtype_of_the_weight(emulated_driver):
    packed, state, _ = layer(24, 64, False, torch.float16)
    x = values(64, torch.float32, 1).view(1, 64).requires_grad_()
    linear_nf4(x, packed, state).backward(torch.eye(24)[:1])
    assert kernels(emulated_driver) == ["nf4_multiply1_f32", "nf4_dequantize_f16"]
    with slices():
        assert torch.equal(x.grad[0], dequantize_nf4(packed, state)[0].float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_read_past_the_end(dtype):
    """Codes, scales and tokens at the end of readable memory."""
    for double_quant in (False, True):
        packed, state, weight = layer(5, 328, double_quant, dtype)
        state.absmax = at_a_page_s_end(state.absmax)
        if double_quant:
            state.state2.absmax = at_a_page_s_end(state.state2.absmax)
        packed = at_a_page_s_end(packed)
        dequantize_nf4(packed, state)
        for tokens in (1, 3, 5):
            x = at_a_page_s_end(values(tokens * 328, dtype, 1).view(tokens, 328))
            bias = at_a_page_s_end(values(5, dtype, 2))
            assert near(linear_nf4(x, packed, state, bias), x, weight, bias)
    for count in (1, 63, 1003):
        quantize_nf4(at_a_page_s_end(values(count, dtype)), 64)


# ---- errors ----


def test_a_failed_launch_names_kernel_and_shape(emulated_driver):
    emulated_driver.fail(1)
    with pytest.raises(RuntimeError) as raised:
        quantize_nf4(torch.ones(640), 64)
    text = str(raised.value)
    assert "CUDA kernel nf4_quantize_f32, grid (2, 1, 1), block (256, 1, 1), 0 bytes shared" in text
    assert "cuLaunchKernel: CUDA_ERROR" in text
    quantize_nf4(torch.ones(640), 64)  # the process is still usable


def test_arguments_are_checked_before_a_launch(emulated_driver):
    with pytest.raises(ValueError, match="blocksize is 48; must be 32, 64"):
        quantize_nf4(torch.ones(64), 48)
    with pytest.raises(TypeError, match="tensor has dtype float64"):
        quantize_nf4(torch.ones(64, dtype=torch.float64))
    packed, state, _ = layer(6, 64, True, torch.float32)
    with pytest.raises(ValueError, match="packed has shape"):
        dequantize_nf4(packed[1:], state)
    with pytest.raises(ValueError, match="x has shape"):
        linear_nf4(torch.ones(1, 63), packed, state)
    with pytest.raises(ValueError, match="bias has shape"):
        linear_nf4(torch.ones(1, 64), packed, state, torch.ones(5))
    assert kernels(emulated_driver) == []
