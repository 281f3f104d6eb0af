"""AdamW8bit behaves like torch's optimisers: closures, copies, and errors that change nothing."""

import copy
import math

import pytest
import torch
from torch import nn

from oddsmith.optim import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit
from support.gradients import given, randn, train, values, weights_of

RULE = {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-5, "weight_decay": 0.1}


def test_a_closure_is_called_with_gradients():
    weight = nn.Parameter(randn(64, 65))
    before = weight.detach().clone()
    optimizer = AdamW8bit([weight], **RULE)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(before.square().sum().item())
    assert (weight.abs() < before.abs()).float().mean() > 0.98
    assert AdamW8bit([weight]).step() is None


def test_what_has_no_gradient_has_no_state():
    weights = weights_of([(64, 65), (5,), (66, 67)])
    before = values(weights)
    optimizer = AdamW8bit(weights, **RULE)
    given(optimizer, [None, torch.ones(5), None])
    assert set(optimizer.state) == {weights[1]}
    assert [torch.equal(w, b) for w, b in zip(weights, before)] == [True, False, True]
    given(optimizer, [torch.ones(64, 65), torch.ones(5), None])
    assert [optimizer.state[w]["step"] for w in weights[:2]] == [1, 2]


def test_a_saved_tensor_that_is_changed_is_noticed():
    weight = nn.Parameter(randn(64, 65))
    loss = weight.square().sum()
    train(AdamW8bit([weight]), weight, 1, lambda s: torch.ones(64, 65))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_copies_continue_equally():
    weight = nn.Parameter(randn(64, 65).bfloat16())
    optimizer = AdamW8bit([weight], **RULE, seed=3, stochastic_rounding=True)
    train(optimizer, weight, 2, lambda s: randn(64, 65, seed=s).bfloat16())
    other = copy.deepcopy(optimizer)
    (copied,) = other.param_groups[0]["params"]
    before = weight.detach().clone()
    train(other, copied, (2, 3), lambda s: randn(64, 65, seed=s).bfloat16())
    assert torch.equal(weight, before)
    train(optimizer, weight, (2, 3), lambda s: randn(64, 65, seed=s).bfloat16())
    assert torch.equal(weight, copied)


# ---- Errors ----


def unchanged_by(action, optimizer, weights, error, match):
    before, state = values(weights), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(error, match=match):
        action()
    assert all(map(torch.equal, before, weights))
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    assert [each["step"] for each in after["state"].values()] == [
        each["step"] for each in state["state"].values()
    ]


@pytest.mark.parametrize("fresh", [True, False])
def test_nothing_is_half_updated_if_a_later_gradient_is_bad(fresh):
    weights = weights_of([(64, 65), (6, 7)])
    optimizer = AdamW8bit(weights, **RULE)
    if not fresh:
        given(optimizer, [torch.ones(64, 65), torch.ones(6, 7)])
    weights[0].grad = torch.ones(64, 65)
    weights[1].grad = torch.ones(6, 7).to_sparse()
    unchanged_by(optimizer.step, optimizer, weights, ValueError, r"\(6, 7\) is sparse")


@pytest.mark.parametrize("fresh", [True, False])
def test_nothing_is_half_updated_if_a_parameter_has_become_fp64(fresh):
    model = nn.ModuleList([nn.Linear(64, 65), nn.Linear(6, 7)])
    weights = list(model.parameters())
    optimizer = AdamW8bit(weights, **RULE)
    if not fresh:
        given(optimizer, [torch.ones_like(each) for each in weights])
    model[1].double()
    for each in weights:
        each.grad = torch.ones_like(each)
    unchanged_by(optimizer.step, optimizer, weights, (TypeError, ValueError), "float64; must be")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1.0; must be a number of at least 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": torch.tensor(0.1)}, "lr is a tensor; must be a number"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\)"),
        ({"betas": (0.9, 0.9, 0.9)}, "betas is"),
        ({"eps": -1e-8}, "eps is -1e-08"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
        ({"optim_bits": 4}, "AdamW8bit: optim_bits is 4; must be 8 or 32"),
        ({"min_8bit_size": 0}, "min_8bit_size is 0; must be a positive integer"),
        ({"min_8bit_size": 4096.0}, "min_8bit_size is 4096.0"),
        ({"stochastic_rounding": "yes"}, "stochastic_rounding is 'yes'; must be True or False"),
    ],
)
def test_bad_options(options, message):
    weights = weights_of([(3, 4), (5,)])
    with pytest.raises(ValueError, match=message):
        AdamW8bit(weights, **options)
    optimizer = AdamW8bit(weights[:1])
    with pytest.raises(ValueError, match=message):
        optimizer.add_param_group({"params": weights[1:], **options})
    assert len(optimizer.param_groups) == 1


def test_other_bad_arguments():
    (weight,) = weights_of([(3, 4)])
    with pytest.raises(
        ValueError, match="unknown options amsgrad, rank; a group may have betas, eps"
    ):
        AdamW8bit([{"params": [weight], "rank": 4, "amsgrad": True}])
    for places in ([1], [-1], ["0"]):
        with pytest.raises(ValueError, match="must be places in the group's 1 parameters"):
            AdamW8bit([{"params": [weight], "full_precision": places}])
    with pytest.raises(ValueError, match="seed is 1.5; must be an integer"):
        AdamW8bit([weight], seed=1.5)
    with pytest.raises(ValueError, match=r"\(2, 3\) is torch.float64; must be float32"):
        AdamW8bit([nn.Parameter(torch.zeros(2, 3).double())])
    with pytest.raises(ValueError, match="is torch.complex64"):
        AdamW8bit([("named", nn.Parameter(torch.zeros(2, 3, dtype=torch.complex64)))])
    for kind in (PagedAdamW8bit, PagedAdamW32bit):
        with pytest.raises(
            ValueError, match="device_budget is 0; must be a positive number of byt"
        ):
            kind([weight], device_budget=0)
