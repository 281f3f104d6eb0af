"""A callback that stops a run as a system does."""

import os
import signal
from typing import Any

from transformers import TrainerCallback


class AskToStop(TrainerCallback):
    """
    SIGTERM for one of the processes, in the middle of a step.

    Args:
        step (`int`): Steps that are done by then.
        process (`int`): Index of the process.
    """

    def __init__(self, step: int, process: int) -> None:
        self.step, self.process = step, process

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and args.process_index == self.process:
            os.kill(os.getpid(), signal.SIGTERM)
