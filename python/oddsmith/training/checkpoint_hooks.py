"""Checkpoints that are whole or not there."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

from torch import nn
from transformers.trainer_utils import SaveStrategy

from ..errors import CheckpointError
from ..stage import sync
from .checkpoints import STATE_FILE, newest_whole
from .rotation import keep_best, rotate
from .trainer_parts import TrainerParts

# In the output folder; transformers uploads nothing whose name begins like this.
STAGE = "_unfinished"
_BY_EVALUATION = (SaveStrategy.STEPS, SaveStrategy.EPOCH, SaveStrategy.BEST)
# How torch and safetensors, whose errors are of their own kinds, say that a write failed.
_WRITE = re.compile(r"PytorchStreamWriter|unexpected pos|file write failed|I/O error|os error")


class CheckpointHooks(TrainerParts):
    """
    Part of [`~oddsmith.ORPOTrainer`]: a checkpoint is written below `_unfinished` in the output folder,
    by all processes, and gets its place and name when it is on disk.
    """

    # How to go on after a stop, for its message.
    how_to_go_on = "trainer.train(resume_from_checkpoint=True)"

    _staging = False

    def _get_output_dir(self, trial: Any) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, STAGE) if self._staging else folder

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if not self._staging:
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """
        See [`~transformers.Trainer`].

        Raises:
            CheckpointError: If it cannot be written, as on a full disk; those before are as they were.
        """
        folder = Path(self._get_output_dir(trial))
        stage = folder / STAGE
        place = folder / f"checkpoint-{self.state.global_step}"
        try:
            self._clear(stage)
            self._staging = True
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._staging = False
            self._name_best(folder, stage / place.name)
            self._publish(stage, place)
        except BaseException as error:
            shutil.rmtree(stage, ignore_errors=True)
            if not is_of_the_disk(error):
                raise
            raise CheckpointError(self._not_saved(place, error)) from error
        if self.args.push_to_hub:
            super()._push_from_checkpoint(str(place))
        if self.args.should_save:
            rotate(folder, self.args.save_total_limit, self.state.best_model_checkpoint, stage)

    def _finalize_training(self, trial: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.args.load_best_model_at_end:
            self._keep_best(trial)
        return super()._finalize_training(trial, *args, **kwargs)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._keep_best(self._trial)

    def _keep_best(self, trial: Any) -> None:
        """What transformers does next, file by file."""
        best = self.state.best_model_checkpoint
        if self.args.should_save and best is not None and self.args.save_total_limit == 1:
            folder = Path(self._get_output_dir(trial))
            keep_best(folder, best, folder / STAGE)

    def _init_training_state(
        self,
        max_steps: int,
        num_update_steps_per_epoch: int,
        num_train_epochs: int,
        resume_from_checkpoint: str | None,
        trial: Any,
    ) -> tuple[int, int]:
        """
        See [`~transformers.Trainer`], which counts the batches of a stream from the start of the run, and
        skips as many of its first pass: a run that had begun a second one went on with other rows.
        """
        counts = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        rows = self.train_dataset
        if resume_from_checkpoint is None or self.args.ignore_data_skip or hasattr(rows, "__len__"):
            return counts
        if self.state.global_step >= max_steps:  # transformers would train one step more
            return num_train_epochs, 0
        path = Path(resume_from_checkpoint) / STATE_FILE
        if not path.is_file():
            return counts
        saved = json.loads(path.read_text(encoding="utf-8"))
        # The passes, and the batches of this one as a share of those of all steps.
        passes, share = divmod(saved.get("epoch") or 0.0, 1.0)
        batches = saved["max_steps"] * self.args.gradient_accumulation_steps
        return int(passes), round(share * batches)

    def _clear(self, stage: Path) -> None:
        """Removes what a run that was killed has left, before any process writes."""
        if self.args.local_process_index == 0:
            shutil.rmtree(stage, ignore_errors=True)
        self.accelerator.wait_for_everyone()

    def _name_best(self, folder: Path, staged: Path) -> None:
        # transformers has looked for it in the stage.
        step, state = self.state.best_global_step, self.state
        if step and self.args.save_strategy in _BY_EVALUATION:
            best = folder / f"checkpoint-{step}"
            if step == state.global_step or best.exists():
                state.best_model_checkpoint = str(best)
        if self.args.should_save:
            state.save_to_json(str(staged / STATE_FILE))

    def _publish(self, stage: Path, place: Path) -> None:
        first, first_here = self.args.process_index == 0, self.args.local_process_index == 0
        self.accelerator.wait_for_everyone()  # all have written their parts
        if first_here:
            for path in (stage / place.name).rglob("*"):
                sync(path)
        self.accelerator.wait_for_everyone()
        if first:
            _rename(stage, place)
        self.accelerator.wait_for_everyone()
        # Machines that share no file system have parts of their own.
        if first_here and not first and stage.is_dir():
            _rename(stage, place)

    def _not_saved(self, place: Path, error: BaseException) -> str:
        whole = newest_whole(place.parent)
        kept = f"{whole} is whole; to go on from there: {self.how_to_go_on}"
        return f"{place} was not saved: {error}. " + (kept if whole else "There is none before it.")


def _rename(stage: Path, place: Path) -> None:
    """Gives a checkpoint its place, which one of an earlier run may have."""
    made = stage / place.name
    if not made.is_dir():
        return
    if place.exists():
        os.rename(place, stage / "replaced")
    os.rename(made, place)
    sync(place.parent)
    shutil.rmtree(stage, ignore_errors=True)


def is_of_the_disk(error: BaseException) -> bool:
    """Whether an exception says that a file cannot be read or written, as on a full disk."""
    return isinstance(error, OSError) or _WRITE.search(str(error)) is not None
