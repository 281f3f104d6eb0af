"""The layer-wise mode: the same steps, gradients freed, clipping, hooks."""

import math

import pytest
import torch

from support.low_rank import CLASSES, backward, make_model, make_optimizer, train, weights

pytestmark = pytest.mark.usefixtures("eight_bits_for_all")


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("name", list(CLASSES))
def test_layerwise_is_the_same(name, parts):
    model, other = make_model(), make_model()
    plain = make_optimizer(name, model)
    layerwise = make_optimizer(name, other, layerwise=True, accumulation_steps=parts)
    train(model, plain, 8, parts=parts)
    for step in range(8):
        for part in range(parts):
            backward(other, step, parts, part)
        assert all(p.grad is None for p in other.parameters())
        layerwise.step()
    for mine, theirs in zip(weights(model), weights(other)):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


def test_layerwise_frees_projected_gradients_between_micro_batches():
    model = make_model()
    optimizer = make_optimizer("adamw", model, layerwise=True, accumulation_steps=2)
    kept = []
    for step in range(4):
        backward(model, step, 2, 0)
        kept.append([p.grad is not None for p in (model[0].weight, model[2].weight)])
        backward(model, step, 2, 1)
        assert all(p.grad is None for p in model.parameters())
    # A basis of the complete sum, at 0 and 3, needs the gradients.
    assert kept == [[True] * 2, [False] * 2, [False] * 2, [True] * 2]
    first = make_model()
    optimizer = make_optimizer(
        "adamw", first, {"refresh_on": "first"}, layerwise=True, accumulation_steps=2
    )
    backward(first, 0, 2, 0)
    assert first[0].weight.grad is None
    backward(first, 0, 2, 1)
    assert optimizer.state[first[0].weight]["step"] == 1


def test_layerwise_asks_which_backward_is_the_last():
    model, other, last = make_model(), make_model(), [False]
    asked = make_optimizer("adamw", model, layerwise=True, is_last_backward=lambda: last[0])
    for step, parts in enumerate((1, 3, 2)):  # as at the end of an epoch
        for part in range(parts):
            last[0] = part == parts - 1
            backward(model, step, parts, part)
    plain = make_optimizer("adamw", other)
    for step, parts in enumerate((1, 3, 2)):
        train(other, plain, 1, start=step, parts=parts)
    assert all(state["step"] == 3 for state in asked.state.values())
    for mine, theirs in zip(weights(model), weights(other)):
        torch.testing.assert_close(mine, theirs, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", ["adamw", "apollo"])
def test_layerwise_clips_each_parameter_by_itself(name):
    model, other = make_model(), make_model()
    layerwise = make_optimizer(name, model, layerwise=True, max_grad_norm=0.01)
    plain = make_optimizer(name, other, {"svd": "exact"} if name == "adamw" else {})
    norms = []
    for step in range(3):
        backward(model, step)
        backward(other, step)
        for index, p in enumerate(other.parameters()):
            grad = p.grad
            if name == "adamw" and p.dim() == 2:
                # Only the projected gradient is clipped.
                (item,) = plain.items_of(p, plain.param_groups[1], index)
                item.state.setdefault("step", 0)
                if plain.refresh_due(item):
                    plain.refresh(item)
                grad = plain.project(item)
            norms.append(grad.norm().item())
            p.grad.mul_(min(1.0, 0.01 / (norms[-1] + 1e-6)))
        expected = math.hypot(*norms)
        norms.clear()
        assert layerwise.pop_grad_norm() == pytest.approx(expected, rel=1e-3)
        plain.step()
        plain.zero_grad()
    assert layerwise.pop_grad_norm() == 0.0
    for mine, theirs in zip(weights(model), weights(other)):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


def test_a_second_layerwise_optimizer_takes_over():
    model, other = make_model(), make_model()
    make_optimizer("adamw", model, layerwise=True)
    first = make_optimizer("adamw", model, layerwise=True)
    second = make_optimizer("adamw", model, layerwise=True)
    alone = make_optimizer("adamw", other, layerwise=True)
    backward(model, 0)
    backward(other, 0)
    assert not first.state and second.state and alone.state
    assert all(map(torch.equal, weights(model), weights(other)))
    second.close()
    backward(model, 1)
    assert model[0].weight.grad is not None
