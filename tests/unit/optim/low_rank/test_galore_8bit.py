"""The 8-bit moments of GaLoreAdamW8bit: codes, distance from fp32, small gradients, groups."""

import math

import pytest
import torch
from torch import nn

from oddsmith.optim import GaLoreAdamW, GaLoreAdamW8bit, optimizer_bytes
from support.gradients import randn, train


def test_small_gradients_move_as_far():
    """Within a block, gradients from 1 to 1e-5: Adam moves all equally, also with 8 bits."""
    sizes = 10.0 ** -(torch.arange(64 * 128).view(64, 128) % 6)
    ours, full = nn.Parameter(torch.zeros(64, 128)), nn.Parameter(torch.zeros(64, 128))
    kwargs = {"lr": 1e-3, "eps": 1e-12, "weight_decay": 0.0}

    def gradient(step):
        return sizes * (1.0 + 0.3 * randn(64, 128, seed=step))

    train(GaLoreAdamW8bit([ours], **kwargs), ours, 100, gradient)
    train(GaLoreAdamW([full], **kwargs), full, 100, gradient)
    moved = (ours / full).detach()
    for size in range(6):
        assert 0.85 < moved[sizes == 10.0**-size].mean() < 1.15, size
    assert moved.min() > 0.4 and moved.max() < 2.0


def test_close_to_fp32():
    ours, full = nn.Parameter(randn(96, 160)), nn.Parameter(randn(96, 160))
    start = full.detach().clone()
    low_rank = {"rank": 48, "update_proj_gap": 20, "scale": 0.5}
    kwargs = {"lr": 1e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.01}
    fixed = randn(96, 160, seed=1)

    def gradient(step):  # the bases are the same for both
        return fixed + 0.5 * randn(96, 160, seed=50 + step)

    eight = GaLoreAdamW8bit([{"params": [ours], **low_rank}], **kwargs)
    assert "state1" not in eight.state[ours]
    train(eight, ours, 150, gradient)
    train(GaLoreAdamW([{"params": [full], **low_rank}], **kwargs), full, 150, gradient)
    assert "state1" in eight.state[ours]
    distance = (full.detach() - start).norm()
    assert distance > 1.0
    assert (ours.detach() - full.detach()).norm() < 0.03 * distance


def test_a_zero_gradient_moves_nothing():
    weight = nn.Parameter(randn(64, 128))
    before = weight.detach().clone()
    optimizer = GaLoreAdamW8bit([weight], lr=0.1, weight_decay=0.0)
    train(optimizer, weight, 5, lambda step: torch.zeros(64, 128))
    assert torch.equal(weight, before) and "state1" in optimizer.state[weight]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strided_parameters(dtype):
    flat = nn.Parameter(randn(128, 64).to(dtype))
    strided = nn.Parameter(randn(128, 64).to(dtype).T.contiguous().T)
    assert not strided.is_contiguous()
    for weight in (flat, strided):
        optimizer = GaLoreAdamW8bit([weight], lr=0.01, weight_decay=0.05)
        train(optimizer, weight, 4, lambda step: randn(128, 64, seed=step).to(dtype))
    # The state of the strided one is in another order: other blocks, other roundings.
    torch.testing.assert_close(flat, strided, atol=2e-3, rtol=1e-2)


def test_memory_is_that_of_the_formula():
    weight = nn.Parameter(randn(96, 160))
    optimizer = GaLoreAdamW8bit([{"params": [weight], "rank": 32}])
    weight.grad = randn(96, 160, seed=1)
    optimizer.step()
    moments = 160 * 32
    expected = 4 * 96 * 32 + 2 * moments + 2 * 4 * moments // 256 + 2 * 4 * 256
    assert optimizer_bytes(optimizer) == expected


def test_small_ones_and_those_of_32_bits_are_fp32():
    small, large, table = (nn.Parameter(randn(*shape)) for shape in ((63, 65), (64, 64), (64, 64)))
    optimizer = GaLoreAdamW8bit([{"params": [small, large]}, {"params": [table], "optim_bits": 32}])
    for each in (small, large, table):
        each.grad = torch.ones_like(each)
    optimizer.step()
    names = ["state1" in optimizer.state[each] for each in (small, large, table)]
    assert names == [False, True, False]
    with pytest.raises(ValueError, match="optim_bits is 4; must be 8 or 32"):
        GaLoreAdamW8bit([small], optim_bits=4)
    with pytest.raises(ValueError, match="optim_bits is 16"):
        optimizer.add_param_group({"params": [nn.Parameter(randn(3))], "optim_bits": 16})


def test_maps_are_shared_again_after_loading():
    weights = [nn.Parameter(randn(64, 64, seed=seed)) for seed in range(3)]
    optimizer = GaLoreAdamW8bit(weights)
    for each in weights:
        each.grad = torch.ones_like(each)
    optimizer.step()
    before = optimizer_bytes(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer_bytes(optimizer) == before
    assert math.isclose(before, 3 * (2 * 4096 + 2 * 4 * 16) + 2 * 1024)
