"""Values to quantise, and states that do not fit."""

import copy

import torch


def heavy_tailed(*shape, dtype=torch.float32, seed=7):
    """Values over four decades, like weights with outliers."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.rand(shape, generator=generator) * 4 - 3
    return (torch.randn(shape, generator=generator) * 10**size).to(dtype)


def spoilt(state, **changes):
    state = copy.deepcopy(state)
    for name, value in changes.items():
        target = state.state2 if name.startswith("nested_") else state
        setattr(target, name.removeprefix("nested_"), value)
    return state
