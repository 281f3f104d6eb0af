"""GaLore: steps compared with the naive form, the adaptive gap, memory."""

import pytest
import torch
from torch import nn

import reference
from oddsmith.optim.low_rank.apollo import APOLLOAdamW
from oddsmith.optim.low_rank.galore import GaLoreAdamW, optimizer_bytes
from support.gradients import randn
from support.low_rank import decaying


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_adamw_is_the_naive_form(proj_type, dtype):
    weight = nn.Parameter(randn(14, 22).to(dtype))
    naive = reference.GaLoreAdamW(weight.detach().double(), 4, 2, 0.6, proj_type)
    group = {"params": [weight], "rank": 4, "update_proj_gap": 2, "scale": 0.6}
    optimizer = GaLoreAdamW(
        [{**group, "proj_type": proj_type, "svd": "exact"}],
        lr=0.05, betas=(0.8, 0.95), eps=1e-3, weight_decay=0.1,
    )  # fmt: skip
    for step in range(6):
        weight.grad = (decaying(14, 22, seed=step) + decaying(14, 22, seed=9)).to(dtype)
        naive.step(weight.grad.double(), lr=0.05, betas=(0.8, 0.95), eps=1e-3, decay=0.1)
        optimizer.step()
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(
        weight.detach().double(), naive.weight, atol=tolerance, rtol=tolerance
    )


def test_the_gap_doubles_where_the_subspace_stays():
    stays, drifts = nn.Parameter(randn(20, 30)), nn.Parameter(randn(20, 30, seed=1))
    optimizer = GaLoreAdamW(
        [{"params": [stays, drifts], "rank": 3, "update_proj_gap": 2, "adaptive_gap": True,
          "overlap_patience": 2, "overlap_threshold": 0.6}],
        lr=0.0,
    )  # fmt: skip
    fixed, refreshes = decaying(20, 30), []
    for step in range(16):
        stays.grad, drifts.grad = fixed.clone(), decaying(20, 30, seed=10 + 2 * step)
        due = optimizer.state[stays].get("next_refresh", 0)
        refreshes += [step] if due == step else []
        optimizer.step()
    # Bases at 0, 2 and 4 agree twice; from then on each refresh doubles the gap.
    assert refreshes == [0, 2, 4, 8]
    assert optimizer.state[stays]["gap"] == 8 and optimizer.state[drifts]["gap"] == 2


def test_memory_is_that_of_the_formula():
    rows, columns, rank = 64, 96, 8
    weight = nn.Parameter(randn(rows, columns))
    optimizer = GaLoreAdamW([{"params": [weight], "rank": rank}])
    weight.grad = randn(rows, columns, seed=1)
    optimizer.step()
    assert optimizer_bytes(optimizer) == 4 * (rows * rank + 2 * columns * rank)
    apollo = APOLLOAdamW([{"params": [weight], "rank": rank}])
    apollo.step()
    assert optimizer_bytes(apollo) == 4 * (2 * columns * rank + 1)
