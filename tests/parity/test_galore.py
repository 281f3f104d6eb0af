"""GaLore and galore-torch 1.0, step by step, refreshes included."""

import sys
import types

import pytest
import torch
from torch import nn

from oddsmith.optim.low_rank.galore import GaLoreAdafactor, GaLoreAdamW

STEPS = 50
GAP = 7  # eight refreshes in 50 steps
SHAPES = {"tall": (40, 24), "wide": (24, 40), "square": (32, 32)}


@pytest.fixture(scope="module")
def peer():
    """galore-torch's module; its 8-bit class is not used, and cannot be imported on a CPU."""
    if "bitsandbytes" not in sys.modules:
        for name in ("bitsandbytes", "bitsandbytes.optim", "bitsandbytes.optim.optimizer"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["bitsandbytes.optim.optimizer"].Optimizer2State = object
        stubbed = True
    else:
        stubbed = False
    yield pytest.importorskip("galore_torch", reason="galore-torch is not installed")
    if stubbed:
        for name in ("bitsandbytes", "bitsandbytes.optim", "bitsandbytes.optim.optimizer"):
            del sys.modules[name]


def problem(seed: int) -> tuple[list[nn.Parameter], list[nn.Parameter], list[list[torch.Tensor]]]:
    """Two copies of parameters, and gradients for every step whose subspace drifts."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    shapes = [*SHAPES.values(), (24,)]
    start = [randn(*shape) * 0.3 for shape in shapes]
    copies = [[nn.Parameter(each.clone()) for each in start] for _ in range(2)]
    fixed = [randn(shape[0], 5) @ randn(5, shape[1]) for shape in SHAPES.values()]
    steps = []
    for _ in range(STEPS):
        noisy = [each + 0.5 * randn(*each.shape) for each in fixed]
        steps.append([*noisy, randn(24)])
    return copies[0], copies[1], steps


def groups(parameters, proj_type, **extra):
    *matrices, vector = parameters
    options = {"rank": 6, "update_proj_gap": GAP, "scale": 0.37, "proj_type": proj_type, **extra}
    return [{"params": [vector]}, {"params": matrices, **options}]


def compare(mine, theirs, steps, ours, other, tolerance):
    for step, grads in enumerate(steps):
        for copies in (mine, theirs):
            for parameter, grad in zip(copies, grads):
                parameter.grad = grad.clone()
        # Learning rates change, as under a schedule.
        for optimizer in (ours, other):
            for group in optimizer.param_groups:
                if group["lr"] is not None:
                    group["lr"] = 0.02 * (1 - step / (2 * STEPS))
        ours.step()
        other.step()
        for a, b in zip(mine, theirs):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=f"step {step}")


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right", "full"])
@pytest.mark.parametrize("correct_bias", [True, False])
def test_adamw(peer, proj_type, correct_bias):
    mine, theirs, steps = problem(seed=3)
    kwargs = {"lr": 0.02, "betas": (0.85, 0.97), "eps": 1e-4, "weight_decay": 0.1}
    kwargs["correct_bias"] = correct_bias
    ours = GaLoreAdamW(groups(mine, proj_type, svd="exact"), **kwargs)
    other = peer.GaLoreAdamW(groups(theirs, proj_type), no_deprecation_warning=True, **kwargs)
    compare(mine, theirs, steps, ours, other, 2e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"lr": 0.02, "relative_step": False, "scale_parameter": False},
        {"lr": 0.02, "relative_step": False, "scale_parameter": True, "beta1": 0.8},
        {"relative_step": True, "warmup_init": True},
    ],
    ids=["trainer", "first moment", "relative"],
)
@pytest.mark.parametrize("proj_type", ["std", "full"])
def test_adafactor(peer, options, proj_type):
    mine, theirs, steps = problem(seed=4)
    kwargs = {"weight_decay": 0.1, "decay_rate": -0.7, "clip_threshold": 0.9, **options}
    ours = GaLoreAdafactor(groups(mine, proj_type, svd="exact"), **kwargs)
    other = peer.GaLoreAdafactor(groups(theirs, proj_type), **kwargs)
    compare(mine, theirs, steps, ours, other, 2e-5)
