"""AdamW and Adafactor on a tensor: steps by hand, rates, weight decay and its order."""

import math

import pytest
import torch

from oddsmith.optim.low_rank.rules import (
    AdafactorCore,
    AdamWCore,
    decay_parameter,
    rms,
    update_parameter,
)
from support.gradients import randn

ADAMW = {"betas": (0.8, 0.95), "eps": 0.01, "correct_bias": True, "weight_decay": 0.1}
ADAFACTOR = {
    "eps": (1e-30, 1e-3), "clip_threshold": 1.0, "decay_rate": -0.8, "beta1": None,
    "weight_decay": 0.1, "scale_parameter": False, "relative_step": False, "warmup_init": False,
}  # fmt: skip


def fresh(core, like, group):
    state = {"step": 0}
    core.init(state, like, group)
    return state


def test_the_root_of_the_mean_square():
    assert rms(torch.tensor([3.0, 4.0, 0.0, 0.0])).item() == pytest.approx(2.5)
    assert rms(torch.zeros(0)).item() == 0.0


@pytest.mark.parametrize("correct_bias", [True, False])
def test_two_steps_of_adamw_by_hand(correct_bias):
    group, core = {**ADAMW, "correct_bias": correct_bias}, AdamWCore()
    target = torch.tensor([1.0, -2.0])
    state = fresh(core, target, group)
    first, second, expected = torch.zeros(2), torch.zeros(2), target.clone()
    for step, values in enumerate(([0.5, -0.25], [0.1, 0.75]), start=1):
        grad = torch.tensor(values)
        core.update([target], [grad], [state], [target], group, 0.3)
        first = 0.8 * first + 0.2 * grad
        second = 0.95 * second + 0.05 * grad**2
        factor = math.sqrt(1 - 0.95**step) / (1 - 0.8**step) if correct_bias else 1.0
        assert core.correction(state, group) == pytest.approx(factor)
        expected = expected - 0.3 * factor * first / (second.sqrt() + 0.01)
        torch.testing.assert_close(target, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(state["exp_avg"], first)
    torch.testing.assert_close(state["exp_avg_sq"], second)
    assert state["step"] == 2


def test_a_step_of_adafactor_by_hand():
    core = AdafactorCore()
    grad = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    state = fresh(core, grad, ADAFACTOR)
    assert state["exp_avg_sq_row"].shape == state["exp_avg_sq_col"].shape == (2,)
    target = torch.zeros(2, 2)
    core.update([target], [grad], [state], [target], ADAFACTOR, 0.1)
    # At step 1 the second moment is that of the gradient: rows 5/2 and 25/2, columns 10/2 and 20/2.
    row, column = torch.tensor([2.5, 12.5]), torch.tensor([5.0, 10.0])
    torch.testing.assert_close(state["exp_avg_sq_row"], row)
    torch.testing.assert_close(state["exp_avg_sq_col"], column)
    change = grad / (row[:, None] * column / 7.5).sqrt()
    change = change / max(1.0, change.square().mean().sqrt().item())
    torch.testing.assert_close(target, -0.1 * change, rtol=1e-5, atol=1e-6)


def test_adafactor_of_a_vector_with_a_first_moment():
    group, core = {**ADAFACTOR, "beta1": 0.75}, AdafactorCore()
    grad = torch.tensor([0.5, -2.0])
    state, target = fresh(core, grad, group), torch.zeros(2)
    core.update([target], [grad], [state], [target], group, 0.1)
    # The gradient over its size, of length 1, and a quarter of it into the moment.
    torch.testing.assert_close(target, -0.1 * 0.25 * grad.sign())
    torch.testing.assert_close(state["exp_avg_sq"], grad.square())
    core.update([target], [-grad], [state], [target], group, 0.1)
    torch.testing.assert_close(
        target, -0.025 * grad.sign() - 0.1 * (0.1875 - 0.25) * grad.sign() / 1
    )


@pytest.mark.parametrize(
    ("changed", "step", "lr", "rate"),
    [
        ({}, 9, 0.5, 0.5),
        ({"relative_step": True}, 1, None, 0.01),
        ({"relative_step": True}, 40_000, None, 1 / 200),
        ({"relative_step": True, "warmup_init": True}, 7, None, 7e-6),
        # The weight has a root mean square of 2, or one below the minimum.
        ({"scale_parameter": True}, 1, 0.5, 1.0),
        ({"scale_parameter": True, "eps": (1e-30, 3.0)}, 1, 0.5, 1.5),
    ],
)
def test_rates_of_adafactor(changed, step, lr, rate):
    weight = torch.tensor([2.0, -2.0])
    found = AdafactorCore().rate(weight, step, {**ADAFACTOR, **changed}, lr)
    assert found == pytest.approx(rate)


def test_weight_decay_is_a_fraction_of_the_parameter():
    weight = torch.full((3,), 2.0)
    decay_parameter(AdamWCore(), weight, {}, ADAMW, 0.5)
    torch.testing.assert_close(weight, torch.full((3,), 2.0 * (1 - 0.5 * 0.1)))
    decay_parameter(AdafactorCore(), weight, {"rate": 0.25}, ADAFACTOR, None)
    torch.testing.assert_close(weight, torch.full((3,), 1.9 * (1 - 0.25 * 0.1)))
    before = weight.clone()
    decay_parameter(AdamWCore(), weight, {}, {**ADAMW, "weight_decay": 0.0}, 0.5)
    assert torch.equal(weight, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("core", "group"),
    [(AdamWCore(), ADAMW), (AdafactorCore(), ADAFACTOR)],
    ids=["adamw", "adafactor"],
)
def test_decay_comes_after_adamw_and_before_adafactor(core, group, dtype):
    weight, grad = randn(4, 6).to(dtype), randn(4, 6, seed=1).to(dtype)
    change = torch.zeros(4, 6)
    state = fresh(core, change, group)
    core.update([change], [grad.float()], [state], [weight], group, 0.2)
    kept = 1 - core.decay(state, group, 0.2)
    expected = (
        weight.float() * kept + change if core.decay_first else (weight.float() + change) * kept
    )
    state = fresh(core, change, group)
    update_parameter(core, weight, grad, state, group, 0.2)
    tolerance = 1e-6 if dtype == torch.float32 else 2**-7
    torch.testing.assert_close(weight.float(), expected, rtol=tolerance, atol=tolerance)
    assert core.decay_first == isinstance(core, AdafactorCore)
