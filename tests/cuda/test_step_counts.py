"""What a step costs the host: launches, and waits for the GPU. Neither may grow."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from oddsmith import _core, functional
from oddsmith.optim import AdamW8bit, PagedAdamW8bit
from support.operators import called

# Operators that wait for a GPU: a number, or a shape that depends on values.
_WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "_unique2", "equal")


class Waits(TorchDispatchMode):
    """Counts torch's operators that wait for a GPU, those of the core too."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").split(".")[0]
        if name in _WAITING or (name == "_to_copy" and "device" in (kwargs or {})):
            self.found[name] += 1
        return called(self, func, args, kwargs)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """An optimizer warns about NaN after each step on a CPU only."""
    monkeypatch.setattr(AdamW8bit, "report", lambda self: None)


def parts(kind, rank=4, layers=32):
    """A frozen NF4 layer and head, and a LoRA as that of a model of 7B: 448 tensors."""
    torch.manual_seed(0)
    packed, state = functional.quantize_nf4(torch.randn(64, 64))
    head = torch.randn(96, 64)
    factors = [nn.Parameter(torch.randn(rank, 64) * 0.1) for _ in range(14 * layers)]
    return packed, state, head, factors, kind(factors, lr=1e-2, min_8bit_size=256)


def step(packed, state, head, factors, optimizer, scored=10):
    """One forward and backward pass and a step of the optimizer; the loss is not read."""
    hidden = torch.linspace(-1, 1, 12 * 64).view(12, 64)
    for down, up in zip(factors[::2], factors[1::2]):
        hidden = hidden + 1e-3 * hidden @ down.t() @ up
    # The first layer of many: each launches the same.
    hidden = functional.linear_nf4(hidden, packed, state) / 8
    rows = torch.arange(12)
    result = functional.linear_orpo(
        hidden, head, rows, rows // 3, rows % 3 > 0, 0.1, num_pairs=2, num_scored=scored
    )
    result.loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def counted(driver, run):
    """Launches and waits of a step."""
    # Another test may have left its context current, and then none is set.
    driver.lib.cuCtxSetCurrent(None)
    driver.reset()
    _core.host_waits()
    with Waits() as waits:
        run()
    launches = Counter(launch.kernel for launch in driver.launches())
    return launches, {**waits.found, **_core.host_waits()}, Counter(driver.calls())


@pytest.mark.parametrize("kind", [AdamW8bit, PagedAdamW8bit])
def test_a_step_of_qlora(kind, emulated_driver, on_a_gpu):
    given = parts(kind)
    step(*given)
    launches, waits, calls = counted(emulated_driver, lambda: step(*given))
    assert launches == {
        "nf4_dequantize_f32": 2,  # forward and backward
        "head_layout": 1,
        "head_side_means_f32": 1,
        "head_expectation_f32": 1,
        "head_scores": 1,
        "head_finish_f32": 1,
        "head_scale_f32": 1,
        "adamw8bit_f32": 1,
    }
    assert waits == {}
    # Of each launch: the context is made current and the one before is restored.
    assert set(calls) == {"cuCtxGetCurrent", "cuCtxSetCurrent", "cuLaunchKernel"}
    assert calls["cuCtxSetCurrent"] == 2 * calls["cuLaunchKernel"] == 2 * launches.total()


def test_waits_are_counted(emulated_driver, on_a_gpu):
    given = parts(AdamW8bit, layers=1)
    step(*given)
    # The number of rows in the loss is not given, so it is read back.
    _, waits, _ = counted(emulated_driver, lambda: step(*given, scored=None))
    assert waits == {"item": 1}
    _, waits, _ = counted(emulated_driver, lambda: torch.ones(2).sum().item())
    assert waits == {"_local_scalar_dense": 1}
    _, waits, _ = counted(
        emulated_driver,
        lambda: _core.quantize_blockwise(torch.ones(9), torch.linspace(-1, 1, 256), 4),
    )
    assert waits, "the code is read, to check that it is ascending"


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_head(trained, emulated_driver):
    """With a trained weight, whose gradient needs another pass."""
    rows = torch.arange(12)
    leaves = [torch.randn(12, 64, requires_grad=True), torch.randn(96, 64, requires_grad=trained)]

    def run():
        options = {"num_pairs": 2, "num_scored": 10}
        functional.linear_orpo(
            *leaves, rows, rows // 3, rows % 3 > 0, 0.1, **options
        ).loss.backward()

    run()
    launches, waits, _ = counted(emulated_driver, run)
    assert launches.total() == (7 if trained else 6) and waits == {}
