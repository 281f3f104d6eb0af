"""What a micro-batch changes, so that it can be repeated."""

from __future__ import annotations

import random

import numpy as np
import torch
from torch import nn

from .metrics import MetricStore

__all__ = ["StepState"]


class StepState:
    """
    The state before a micro-batch: of gradients, metrics and random generators.

    Args:
        model (`nn.Module`): The model.
        metrics ([`~oddsmith.training.metrics.MetricStore`]): The trainer's.
    """

    def __init__(self, model: nn.Module, metrics: MetricStore) -> None:
        self._parameters = [
            (each, each._version, each.grad, 0 if each.grad is None else each.grad._version)
            for each in model.parameters()
            if each.requires_grad
        ]
        self._metrics, self._kept = metrics, metrics.state()
        self._random = random.getstate(), np.random.get_state(), torch.get_rng_state()
        devices = {each.device for each in model.parameters() if each.device.type == "cuda"}
        self._devices = {device: torch.cuda.get_rng_state(device) for device in devices}

    def restore(self) -> bool:
        """
        Restores it after an error.

        Returns:
            `bool`: Whether it is as before: gradients that were added to others cannot be taken
            off, and weights that were updated in the backward pass neither.
        """
        for each, version, grad, added in self._parameters:
            if each._version != version:
                return False
            if grad is not None and (each.grad is not grad or grad._version != added):
                return False
        for each, _, grad, _ in self._parameters:
            each.grad = grad
        self._metrics.set_state(self._kept)
        python, numpy, host = self._random
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(host)
        for device, state in self._devices.items():
            torch.cuda.set_rng_state(state, device)
        return True
