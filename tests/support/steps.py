"""Training steps of one model on several paths: their losses and gradients, and how far apart they are."""

from __future__ import annotations

import copy
import math
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback

from oddsmith import ORPOConfig, ORPOTrainer
from oddsmith.integrations.model_path import TrainingPath

__all__ = ["Steps", "distance", "steps"]

Gradients = dict[str, Tensor]


@dataclass
class Steps:
    """
    What a run of a few steps was like.

    Args:
        path ([`TrainingPath`]): The path that its batches took.
        losses (`list[float]`): The loss of each batch, divided by the batches of a step.
        gradients (`list[dict[str, Tensor]]`): The gradients of each step, clipped.
        weights (`dict[str, Tensor]`): The trained weights after the last step.
    """

    path: TrainingPath
    losses: list[float] = field(default_factory=list)
    gradients: list[Gradients] = field(default_factory=list)
    weights: Gradients = field(default_factory=dict)


class _Recorder(TrainerCallback):
    def __init__(self) -> None:
        self.gradients: list[Gradients] = []

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        named = model.named_parameters()
        self.gradients.append({n: p.grad.detach().clone() for n, p in named if p.grad is not None})


def steps(
    model: Any,
    rows: Dataset,
    tokenizer: Any,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
    **changed: Any,
) -> Steps:
    """
    Train a copy of a model.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        rows (`Dataset`): Its pairs, in the order of the batches.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        around (`Callable`, *optional*): Makes a context for each forward and backward pass.
        changed: Arguments of the run other than the usual: two steps of plain gradient descent.
    """
    recorder = _Recorder()
    losses: list[float] = []

    class Trainer(ORPOTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            with around():
                loss = super().training_step(*args, **kwargs)
            losses.append(loss.item())
            return loss

    with tempfile.TemporaryDirectory() as folder:
        options = {
            "output_dir": folder,
            "per_device_train_batch_size": 3,
            "max_steps": 2,
            # Steps of a bounded length: the second one shows what the first has done.
            "optim": "sgd",
            "learning_rate": 0.02,
            "lr_scheduler_type": "constant",
            "max_grad_norm": 1.0,
            "gradient_checkpointing": False,
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
            "beta": 0.3,
            "max_length": 64,
            "save_strategy": "no",
            "report_to": "none",
            "bf16": False,
            "use_cpu": True,
            "disable_tqdm": True,
            "seed": 7,
            **changed,
        }
        trainer = Trainer(
            model=copy.deepcopy(model),
            args=ORPOConfig(**options),
            train_dataset=rows,
            processing_class=copy.deepcopy(tokenizer),
            callbacks=[recorder],
        )
        path = trainer.path
        trainer.train()
    named: Any = trainer.model
    return Steps(
        path,
        losses,
        recorder.gradients,
        {n: p.detach().clone() for n, p in named.named_parameters() if p.requires_grad},
    )


def distance(one: Gradients, other: Gradients) -> float:
    """The norm of the difference of two sets of tensors in that of the second; a missing one is zero."""
    apart = whole = 0.0
    for name in one.keys() | other.keys():
        mine, theirs = (each[name].double() if name in each else None for each in (one, other))
        zero = torch.zeros(())
        mine, theirs = (zero if each is None else each for each in (mine, theirs))
        apart += (mine - theirs).square().sum().item()
        whole += theirs.square().sum().item()
    if whole == 0.0:
        return 0.0 if apart == 0.0 else math.inf
    return math.sqrt(apart / whole)
