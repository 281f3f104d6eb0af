"""APOLLO: its steps against the naive form."""

import pytest
import torch
from torch import nn

import reference
from oddsmith.optim.low_rank import projection
from oddsmith.optim.low_rank.apollo import APOLLOAdamW
from support.gradients import randn
from support.low_rank import decaying, make_model, make_optimizer, train, weights


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("shape", [(14, 22), (22, 14)])
def test_apollo_is_the_naive_form(scale_type, shape):
    weight = nn.Parameter(randn(*shape))
    group = {"params": [weight], "rank": 4, "update_proj_gap": 2, "scale": 3.0}
    optimizer = APOLLOAdamW(
        [{**group, "scale_type": scale_type}],
        lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1, seed=6,
    )  # fmt: skip
    naive = reference.Apollo(weight.detach().double(), scale_type, 3.0)
    for step in range(6):
        # Some steps are much larger than the last, so that the limiter is active.
        weight.grad = decaying(*shape, seed=step) * (50.0 if step in (2, 3) else 1.0)
        generator = projection.generator_for(weight.device, 6, 0, step // 2)
        small = (4, shape[1]) if shape[0] >= shape[1] else (shape[0], 4)
        basis = torch.randn(small, generator=generator).double() / 2.0
        naive.step(weight.grad.double(), basis, 0.05, (0.8, 0.95), 1e-3, 0.1)
        optimizer.step()
        torch.testing.assert_close(weight.detach().double(), naive.weight, atol=1e-5, rtol=1e-5)
    assert naive.limited  # the test covers both


def test_apollo_moves_at_a_rate_that_starts_from_zero():
    model = make_model()
    optimizer = make_optimizer("apollo", model)
    before = weights(model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, 1)
    assert all(map(torch.equal, before, weights(model)))
    for group in optimizer.param_groups:
        group["lr"] = 0.02
    train(model, optimizer, 1, start=1)
    assert all(p.isfinite().all() for p in model.parameters())
    assert not any(map(torch.equal, before, weights(model)))


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_weights_in_float64(scale_type):
    trained = []
    for dtype in (torch.float32, torch.float64):
        weight = nn.Parameter(randn(14, 22).to(dtype))
        group = {"params": [weight], "rank": 4, "scale_type": scale_type}
        optimizer = APOLLOAdamW([group], lr=0.05)
        for step in range(3):
            weight.grad = decaying(14, 22, seed=step).to(dtype)
            optimizer.step()
        trained.append(weight.detach())
    assert trained[1].dtype == torch.float64
    torch.testing.assert_close(trained[1].float(), trained[0], atol=1e-5, rtol=1e-5)
