"""Changes the user's model only during a run, and restores it afterwards."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..integrations.cpu_memory import pooled_memory
from ..integrations.patch import Patch
from ..optim.low_rank.layerwise import LayerwiseHooks
from .models import check_trainable, run_patches
from .trainer_parts import TrainerParts


class ModelLoan(TrainerParts):
    """
    Part of [`~oddsmith.ORPOTrainer`]: dropout, gradients of embeddings and layers of bitsandbytes
    are changed within `train`, `evaluate` and `predict`, and restored after them.

    A hook that is called directly, as in a custom training loop, changes the model too; it is
    restored when the next of those calls, or the trainer, ends. Run the backward pass before that,
    because a layer that is recomputed after it has its own dropout again.
    """

    _patches: list[Patch] = []
    _return: Any = None
    # Active calls of train, evaluate and predict, one within another.
    _running: int = 0

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """
        See [`~transformers.Trainer.train`].

        Raises:
            ValueError: If no parameter of the model is trainable.
        """
        if self.model is not None:  # otherwise model_init makes it
            check_trainable(self.model)
        with self._loan(), pooled_memory(self.args.device):
            return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """See [`~transformers.Trainer.evaluate`]."""
        with self._loan(), pooled_memory(self.args.device):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        """See [`~transformers.Trainer.predict`]."""
        with self._loan(), pooled_memory(self.args.device):
            return super().predict(*args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """See [`~transformers.Trainer.training_step`]."""
        self._borrow()
        return super().training_step(*args, **kwargs)

    def _lend(self, model: nn.Module) -> None:
        """Replaces the previous model, if any."""
        if self._return is not None:
            self._return()
        self._patches = run_patches(model, self.args)
        self._return = weakref.finalize(self, _undo, self._patches)
        if self._running:
            self._borrow()

    def _borrow(self) -> None:
        for patch in self._patches:
            patch.ensure()
        if torch.is_grad_enabled():  # without gradients, as in prediction_step, none is updated
            # Those of another trainer, after a direct call, would take the gradients of this one.
            own = getattr(self._own_optimizer(), "layerwise_hooks", None)
            LayerwiseHooks.detach_others(self.model.parameters(), own)
            self._layerwise_hooks("attach")

    @contextmanager
    def _loan(self) -> Iterator[None]:
        self._borrow()
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1
            if not self._running:
                _undo(self._patches)
                self._layerwise_hooks("detach")

    def _layerwise_hooks(self, action: str) -> None:
        # Otherwise these hooks would still update the parameters under another trainer.
        hooks = getattr(self._own_optimizer(), "layerwise_hooks", None)
        if hooks is not None:
            getattr(hooks, action)()


def _undo(patches: list[Patch]) -> None:
    for patch in reversed(patches):
        patch.undo()
