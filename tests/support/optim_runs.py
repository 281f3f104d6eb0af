"""Runs of the trainer with an optimiser by name, and their checkpoints."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from oddsmith import ORPOConfig, ORPOTrainer

from .trainer_runs import arguments, make_model, make_tokenizer, pairs, train_logs

STEPS, SAVED = 6, 4


def config(folder: Path, **changed: Any) -> dict[str, Any]:
    """Another learning rate at every step, and a checkpoint before the end."""
    options = {
        "lr_scheduler_type": "linear",
        "adam_epsilon": 1e-6,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": SAVED,
        **changed,
    }
    return arguments(folder, **options)


def run(
    folder: Path,
    resume: str | None = None,
    rows: Any = None,
    callbacks: list[Any] | None = None,
    peft_config: Any = None,
    **changed: Any,
) -> ORPOTrainer:
    """The trainer after training."""
    tokenizer = make_tokenizer()
    trainer = ORPOTrainer(
        make_model("mistral", tokenizer),
        ORPOConfig(**config(folder, **changed)),
        train_dataset=pairs(16) if rows is None else rows,
        processing_class=tokenizer,
        callbacks=callbacks,
        peft_config=peft_config,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def checkpoint(folder: Path) -> str:
    return str(folder / f"checkpoint-{SAVED}")


def weights(trainer: ORPOTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def sums(trainer: ORPOTrainer) -> dict[str, float]:
    return {name: p.double().sum().item() for name, p in trainer.model.named_parameters()}


def losses(trainer: ORPOTrainer) -> dict[int, tuple[float, float]]:
    return {log["step"]: (log["loss"], log["grad_norm"]) for log in train_logs(trainer)}


def check_same_end(resumed: ORPOTrainer, through: ORPOTrainer) -> None:
    """The steps after the checkpoint, and the weights, are bit-identical."""
    after = {step: values for step, values in losses(through).items() if step > SAVED}
    assert len(after) == STEPS - SAVED
    assert {step: losses(resumed)[step] for step in after} == after
    for key, weight in weights(through).items():
        assert torch.equal(weight, weights(resumed)[key]), key


class Kill(TrainerCallback):
    """Ends the process after the checkpoint, as the system does when memory runs out."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == SAVED + 1:
            os.kill(os.getpid(), signal.SIGKILL)


def killed_run(file: str, folder: Path, *arguments: str) -> str:
    """The checkpoint of a process, `file kill folder ...`, that is killed."""
    command = [sys.executable, file, "kill", str(folder), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == -signal.SIGKILL, done.stderr[-4000:]
    return checkpoint(folder)
