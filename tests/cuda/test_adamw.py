"""The kernels of kernels/adamw.cu on the emulated GPU, compared with the slice algorithms."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from oddsmith import _core
from oddsmith.optim import AdamW8bit, PagedAdamW8bit
from oddsmith.optim.adamw.arguments import Item, Rule
from support import emulation
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
def test_the_optimiser_launches_one_kernel_for_moments_of_each_kind(kind, emulated_driver):
    found = train(kind)
    launched = [launch.kernel for launch in emulated_driver.launches()]
    assert sorted(launched) == ["adamw8bit_f32"] * 5 + ["adamw_f32"] * 5
    with slices():
        assert all(torch.equal(*pair) for pair in zip(found, train(kind)))


# ---- many tensors in a launch ----


def many(sizes, bits, rules=1, pair="bf16_f32", seeds=True):
    """Results of two steps on tensors of these sizes, of which one in five has a NaN."""
    dtype, grad_dtype = PAIRS[pair]
    generator = torch.Generator().manual_seed(len(sizes))
    values = [torch.randn(size, generator=generator).to(dtype) for size in sizes]
    moments = [fresh(size, bits) for size in sizes]
    bad = torch.zeros(1, dtype=torch.int64)
    for step in (1, 2):
        items = []
        for i, (value, (states, absmax)) in enumerate(zip(values, moments)):
            grad = torch.randn(value.numel(), generator=generator).to(grad_dtype)
            if i % 5 == 0:
                grad[-1:] = float("nan")
            one = item(
                value, grad, states, absmax, 256 * i, step, (seeds and i % 3 and 77 + i) or None
            )
            items.append(one._replace(rule=one.rule._replace(keep=1 - 0.01 * (i % rules))))
        _core.adamw_step(items, bad)
    flat = [tensor for states, absmax in moments for tensor in (*states, *(absmax or ()))]
    return [*values, *flat, bad]


def assert_same_as_cpu(*arguments, **options):
    found = many(*arguments, **options)
    with slices():
        expected = many(*arguments, **options)
    assert all(same_bits(*pair) for pair in zip(found[:-1], expected[:-1], strict=True))
    assert torch.equal(found[-1], expected[-1])
    return found


# The ends of blocks of moments and of blocks of threads, and several of the latter.
SIZES = [1, 255, 256, 257, 2047, 2048, 2049, 4096, 6145, 3, 300]


@pytest.mark.parametrize("bits", [8, 32])
@pytest.mark.parametrize("pair", ["f32", "bf16", "f16_f32"])
def test_tensors_of_a_launch_do_not_touch_each_other(bits, pair, emulated_driver):
    found = assert_same_as_cpu(SIZES, bits, rules=3, pair=pair)
    assert found[-1] == 6  # three tensors with NaN, two steps
    assert len(emulated_driver.launches()) == 2
    blocks = sum(-(-size // 2048) for size in SIZES)
    assert {launch.grid for launch in emulated_driver.launches()} == {(blocks, 1, 1)}


@pytest.mark.parametrize(
    ("sizes", "rules", "launches"),
    [
        ([5] * 448, 1, 1),
        ([5] * 472, 8, 1),
        ([5] * 473, 8, 2),
        ([5] * 20, 9, 2),
        ([5] * 40, 17, 3),
        ([5, 0, 7], 1, 1),
        ([0], 1, 0),
    ],
)
def test_how_many_fit_in_a_launch(sizes, rules, launches, emulated_driver):
    assert_same_as_cpu(sizes, 32, rules, "f32", seeds=False)
    assert len(emulated_driver.launches()) == 2 * launches


def test_dtypes_have_a_launch_each(emulated_driver):
    bad = torch.zeros(1, dtype=torch.int64)
    items = []
    for dtype, grad_dtype in [*PAIRS.values()] * 3:
        for bits in (8, 32):
            value = torch.randn(9).to(dtype)
            items.append(item(value, torch.randn(9).to(grad_dtype), *fresh(9, bits)))
    _core.adamw_step(items, bad)
    launched = [launch.kernel for launch in emulated_driver.launches()]
    kinds = [f"{kind}_{pair}" for pair in PAIRS for kind in ("adamw8bit", "adamw")]
    assert sorted(launched) == sorted(kinds)


def test_a_lora_of_7b_takes_one_launch_a_step(emulated_driver):
    """Two factors of seven matrices in 32 layers."""
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(300 + i)) for i in range(448)]
    optimizer = AdamW8bit(parameters, lr=1e-2, min_8bit_size=256)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    for step in (1, 2):
        optimizer.step()
        assert [launch.kernel for launch in emulated_driver.launches()] == ["adamw8bit_f32"] * step


OLD_DRIVER = """
import os, sys
from pathlib import Path
sys.path[:0] = [{tests!r}, {here!r}]
import torch
import test_adamw
from support import emulation
driver = emulation.Driver(Path(os.environ["ODDSMITH_CUDA_DRIVER"]))
for bits in (8, 32):
    driver.reset()
    test_adamw.assert_same_as_cpu([5, 300, 2049] * 40, bits, 3)
    assert len(driver.launches()) == 2 * 3, driver.launches()  # 56 tensors in each
"""


def test_a_driver_before_12_1_takes_fewer_in_a_launch():
    """Whose kernels have 4 KB of arguments at most."""
    library = str(emulation.build([emulation.KERNELS / "adamw.cu"], old_driver=True))
    here = os.path.dirname(__file__)
    code = OLD_DRIVER.format(tests=os.path.dirname(here), here=here)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "ODDSMITH_CUDA_DRIVER": library},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


def test_a_captured_launch_keeps_its_list(emulated_driver):
    """A graph has a copy of the addresses: the call's own memory is gone when it is replayed."""
    bad = torch.zeros(1, dtype=torch.int64)

    def items():
        generator = torch.Generator().manual_seed(5)
        made = []
        for size in SIZES:
            value, grad = (torch.randn(size, generator=generator) for _ in range(2))
            made.append(item(value, grad, *fresh(size, 8)))
        return made

    expected, found = items(), items()
    for _ in range(3):
        _core.adamw_step(expected, bad)
    emulated_driver.capture(0)
    _core.adamw_step(found, bad)
    assert emulated_driver.end_capture() == 1
    assert torch.equal(found[0].value, items()[0].value), "captured, and not run"
    for _ in range(3):
        emulated_driver.replay()
    for ours, theirs in zip(found, expected):
        assert same_bits(ours.value, theirs.value) and same_bits(ours.state2, theirs.state2)


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
