"""A small model, low-rank optimisers and steps, for their tests."""

import torch
from torch import nn

from oddsmith.optim.low_rank.apollo import APOLLOAdamW
from oddsmith.optim.low_rank.galore import GaLoreAdafactor, GaLoreAdamW
from oddsmith.optim.low_rank.galore_8bit import GaLoreAdamW8bit
from support.gradients import randn

CLASSES = {
    "adamw": (GaLoreAdamW, {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-5}),
    "adamw8bit": (GaLoreAdamW8bit, {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-5}),
    "adafactor": (GaLoreAdafactor, {"lr": 0.02, "relative_step": False, "scale_parameter": False}),
    "apollo": (APOLLOAdamW, {"lr": 0.02, "betas": (0.8, 0.95), "eps": 1e-5}),
}


# scale is an option of every class, with another default in each.
LOW = {"rank": 5, "update_proj_gap": 3, "scale": 0.6}


def decaying(rows, columns, seed=0, power=1.0):
    """A matrix with singular values 1, 2^-power, 3^-power, ..."""
    small = min(rows, columns)
    left = torch.linalg.qr(randn(rows, small, seed=seed)).Q
    right = torch.linalg.qr(randn(columns, small, seed=seed + 1)).Q
    return left @ torch.diag(torch.arange(1, small + 1) ** -power) @ right.T


def make_model(dtype=torch.float32):
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)).to(dtype)


def make_groups(model, **extra):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    return [{"params": vectors}, {"params": matrices, "weight_decay": 0.05, **LOW, **extra}]


def make_optimizer(name, model, extra=None, **options):
    kind, kwargs = CLASSES[name]
    return kind(make_groups(model, **(extra or {})), **{**kwargs, **options})


def backward(model, step, parts=1, part=0):
    x = randn(16, 12, seed=100 + step)[part::parts]
    y = randn(16, 8, seed=200 + step)[part::parts]
    loss = (model(x.to(model[0].weight.dtype)).float() - y).square().mean() / parts
    loss.backward()
    return loss


def train(model, optimizer, steps, start=0, parts=1):
    for step in range(start, start + steps):
        for part in range(parts):
            backward(model, step, parts, part)
        optimizer.step()
        optimizer.zero_grad()


def weights(model):
    return [p.detach().clone() for p in model.parameters()]


def tensors_of(state):
    return [value for value in state.values() if torch.is_tensor(value)]
