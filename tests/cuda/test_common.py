"""kernels/common.cuh on the host: exact conversions, 16-byte accesses, reductions."""

from ctypes import c_int64

import pytest
import torch

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}
named = pytest.mark.parametrize("name", DTYPES)


def all_halves(name: str) -> torch.Tensor:
    return torch.arange(-(2**15), 2**15).to(torch.int16).view(DTYPES[name])


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_same(actual: torch.Tensor, expected: torch.Tensor):
    """Equal bits, and NaN at the same places: torch's NaN has another payload."""
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(bits(actual)[~nan], bits(expected)[~nan])


@named
def test_widening_every_value(sample_driver, name):
    x = all_halves(name)
    out = torch.zeros(x.numel())
    sample_driver.launch(f"widen_{name}", x, out, c_int64(x.numel()))
    assert_same(out, x.float())


@named
def test_narrowing_every_value_and_between(sample_driver, name):
    x = all_halves(name).float()
    x = x[x.isfinite()].sort().values
    middle = x[:-1] + (x[1:] - x[:-1]) / 2  # exact: a float has more bits
    largest = torch.tensor(float("inf")).nextafter(torch.tensor(0.0))
    x = torch.cat([
        x,
        middle,
        middle.nextafter(largest),
        middle.nextafter(-largest),
        torch.tensor([65519.996, 65520.0, float("inf"), float("nan"), 1e-45, 2.0**-25, 2.0**-24]),
        largest.view(1),
    ])  # fmt: skip
    x = torch.cat([x, -x])
    out = torch.zeros(x.numel(), dtype=DTYPES[name])
    sample_driver.launch(f"narrow_{name}", x, out, c_int64(x.numel()))
    assert_same(out, x.to(DTYPES[name]))


@named
def test_narrowing_random_bits(sample_driver, name):
    generator = torch.Generator().manual_seed(5)
    x = torch.randint(-(2**31), 2**31, (1 << 20,), generator=generator).to(torch.int32)
    x = x.view(torch.float32)
    out = torch.zeros(x.numel(), dtype=DTYPES[name])
    sample_driver.launch(f"narrow_{name}", x, out, c_int64(x.numel()))
    assert_same(out, x.to(DTYPES[name]))


def test_nan(sample_driver):
    # With the rounding bias alone the first would become -0.0.
    x = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, 0x7FC12345 - 2**32 + 2**31]).to(torch.int32)
    out = torch.zeros(4, dtype=torch.bfloat16)
    sample_driver.launch("narrow_bf16", x.view(torch.float32), out, c_int64(4))
    assert [hex(b & 0xFFFF) for b in bits(out).tolist()] == ["0x7fff", "0x7fc0", "0xffff", "0xffc1"]
    out = torch.zeros(4, dtype=torch.float16)
    sample_driver.launch("narrow_f16", x.view(torch.float32), out, c_int64(4))
    assert bits(out).unique().tolist() == [0x7FFF]


@pytest.mark.parametrize("name", ["f32", *DTYPES])
def test_16_bytes(sample_driver, name):
    dtype = DTYPES.get(name, torch.float32)
    x = torch.randn(16 // dtype.itemsize * 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    out = torch.zeros_like(x)
    sample_driver.launch(f"increment_{name}", x, out)
    assert torch.equal(out, x + 1)


def butterfly(values: torch.Tensor) -> torch.Tensor:
    """The sum of 32 values in the order of the kernel."""
    for distance in (16, 8, 4, 2, 1):
        values = values + values[torch.arange(32) ^ distance]
    return values


@pytest.mark.parametrize("block", [32, 96, 1024])
@pytest.mark.parametrize("reverse", [False, True])
def test_reductions(sample_driver, block, reverse):
    x = torch.randn(block, generator=torch.Generator().manual_seed(block)) * 1e3 - 5e3
    sums, maxima, warps = torch.zeros(3, block).unbind()
    if reverse:
        with sample_driver.reversed():
            sample_driver.launch("reductions", x, sums, maxima, warps, block=block)
    else:
        sample_driver.launch("reductions", x, sums, maxima, warps, block=block)
    expected = torch.cat([butterfly(warp) for warp in x.view(-1, 32)])
    assert torch.equal(warps, expected)
    partial = torch.zeros(32)
    partial[: block // 32] = expected[::32]
    assert torch.equal(sums, butterfly(partial)[:1].expand(block))
    assert torch.equal(maxima, x.max().expand(block))
