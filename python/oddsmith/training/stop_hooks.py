"""A run that SIGTERM stops: after a step, with a whole checkpoint."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed
from transformers import TrainerCallback, TrainerControl
from transformers.utils import logging

from .checkpoints import newest_whole
from .trainer_parts import TrainerParts

logger = logging.get_logger(__name__)


class Stopped(SystemExit):
    """
    Ends a run that a signal has stopped, with the exit code that shells give such a process.

    Args:
        checkpoint (`Path`): Where the run goes on.
    """

    def __init__(self, checkpoint: Path):
        super().__init__(128 + signal.SIGTERM)
        self.checkpoint = checkpoint


class StopOnSignal(TrainerCallback):
    """
    Saves a checkpoint and ends training when a process of the run has got SIGTERM.

    transformers' own callback for `enable_jit_checkpoint` saves in the middle of a step, and each
    process by its own clock: those of one run may save different steps, or wait for each other
    without end. Here the processes agree on the step: each tells the others after a step whether it
    was asked to stop, and looks at what they have said after the next one, so that no step waits
    for it.

    Args:
        device (`torch.device`): Device of this process.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.asked = False
        self.stops = False
        self._said: tuple[Any, torch.Tensor] | None = None
        self._stream: Any = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes SIGTERM while it lasts, where that is possible: in the main thread."""
        self.asked = self.stops = False
        self._said = None
        if threading.current_thread() is not threading.main_thread():
            logger.warning("SIGTERM saves no checkpoint: training does not run in the main thread.")
            yield
            return
        before = signal.signal(signal.SIGTERM, self._ask)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> Any:
        """See [`~transformers.TrainerCallback`]."""
        if not self._agreed():
            return control
        self.stops = True
        control.should_save = control.should_log = control.should_training_stop = True
        control.should_evaluate = False  # there may be half a minute left
        return control

    def on_train_end(self, args: Any, state: Any, control: TrainerControl, **kwargs: Any) -> None:
        """See [`~transformers.TrainerCallback`]."""
        self._heard()

    def _agreed(self) -> bool:
        if not (distributed.is_available() and distributed.is_initialized()):
            return self.asked
        heard = self._heard()
        if not heard:
            flag = torch.full((1,), float(self.asked), device=self.device)
            work = distributed.all_reduce(flag, distributed.ReduceOp.MAX, async_op=True)
            self._said = work, flag
        return heard

    def _heard(self) -> bool:
        """Whether a process had been asked to stop, one step ago."""
        if self._said is None:
            return False
        (work, flag), self._said = self._said, None
        if flag.device.type != "cuda":
            work.wait()
            return bool(flag.item())
        # On a stream of its own, so that this does not wait for the step that runs now.
        self._stream = self._stream or torch.cuda.Stream(flag.device)
        with torch.cuda.stream(self._stream):
            work.wait()
            return bool(flag.item())


class StopHooks(TrainerParts):
    """Part of [`~oddsmith.ORPOTrainer`]: stops on SIGTERM, and goes on from whole checkpoints."""

    _stop: StopOnSignal | None = None

    def _stop_on_signal(self) -> None:
        """Adds the callback, after all others: it overrules what they ask for."""
        if self.is_distributed_loading_by_transformers:
            logger.warning(
                "SIGTERM saves no checkpoint: transformers cannot resume a run whose model it has split "
                "(DistributedConfig). Use FSDP2 by arguments, or enable_jit_checkpoint=False."
            )
            return
        self._stop = StopOnSignal(self.accelerator.device)
        self.add_callback(self._stop)

    def train(
        self,
        resume_from_checkpoint: Any = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """
        See [`~transformers.Trainer.train`]; `True` is the newest checkpoint that is whole.

        Raises:
            Stopped: After SIGTERM, with `enable_jit_checkpoint`.
        """
        resume = resume_from_checkpoint
        if resume is True:
            folder = self.args.output_dir or "."
            # None: Trainer raises its error.
            found = newest_whole(folder)
            resume = True if found is None else str(found)
        if self._stop is None:
            return super().train(resume, trial, ignore_keys_for_eval)
        with self._stop.listening():
            return super().train(resume, trial, ignore_keys_for_eval)

    @contextmanager
    def _resumable(self) -> Iterator[None]:
        """A checkpoint of a run that goes on from it has all states, also with `save_only_model`."""
        before = self.args.save_only_model
        if self._stop is not None and self._stop.stops:
            self.args.save_only_model = False
        try:
            yield
        finally:
            self.args.save_only_model = before

    def _end_if_stopped(self, trial: Any) -> None:
        """Ends the run after a checkpoint that a signal has asked for."""
        if self._stop is None or not self._stop.stops:
            return
        self.accelerator.wait_for_everyone()  # the launcher ends all when the first one ends
        step = self.state.global_step
        checkpoint = Path(self._get_output_dir(trial)) / f"checkpoint-{step}"
        if self.is_world_process_zero():
            print(
                f"Stopped by SIGTERM after step {step} of {self.state.max_steps}; saved "
                f"{checkpoint}. To go on: {self.how_to_go_on}",
                file=sys.stderr,
                flush=True,
            )
        raise Stopped(checkpoint)
