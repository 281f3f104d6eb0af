"""Optimisers give the same steps on a GPU as on a CPU."""

import pytest
import torch
from torch import nn

import oddsmith.optim

LOW_RANK = {"rank": 8, "update_proj_gap": 4, "scale": 0.5, "svd": "exact"}
# A budget in which the state of the larger parameters does not fit at once.
FULL = {
    "AdamW8bit": {},
    "PagedAdamW8bit": {"device_budget": 16 << 10},
    "PagedAdamW32bit": {"device_budget": 64 << 10},
}
SHAPES = [(96, 64), (40, 130), (4096,), (5003,), (7,)]


def train(kind, device, dtype, steps=9, low_rank=None, **options):
    """Parameters after some steps of gradients over four decades, some of them zero."""
    generator = torch.Generator().manual_seed(4)
    parameters, gradients = [], []
    for shape in SHAPES:
        start = torch.randn(shape, generator=generator).to(dtype)
        parameters.append(nn.Parameter(start.to(device)))
        size = 10.0 ** (torch.rand(shape, generator=generator) * 4 - 4)
        draws = [torch.randn(shape, generator=generator) * size for _ in range(steps)]
        gradients.append([draw * (size > 3e-4) for draw in draws])
    groups = parameters
    if low_rank:
        matrices, vectors = parameters[:2], parameters[2:]
        groups = [{"params": vectors}, {"params": matrices, **low_rank}]
    optimizer = kind(groups, lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.03, **options)
    for step in range(steps):
        for parameter, draws in zip(parameters, gradients):
            parameter.grad = draws[step].to(dtype).to(device)
        optimizer.step()
    return [parameter.detach().cpu() for parameter in parameters]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FULL)
def test_adamw(gpu, name, dtype):
    kind = getattr(oddsmith.optim, name)
    with gpu.slices():
        expected = train(kind, "cpu", dtype, **FULL[name])
    found = train(kind, gpu.device, dtype, **FULL[name])
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs), (ours - theirs).abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_stochastic_rounding_draws_the_same(gpu, dtype):
    kind = oddsmith.optim.AdamW8bit
    with gpu.slices():
        expected = train(kind, "cpu", dtype, stochastic_rounding=True, seed=8)
        nearest = train(kind, "cpu", dtype)
    found = train(kind, gpu.device, dtype, stochastic_rounding=True, seed=8)
    assert all(map(torch.equal, found, expected))
    assert (dtype == torch.float32) == all(map(torch.equal, found, nearest))


@pytest.mark.parametrize("name", ["GaLoreAdamW", "GaLoreAdamW8bit"])
def test_galore(gpu, name):
    kind = getattr(oddsmith.optim, name)
    with gpu.slices():
        expected = train(kind, "cpu", torch.float32, low_rank=LOW_RANK)
    found = train(kind, gpu.device, torch.float32, low_rank=LOW_RANK)
    for ours, theirs in zip(found, expected, strict=True):
        # A step is about lr; if a projected gradient is near zero, rounding in the decomposition
        # affects it.
        assert (ours - theirs).abs().max() < 2e-3
