"""The kernels of kernels/blockwise8.cu on the emulated GPU, and torch's operations, compared with the slice algorithms."""

import pytest
import torch

from oddsmith import _core
from oddsmith.quant.nf4 import dynamic_map
from support.slices import DTYPES, at_a_page_s_end, same_bits, slices, tensor_operations

pytestmark = pytest.mark.usefixtures("emulated_driver")

NAMES = {torch.float32: "f32", torch.bfloat16: "bf16", torch.float16: "f16"}
MAPS = {
    "signed": dynamic_map(),
    "unsigned": dynamic_map(signed=False),
    "linear": torch.linspace(-1, 1, 256),
    # Midpoints that a `float` cannot represent, equal neighbours, and some below the smallest
    # normal number.
    "rough": torch.cat([torch.linspace(-1, 1, 200).pow(9), torch.full((50,), 1e-41), torch.ones(6)])
    .sort()
    .values,
}


def values(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize(
    "count, blocksize",
    [(0, 256), (1, 256), (255, 256), (2000, 256), (700, 1), (700, 33), (900, 4096)],
)
def test_codes_and_values_equal_the_cpu(dtype, name, count, blocksize, emulated_driver):
    x, code = values(count, dtype), MAPS[name]
    with emulated_driver.reversed():
        codes, absmax = _core.quantize_blockwise(x, code, blocksize)
    back = _core.dequantize_blockwise(codes, absmax, code, blocksize, str(dtype)[6:])
    launched = [launch.kernel for launch in emulated_driver.launches()]
    expected = [f"blockwise8_{way}_{NAMES[dtype]}" for way in ("quantize", "dequantize")]
    assert launched == (expected if count else [])
    with slices():
        expected_codes, expected_absmax = _core.quantize_blockwise(x, code, blocksize)
        expected_back = _core.dequantize_blockwise(codes, absmax, code, blocksize, str(dtype)[6:])
    assert same_bits(codes, expected_codes)
    assert same_bits(absmax, expected_absmax)
    assert same_bits(back, expected_back)
    with tensor_operations():
        found = _core.quantize_blockwise(x, code, blocksize)
        found_back = _core.dequantize_blockwise(codes, absmax, code, blocksize, str(dtype)[6:])
    assert same_bits(found[0], expected_codes) and same_bits(found[1], expected_absmax)
    assert same_bits(found_back, expected_back)


@pytest.mark.parametrize("name", MAPS)
def test_around_every_midpoint(name):
    code = MAPS[name]
    middles = ((code[1:].double() + code[:-1].double()) / 2).float()
    up, down = torch.tensor(2.0), torch.tensor(-2.0)
    x = torch.cat([middles, middles.nextafter(up), middles.nextafter(down), torch.ones(3)])
    codes, _ = _core.quantize_blockwise(x, code, 1024)
    with tensor_operations():
        by_torch, _ = _core.quantize_blockwise(x, code, 1024)
    with slices():
        expected, _ = _core.quantize_blockwise(x, code, 1024)
    assert torch.equal(codes, expected) and torch.equal(by_torch, expected)


@pytest.mark.parametrize("special", [0.0, -0.0, float("nan"), float("inf"), 1e-45, -3e38])
def test_blocks_of_every_kind(special):
    for base in (torch.zeros(90), values(90, torch.float32)):
        x = base.clone()
        x[[3, 80]] = special
        found = _core.quantize_blockwise(x, MAPS["signed"], 32)
        with tensor_operations():
            by_torch = _core.quantize_blockwise(x, MAPS["signed"], 32)
        with slices():
            expected = _core.quantize_blockwise(x, MAPS["signed"], 32)
        for each in (found, by_torch):
            assert same_bits(each[0], expected[0]) and same_bits(each[1], expected[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_is_read_past_the_end(dtype):
    code = at_a_page_s_end(MAPS["signed"])
    for count in (1, 255, 700):
        x = at_a_page_s_end(values(count, dtype))
        codes, absmax = map(at_a_page_s_end, _core.quantize_blockwise(x, code, 256))
        _core.dequantize_blockwise(codes, absmax, code, 256, str(dtype)[6:])


def test_arguments_are_checked_before_a_launch(emulated_driver):
    x, code = values(64, torch.float32), MAPS["signed"]
    codes, absmax = torch.zeros(64, dtype=torch.uint8), torch.ones(2)
    with pytest.raises(ValueError, match="code is not; must be in ascending order"):
        _core.quantize_blockwise(x, code.flip(0), 32)
    with pytest.raises(ValueError, match="blocksize is 0"):
        _core.quantize_blockwise(x, code, 0)
    with pytest.raises(ValueError, match="absmax has shape"):
        _core.dequantize_blockwise(codes, absmax[:1], code, 32, "float32")
    with pytest.raises(ValueError, match="code has shape"):
        _core.dequantize_blockwise(codes, absmax, code[1:], 32, "float32")
    with pytest.raises(TypeError, match="code has dtype float64"):
        _core.dequantize_blockwise(codes, absmax, code.double(), 32, "float32")
    assert emulated_driver.launches() == []
