"""Options of a group; the optimisers' tests have all messages."""

import math

import pytest
import torch

from oddsmith.optim import AdamW8bit, GaLoreAdamW, PagedAdamW8bit
from oddsmith.optim.checks import check_adam, is_count, is_number, is_positive


@pytest.mark.parametrize(
    ("value", "count", "number", "positive"),
    [
        (1, True, True, True),
        (0, False, True, False),
        (-2, False, True, False),
        (0.5, False, True, True),
        (1e-50, False, True, False),  # 0 in float32
        (1e39, False, True, False),
        (3.0, False, True, True),
        (True, False, False, False),  # an int to Python
        (math.inf, False, True, False),
        (math.nan, False, True, False),
        ("3", False, False, False),
        (None, False, False, False),
        (torch.tensor(3.0), False, False, False),
    ],
)
def test_numbers(value, count, number, positive):
    assert (is_count(value), is_number(value), is_positive(value)) == (count, number, positive)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lr": 0.0, "betas": (0.0, 0.999), "eps": 0.0, "weight_decay": 0},
        {"lr": None},  # Adafactor's rate by the step
        {"lr": 1, "eps": (1e-30, 1e-3)},
        {"rank": "not looked at"},
    ],
)
def test_what_is_allowed(options):
    assert check_adam(options) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": torch.tensor(0.1)}, "lr is a tensor; must be a number"),
        ({"lr": "fast"}, "lr is 'fast'; must be a number of at least 0"),
        ({"lr": math.nan}, "lr is nan"),
        ({"lr": math.inf}, "lr is inf"),
        ({"betas": (0.9,)}, r"betas is \(0.9,\); must be two numbers in \[0, 1\)"),
        ({"betas": (-0.1, 0.9)}, "betas is"),
        ({"eps": (1e-30, -1e-3)}, r"eps is \(1e-30, -0.001\); must be at least 0"),
        ({"weight_decay": math.nan}, "weight_decay is nan"),
        # What they are in the dtype that is computed in: infinite, 0 or 1.
        ({"lr": 1e39}, r"lr is 1e\+39; .* finite in float32"),
        ({"lr": 10**400}, "finite in float32"),
        ({"betas": (0.9, 1 - 1e-9)}, "betas is .* less than 1 in float32"),
        ({"eps": 1e-50}, "eps is 1e-50; must be 0 or a number that float32 has"),
        ({"eps": (1e-30, 1e39)}, "eps is .* must be 0 or"),
        ({"weight_decay": math.inf}, "weight_decay is inf; must be 0 or"),
    ],
)
def test_what_is_not(options, message):
    with pytest.raises(ValueError, match=message):
        check_adam(options)


@pytest.mark.parametrize("kind", [AdamW8bit, PagedAdamW8bit, GaLoreAdamW])
def test_a_step_in_a_captured_graph_is_an_error(kind, monkeypatch):
    """Before anything has changed: a replay would have the same learning rate and bias correction for ever."""
    parameter = torch.nn.Parameter(torch.ones(4, 4))
    parameter.grad = torch.ones(4, 4)
    optimizer = kind([parameter], lr=0.1)
    # torch is asked only about parameters on a GPU: without one it may not know the question.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    optimizer.step()
    before = parameter.detach().clone()
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    with pytest.raises(RuntimeError, match=f"^{kind.__name__}: a step cannot be captured"):
        optimizer.step()
    monkeypatch.undo()
    assert torch.equal(parameter, before) and optimizer.state[parameter]["step"] == 1
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    optimizer.step()
    assert not torch.equal(parameter, before)
