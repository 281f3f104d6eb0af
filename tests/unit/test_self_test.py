"""The self-test passes with the core as it is, and names what a wrong one does."""

import pytest
import torch

from oddsmith import functional, self_test


def test_the_core_passes():
    assert self_test.run() is None


def wrong_head(hidden, weight, targets):
    return torch.log_softmax(hidden @ weight.T, -1)[:, 0]  # of token 0, whatever the targets


def no_gradient(hidden, weight, targets):
    scored = targets >= 0
    logps = torch.log_softmax(hidden @ weight.T, -1)
    picked = logps.gather(1, targets.clamp(min=0)[:, None])[:, 0]
    return torch.where(scored, picked, 0.0) + 0 * picked.sum().detach() + hidden.sum() * 1e-3


def crash(*arguments):
    raise RuntimeError("a missing symbol")


@pytest.mark.parametrize(
    ("name", "replacement", "message"),
    [
        ("linear_logps", wrong_head, "log-probabilities and gradients differ"),
        ("linear_logps", no_gradient, "log-probabilities and gradients differ"),
        ("linear_logps", crash, "log-probabilities and gradients: a missing symbol"),
        ("dequantize_nf4", lambda packed, state: torch.zeros(3, 43), "4-bit weights differ"),
        ("quantize_nf4", crash, "4-bit weights: a missing symbol"),
    ],
)
def test_a_wrong_core_is_named(monkeypatch, name, replacement, message):
    monkeypatch.setattr(functional, name, replacement)
    assert self_test.run() == message


def test_a_core_without_its_errors_is_named(monkeypatch):
    monkeypatch.setattr(self_test, "CHECKS", {"errors": self_test.CHECKS["errors"]})
    monkeypatch.setattr(functional, "linear_logps", lambda *arguments: torch.zeros(2))
    assert self_test.run() == "errors differ"
