"""Stacks of matrices, the experts of a layer: each is projected as a matrix of its own."""

import io
import logging

import pytest
import torch
from torch import nn

import reference
from oddsmith.optim.low_rank.galore import GaLoreAdamW, optimizer_bytes
from support.gradients import randn
from support.low_rank import CLASSES, LOW, decaying

pytestmark = pytest.mark.usefixtures("eight_bits_for_all")

EXPERTS, ROWS, COLUMNS = 4, 14, 10


def gradients(step):
    """Expert 1 gets its first tokens in step 1, and expert 2 none in step 3."""
    grad = torch.stack([decaying(ROWS, COLUMNS, seed=10 * step + e) for e in range(EXPERTS)])
    grad += torch.stack([decaying(ROWS, COLUMNS, seed=90 + e) for e in range(EXPERTS)])
    grad[1 if step == 0 else 2] *= step not in (0, 3)
    return grad


def make(name, parameters, **options):
    kind, kwargs = CLASSES[name]
    group = {"params": parameters, "weight_decay": 0.05, **LOW, **options.pop("group", {})}
    return kind([group], **{**kwargs, **options})


def parameters():
    weight = randn(EXPERTS, ROWS, COLUMNS)
    return nn.Parameter(weight.clone()), [nn.Parameter(each.clone()) for each in weight]


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "full"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adamw_is_the_naive_form(proj_type, dtype):
    weight = nn.Parameter(randn(EXPERTS, ROWS, COLUMNS).to(dtype))
    naive = reference.GaLoreStack(weight.detach().double(), 4, 3, 0.6, proj_type)
    group = {"params": [weight], "rank": 4, "update_proj_gap": 3, "scale": 0.6}
    optimizer = GaLoreAdamW(
        [{**group, "proj_type": proj_type, "svd": "exact"}],
        lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1,
    )  # fmt: skip
    for step in range(8):
        weight.grad = gradients(step).to(dtype)
        naive.step(weight.grad.double(), lr=0.05, betas=(0.8, 0.95), eps=1e-3, decay=0.1)
        optimizer.step()
    # Expert 1 began one step later; expert 2 had to wait for its second basis.
    assert [each["step"] for each in optimizer.state[weight]["slices"]] == [8, 7, 8, 8]
    assert [each["next_refresh"] for each in optimizer.state[weight]["slices"]] == [9, 9, 10, 9]
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(
        weight.detach().double(), naive.weight, atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("name", list(CLASSES))
def test_it_is_a_parameter_for_each_matrix(name):
    stack, alone = parameters()
    # The random start of a basis depends on the place among the parameters.
    extra = {} if name == "apollo" else {"svd": "exact"}
    one, many = make(name, [stack], group=extra), make(name, alone, group=extra)
    if name == "apollo":
        one.refresh = many.refresh = lambda item: item.state.update(next_refresh=99)
        one.bases = many.bases = lambda item: (None, randn(5, COLUMNS, seed=3))
    for step in range(7):
        stack.grad = gradients(step)
        for parameter, grad in zip(alone, stack.grad, strict=True):
            parameter.grad = grad.clone()
        one.step()
        many.step()
    torch.testing.assert_close(stack.detach(), torch.stack([each.detach() for each in alone]))
    assert optimizer_bytes(one) == optimizer_bytes(many)


@pytest.mark.parametrize("name", list(CLASSES))
@pytest.mark.parametrize("parts", [1, 3])
def test_layerwise_is_the_same(name, parts):
    (stack, _), (other, _) = parameters(), parameters()
    plain = make(name, [stack])
    hooked = make(name, [other], layerwise=True, accumulation_steps=parts)
    for step in range(7):
        stack.grad = gradients(step)
        plain.step()
        for part in range(parts):  # whose gradients differ
            share = (part + 1) / sum(range(1, parts + 1))
            (other * (gradients(step) * share)).sum().backward()
        assert other.grad is None
    assert hooked.skipped == 0
    torch.testing.assert_close(other.detach(), stack.detach(), atol=1e-4, rtol=1e-4)


def test_layerwise_keeps_what_a_basis_waits_for():
    stack, _ = parameters()
    kept = []
    optimizer = make(
        "adamw", [stack], group={"refresh_on": "first"}, layerwise=True, accumulation_steps=2
    )
    for step in range(2):
        (stack * gradients(step)).sum().backward()
        kept.append(stack.grad is not None)
        (stack * gradients(step)).sum().backward()
        assert stack.grad is None
    # Expert 1 has no gradient yet in step 0.
    assert kept == [True, False]
    assert [each["step"] for each in optimizer.state[stack]["slices"]] == [2, 1, 2, 2]


@pytest.mark.parametrize("name", list(CLASSES))
@pytest.mark.parametrize("layerwise", [False, True])
def test_resumes_bit_for_bit(name, layerwise):
    def run(stack, optimizer, steps):
        for step in steps:
            (stack * gradients(step)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    (stack, _), (again, _) = parameters(), parameters()
    optimizer = make(name, [stack], layerwise=layerwise)
    run(stack, optimizer, range(4))
    file = io.BytesIO()
    torch.save({"weight": stack.detach(), "optimizer": optimizer.state_dict()}, file)
    run(stack, optimizer, range(4, 9))
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again.data.copy_(saved["weight"])
    resumed = make(name, [again], layerwise=layerwise)
    resumed.load_state_dict(saved["optimizer"])
    before = saved["optimizer"]["state"][0]["slices"][0]["step"]
    run(again, resumed, range(4, 9))
    assert torch.equal(stack, again)
    assert saved["optimizer"]["state"][0]["slices"][0]["step"] == before  # a copy


def test_a_state_of_another_number_of_matrices_is_refused():
    (stack, _), (other, _) = parameters(), parameters()
    optimizer = make("adamw", [stack])
    stack.grad = gradients(1)
    optimizer.step()
    state = optimizer.state_dict()
    second = make("adamw", [other])
    with pytest.raises(ValueError, match="state of parameter 0 has 3 slices; must be 4"):
        second.load_state_dict({**state, "state": {0: {"slices": state["state"][0]["slices"][:3]}}})
    state["state"][0]["slices"][2]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"exp_avg is \(3,\); must have shape"):
        second.load_state_dict(state)


@pytest.mark.parametrize("name", list(CLASSES))
def test_a_gradient_that_is_not_finite_stops_one_matrix(name, caplog):
    stack, _ = parameters()
    optimizer = make(name, [stack])
    with caplog.at_level(logging.WARNING):
        for step in range(1, 3):
            before = stack.detach().clone()
            stack.grad = gradients(step)
            stack.grad[3, 2, 1] = float("nan")
            optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, stack.detach(), strict=True)]
    assert changed == [True, True, True, False]
    assert optimizer.skipped == 2 and caplog.text.count("NaN or infinite") == 1


def test_a_narrow_stack_is_named_by_its_matrices(caplog):
    stack, _ = parameters()
    optimizer = make("adamw", [stack], group={"rank": 64})
    assert "such as (14, 10)" in caplog.text
    stack.grad = gradients(1)
    optimizer.step()
    assert optimizer.state[stack]["slices"][0]["basis_right"].shape == (10, 10)
