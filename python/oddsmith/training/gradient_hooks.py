"""Gradients of a training run: their norm, and whether there are any."""

from typing import Any

import torch
from torch import nn

from .trainer_parts import TrainerParts


class GradientHooks(TrainerParts):
    """Part of [`~oddsmith.ORPOTrainer`]: what is asked of the gradients of a step."""

    # Whether a step of this trainer had gradients.
    _has_trained = False
    # The loss of the last micro-batch.
    _last_loss: Any = None

    def _own_optimizer(self) -> Any:
        optimizer = getattr(self, "optimizer", None)
        # Within accelerate's wrapper and DeepSpeed's.
        while (inner := getattr(optimizer, "optimizer", None)) is not None:
            optimizer = inner
        return optimizer

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        optimizer = self._own_optimizer()
        if getattr(optimizer, "layerwise", False):
            norm = optimizer.pop_grad_norm()  # the gradients are already freed
        else:
            norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        if not self._has_trained:
            self._check_gradients(norm)
        return norm

    def _check_gradients(self, norm: Any) -> None:
        """
        Checks the first step, which waits for the device.

        Raises:
            RuntimeError: If its gradients are all zero though its loss is not.
        """
        # DeepSpeed's norm is that of the step which it has just made, with a weight decay alone if there
        # were no gradients. It has none where its configuration says so, and of a step that overflowed.
        if norm is None or self.accelerator.optimizer_step_was_skipped:
            return
        loss = self._last_loss
        if loss is not None and not bool(torch.count_nonzero(loss)):
            return  # no completion in this batch
        self._has_trained = True
        if float(norm) == 0.0:
            raise RuntimeError(
                "the gradients of the first step are all zero, so that nothing would be trained: no "
                "trainable parameter has an effect on the loss. The model's layers may give no "
                "gradient, as 4-bit layers of bitsandbytes on a CPU after an evaluation; load the "
                "model again, or with oddsmith.NF4Config"
            )
