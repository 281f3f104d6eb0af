"""Training steps that keep the activations for which there is memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..integrations.kept_layers import KeptLayers, is_checkpointed
from .activation_budget import ActivationBudget, memory_text
from .engine import engine_of
from .step_state import StepState
from .trainer_parts import TrainerParts

logger = logging.get_logger(__name__)


class ActivationHooks(TrainerParts):
    """
    Part of [`~oddsmith.ORPOTrainer`]: `activation_budget`.

    With gradient checkpointing, as many of the last layers as the budget allows keep their
    activations. A micro-batch that runs out of memory is repeated with fewer.
    """

    # Of this run; None where all layers are recomputed.
    _activations: tuple[ActivationBudget, KeptLayers] | None = None
    # The first step of this run; None before it.
    _budget_since: int | None = None
    _said_of_budget = False

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """See [`~transformers.Trainer.train`]."""
        try:
            return super().train(*args, **kwargs)
        finally:
            if self._activations is not None:
                self._activations[1].undo()
            self._activations, self._budget_since, self._said_of_budget = None, None, False

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **named: Any
    ) -> Tensor:
        """
        See [`~transformers.Trainer.training_step`].

        Raises:
            torch.OutOfMemoryError: If memory runs out and the micro-batch cannot be repeated.
        """
        if self._budget_since is None:
            self._budget_since = self.state.global_step
            self._activations = self._new_budget(model)
        if self._activations is None:
            return super().training_step(model, inputs, *rest, **named)
        budget, kept = self._activations
        if not kept.ensure():
            return super().training_step(model, inputs, *rest, **named)
        if budget.bytes is None and self.state.global_step > self._budget_since:
            budget.look()
        before = StepState(model, self._stored_metrics)
        try:
            loss = super().training_step(model, inputs, *rest, **named)
        except torch.OutOfMemoryError as error:
            if not kept.kept_layers or self.args.world_size > 1 or not before.restore():
                if kept.kept_layers:
                    _add_note(
                        error, "Less activation_budget than now, or 'none', needs less memory."
                    )
                raise
        else:
            budget.after_batch(kept.tokens)
            self._say_kept()
            return loss
        # After the handler, because the traceback holds the tensors of the micro-batch.
        budget.halve()
        logger.warning(
            f"Memory ran out with the activations of {kept.kept_layers} layers kept: the "
            f"micro-batch is repeated, and activation_budget is {memory_text(budget.bytes or 0)} "
            "from now on."
        )
        with budget.nothing():
            torch.cuda.empty_cache()
            return super().training_step(model, inputs, *rest, **named)

    def _new_budget(self, model: nn.Module) -> tuple[ActivationBudget, KeptLayers] | None:
        setting = self.args.activation_budget
        # Trainer switches it on in `train`, so that it is off in other loops.
        if setting is None or not is_checkpointed(model):
            return None
        engine = engine_of(self.args, self.model)
        reason = None
        if engine.zero == 3 or engine.fsdp == 1 or engine.tensor > 1:
            # Processes that keep different layers would wait for each other.
            reason = f"{engine.splits} exchanges data once more when a layer is recomputed"
        elif self.args.torch_compile:
            reason = "torch_compile decides what is recomputed"
        elif self.args.device.type not in ("cpu", "cuda") and setting == "auto":
            reason = f"it is not known how much memory of {self.args.device.type} is free"
        if reason is not None:
            logger.warning_once(f"activation_budget has no effect, because {reason}.")
            return None
        budget = ActivationBudget(setting, self.args.device)
        budget.before_first_step()
        return budget, KeptLayers(model, budget)

    def _say_kept(self) -> None:
        if self._activations is None or self._said_of_budget:
            return
        budget, kept = self._activations
        if budget.bytes is None or not kept.is_measured:
            return
        self._said_of_budget = True
        logger.info(
            f"Activations of the last {kept.kept_layers} of {kept.layers} layers are kept "
            f"({memory_text(kept.kept_bytes)} for {kept.tokens} tokens), the others are recomputed; "
            f"activation_budget is {memory_text(budget(kept.tokens))}."
        )


def _add_note(error: Exception, note: str) -> None:
    add = getattr(error, "add_note", None)  # from Python 3.11 on
    if add is not None:
        add(note)
