"""A step of AdamW: the coefficients, the kernel, and the ops."""

import math

import pytest
import torch

from oddsmith.optim.adamw import step as adamw_step
from oddsmith.optim.adamw.arguments import Rule
from oddsmith.optim.adamw.moments import decode, layout, maps
from oddsmith.optim.adamw.step import AdamUpdate, NonFinite, rule_of
from support.gradients import randn

CPU = torch.device("cpu")


def moments(shape, seed=0):
    """First and second moments over many decades, with signs and zeros."""
    sizes = 10.0 ** (3 * randn(*shape, seed=seed + 1))
    first, second = (
        randn(*shape, seed=seed) * sizes,
        (randn(*shape, seed=seed + 2) * sizes).square(),
    )
    first.view(-1)[::7], second.view(-1)[::11] = 0.0, 0.0
    return first, second


def stepped(bits, dtype, shape, steps=5):
    """A value, its state and the count of bad elements after some steps; two blocks have no gradient."""
    value = (3 * randn(*shape)).to(dtype)
    state = {key: torch.zeros(each, dtype=kind) for key, (each, kind) in
             layout(value.shape, bits).items()}  # fmt: skip
    if bits == 8:
        state |= dict(zip(("qmap1", "qmap2"), maps(CPU)))
    bad = NonFinite()
    for step in range(1, steps + 1):
        grad = moments(shape, seed=10 * step)[0].to(dtype)
        grad.view(-1)[256:768] = 0.0
        if step == 3:
            grad.view(-1)[[0, 5, 900]] = torch.tensor([math.nan, math.inf, -math.inf], dtype=dtype)
        group = {"lr": 0.03, "betas": (0.8, 0.93), "eps": 1e-5, "weight_decay": 0.2}
        adamw_step.adamw_step([AdamUpdate(value, grad, state, rule_of(group, step))], bad)
    return value, state, bad.total()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [8, 32])
def test_ops_do_what_the_kernel_does(bits, dtype, monkeypatch):
    value, state, bad = stepped(bits, dtype, (31, 53))
    monkeypatch.setattr(adamw_step, "_SERVED", ())
    monkeypatch.setattr(adamw_step._core, "adamw_step", None)  # and it would be no success
    other, theirs, count = stepped(bits, dtype, (31, 53))
    # In fp16 large values become infinite too.
    assert bad == count and (bad == 3 or dtype == torch.float16)
    step = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    # A moment between two codes can get either, which changes its element slightly.
    torch.testing.assert_close(value, other, atol=2e-3 if bits == 8 else 1e-6, rtol=step)
    assert (~torch.isclose(value, other, atol=1e-6, rtol=step)).sum() <= 3
    if bits == 8:
        for key in ("state1", "state2"):
            apart = (state[key].int() - theirs[key].int()).abs()
            assert apart.max() <= 1 and (apart > 0).float().mean() < 5e-3, key
    for mine, expected in zip(decode(state), decode(theirs)):
        torch.testing.assert_close(mine, expected, atol=1e-30, rtol=0.2 if bits == 8 else 1e-5)


def test_numbers_by_hand():
    group = {"lr": 0.1, "betas": (0.8, 0.75), "eps": 0.01, "weight_decay": 0.2}
    # At step 2: 1 - 0.8^2 is 0.36, and the root of 1 - 0.75^2 that of 0.4375.
    root = math.sqrt(0.4375)
    expected = (0.8, 0.75, 0.01 * root, -0.1 * root / 0.36, 0.98)
    assert rule_of(group, 2) == pytest.approx(expected)


@pytest.mark.parametrize("ops", [False, True])
def test_a_step_by_hand(ops, monkeypatch):
    if ops:
        monkeypatch.setattr(adamw_step, "_SERVED", ())
    value = torch.tensor([1.0, -2.0, 3.0])
    grad = torch.tensor([0.5, -0.25, math.nan])
    state = {"state1": torch.full((3,), 0.1), "state2": torch.full((3,), 0.2)}
    bad = NonFinite()
    rule = Rule(0.8, 0.75, 0.01, -0.3, 0.9)
    adamw_step.adamw_step([AdamUpdate(value, grad, state, rule)], bad)
    first = 0.8 * 0.1 + 0.2 * grad[:2]
    second = 0.75 * 0.2 + 0.25 * grad[:2] ** 2
    moved = (torch.tensor([1.0, -2.0]) - 0.3 * first / (second.sqrt() + 0.01)) * 0.9
    torch.testing.assert_close(value[:2], moved)
    torch.testing.assert_close(state["state1"][:2], first)
    torch.testing.assert_close(state["state2"][:2], second)
    # Its value is kept, its moments are reset.
    assert value[2] == 3.0 and state["state1"][2] == state["state2"][2] == 0.0
    assert bad.total() == 1


@pytest.mark.parametrize("first", [0, 257, 2**32 - 300, 2**33 + 5])
def test_ops_round_stochastically_as_the_kernel_does(first, monkeypatch):
    """To the bit: the noise depends on seed and place alone."""
    start = randn(3, 331).to(torch.bfloat16)
    results = []
    for served in (("cpu",), ()):
        monkeypatch.setattr(adamw_step, "_SERVED", served)
        value, grad = start.clone(), torch.zeros(3, 331)
        state = {"state1": torch.zeros(3, 331), "state2": torch.zeros(3, 331)}
        # Without a gradient values are multiplied by one number alone, which rounds them.
        rule = Rule(0.8, 0.75, 0.01, -0.3, 1 + 2**-10 + 2**-12)
        update = AdamUpdate(value, grad, state, rule, seed=0xDEADBEEF, first=first)
        adamw_step.adamw_step([update], NonFinite())
        results.append(value)
    assert torch.equal(*results)
    assert 0.1 < (results[0] != start).float().mean() < 0.9


def test_counts_are_kept():
    bad = NonFinite()
    assert bad.total() == 0
    bad.on(CPU).add_(3)
    bad.on(CPU).add_(2)
    assert bad.total() == 5


def test_an_empty_list_of_updates():
    empty = AdamUpdate(
        torch.zeros(0),
        torch.zeros(0),
        {},
        rule_of({"lr": 1.0, "betas": (0.9, 0.9), "eps": 1.0, "weight_decay": 0.0}, 1),
    )
    adamw_step.adamw_step([empty], NonFinite())
