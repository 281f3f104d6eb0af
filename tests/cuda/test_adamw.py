"""The kernels of kernels/adamw.cu on the emulated GPU, compared with the slice algorithms."""

import pytest
import torch
from torch import nn

from oddsmith import _core
from oddsmith.optim import AdamW8bit, PagedAdamW8bit
from oddsmith.optim.adamw.arguments import Item, Rule
from support.slices import at_a_page_s_end, same_bits, slices

pytestmark = pytest.mark.usefixtures("emulated_driver")

PAIRS = {
    "f32": (torch.float32, torch.float32),
    "bf16": (torch.bfloat16, torch.bfloat16),
    "f16": (torch.float16, torch.float16),
    "bf16_f32": (torch.bfloat16, torch.float32),
    "f16_f32": (torch.float16, torch.float32),
}


def rule(step):
    beta1, beta2, lr = 0.85, 0.97, 3e-2
    second = (1 - beta2**step) ** 0.5
    return Rule(beta1, beta2, 1e-6 * second, -lr * second / (1 - beta1**step), 1 - lr * 0.1)


def item(value, grad, moments, absmax, first=0, step=1, seed=None):
    return Item(value, grad, *moments, *(absmax or (None, None)), first, rule(step), seed)


def fresh(count, bits):
    if bits == 32:
        return (torch.zeros(count), torch.zeros(count)), None
    moments = torch.full((count,), 128, dtype=torch.uint8), torch.zeros(count, dtype=torch.uint8)
    blocks = -(-count // 256)
    return moments, (torch.zeros(blocks), torch.zeros(blocks))


def run(pair, bits, count, seed=None, offset=0, first=0, steps=4):
    """All results of some steps, with NaN and infinities in the gradients of the third."""
    dtype, grad_dtype = PAIRS[pair]
    generator = torch.Generator().manual_seed(count)
    whole = torch.randn(count + offset, generator=generator).to(dtype)
    value = whole[offset:]
    (m, v), absmax = fresh(count, bits)
    bad = torch.zeros(1, dtype=torch.int64)
    for step in range(1, steps + 1):
        size = 10.0 ** (torch.rand(count, generator=generator) * 6 - 6)
        grad = (torch.randn(count, generator=generator) * size).to(grad_dtype)
        if step == 3 and count > 2:
            grad[[0, count // 2, -1]] = torch.tensor(
                [float("nan"), float("inf"), float("-inf")]
            ).to(grad_dtype)
        _core.adamw_step([item(value, grad, (m, v), absmax, first, step, seed)], bad)
    return [value, m, v, *(absmax or ()), bad]


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("count", [1, 7, 255, 256, 2049, 5000])
def test_steps_equal_the_cpu(bits, pair, count, emulated_driver):
    with emulated_driver.reversed():
        found = run(pair, bits, count)
    kernel = f"adamw8bit_{pair}" if bits == 8 else f"adamw_{pair}"
    assert [launch.kernel for launch in emulated_driver.launches()] == [kernel] * 4
    with slices():
        expected = run(pair, bits, count)
    for ours, theirs in zip(found[:-1], expected[:-1], strict=True):
        assert same_bits(ours, theirs)
    assert found[-1] == expected[-1] == (3 if count > 2 else 0)


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("first", [0, 512, 2**33 + 256])
def test_stochastic_rounding_is_the_same(bits, first):
    found = run("bf16", bits, 1100, seed=12345, first=first)
    with slices():
        expected = run("bf16", bits, 1100, seed=12345, first=first)
        nearest = run("bf16", bits, 1100, first=first)
    assert all(same_bits(ours, theirs) for ours, theirs in zip(found[:3], expected[:3]))
    assert not torch.equal(found[0], nearest[0])


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("pair", ["f32", "bf16"])
def test_values_that_are_not_aligned(bits, pair):
    found = run(pair, bits, 700, offset=1)
    with slices():
        expected = run(pair, bits, 700, offset=1)
    assert all(same_bits(ours, theirs) for ours, theirs in zip(found[:3], expected[:3]))


@pytest.mark.parametrize("bits", [8, 32])
def test_nothing_is_read_past_the_end(bits):
    for count in (1, 9, 300):
        value, grad = (at_a_page_s_end(torch.randn(count)) for _ in range(2))
        moments, absmax = fresh(count, bits)
        moments = tuple(map(at_a_page_s_end, moments))
        absmax = absmax and tuple(map(at_a_page_s_end, absmax))
        bad = torch.zeros(1, dtype=torch.int64)
        _core.adamw_step([item(value, grad, moments, absmax)], bad)


def train(kind, **options):
    torch.manual_seed(2)
    parameters = [nn.Parameter(torch.randn(90, 70)), nn.Parameter(torch.randn(33))]
    optimizer = kind(parameters, lr=1e-2, weight_decay=0.1, **options)
    for _ in range(5):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    return parameters


@pytest.mark.parametrize("kind", [AdamW8bit, PagedAdamW8bit])
def test_the_optimiser_launches_one_kernel_per_parameter(kind, emulated_driver):
    found = train(kind)
    launched = [launch.kernel for launch in emulated_driver.launches()]
    assert sorted(launched) == ["adamw8bit_f32"] * 5 + ["adamw_f32"] * 5
    with slices():
        assert all(torch.equal(*pair) for pair in zip(found, train(kind)))


def test_arguments_are_checked_before_a_launch(emulated_driver):
    value, grad, bad = torch.randn(300), torch.randn(300), torch.zeros(1, dtype=torch.int64)
    moments, absmax = fresh(300, 8)
    good = item(value, grad, moments, absmax)
    for parts, error, message in (
        ((value, grad[1:], moments, absmax), ValueError, "grad has shape"),
        ((value, grad, moments, (absmax[0][1:], absmax[1])), ValueError, "absmax1 has shape"),
        ((value, grad, moments, None), TypeError, "state1 has dtype uint8; must be float32"),
        ((value.double(), grad, moments, absmax), TypeError, "value has dtype float64"),
        ((value, grad.half(), moments, absmax), TypeError, "grad has dtype float16"),
        ((value[::2], grad[:150], fresh(150, 8)[0], None), TypeError, "state1"),
        ((value[::2], grad[:150], *fresh(150, 32)), ValueError, "value is strided"),
    ):
        with pytest.raises(error, match=message):
            _core.adamw_step([good, item(*parts)], bad)
    with pytest.raises(ValueError, match="rule is .*NaN.*; must be finite numbers"):
        _core.adamw_step([good._replace(rule=rule(1)._replace(step_size=float("nan")))], bad)
    with pytest.raises(ValueError, match="one of absmax1 and absmax2 is None"):
        _core.adamw_step([good._replace(absmax2=None)], bad)
    with pytest.raises(ValueError, match=r"bad has shape \[2\]; must be \(1,\)"):
        _core.adamw_step([good], torch.zeros(2, dtype=torch.int64))
    assert emulated_driver.launches() == []
