"""A micro-batch that is undone."""

import random

import numpy as np
import torch
from torch import nn

from oddsmith.training.metrics import MetricStore
from oddsmith.training.step_state import StepState


def backward(model):
    model(torch.ones(1, 3)).sum().backward()


def state_of(model):
    return StepState(model, MetricStore())


def test_gradients_are_removed():
    model = nn.Linear(3, 2)
    state = state_of(model)
    backward(model)
    assert model.weight.grad is not None
    assert state.restore()
    assert model.weight.grad is None and model.bias.grad is None


def test_gradients_of_earlier_batches_remain():
    model = nn.Linear(3, 2)
    backward(model)
    before = model.weight.grad.clone()
    assert state_of(model).restore()  # the forward pass has failed
    assert torch.equal(model.weight.grad, before)


def test_gradients_that_were_added_cannot_be_taken_off():
    model = nn.Linear(3, 2)
    backward(model)
    state = state_of(model)
    backward(model)
    assert not state.restore()


def test_weights_that_were_updated_in_the_backward_pass():
    model = nn.Linear(3, 2)
    state = state_of(model)
    with torch.no_grad():
        model.bias += 1.0
    assert not state.restore()


def test_frozen_weights_do_not_matter():
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    state = state_of(model)
    model.bias += 1.0
    assert state.restore()


def test_random_generators():
    def draw():
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    state = state_of(nn.Linear(3, 2))
    expected = draw()
    assert state.restore() and draw() == expected


def test_metrics():
    store = MetricStore()
    store.add("train", {"loss": torch.tensor(2.0), "number": 3.0})
    state = StepState(nn.Linear(3, 2), store)
    store.add("train", {"loss": torch.tensor(8.0), "number": 9.0, "other": 1.0})
    store.watch("train", torch.tensor(float("nan")), 1)
    assert state.restore()
    assert store.state() == [{"train": {"loss": [2.0, 1.0]}}, {"train": {"number": [3.0, 1.0]}}]
