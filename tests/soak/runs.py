"""Small training runs in forked processes: every optimizer name, every way of the data."""

import hashlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from oddsmith import ORPOConfig, ORPOTrainer
from oddsmith.training.adamw_names import ADAMW_NAMES
from oddsmith.training.checkpoints import newest_whole
from oddsmith.training.low_rank_names import LOW_RANK_NAMES
from support.trainer_runs import arguments, make_model, make_tokenizer, pairs

OPTIMIZERS = sorted({*ADAMW_NAMES, *LOW_RANK_NAMES, "adamw_torch", "adafactor", "sgd"})
PATHS = [f"{data}, {form}" for data in ("map", "streamed") for form in ("packed", "padded")]
STEPS = 6
# Of two and a half passes, each of which ends in the middle of a step.
ROWS = 10


def combinations() -> Iterator[tuple[str, str]]:
    """Neighbours differ in both, so that a share of them has all of both."""
    for shift in range(len(PATHS)):
        for place, name in enumerate(OPTIMIZERS):
            yield name, PATHS[(place + shift) % len(PATHS)]


def trainer_for(folder: Path, optimizer: str, path: str, **changed: Any) -> Any:
    """A trainer of a run that is one of [`combinations`]."""
    torch.manual_seed(5)
    tokenizer = make_tokenizer()
    rows = pairs(ROWS)
    layerwise = optimizer.endswith("_layerwise")
    options: dict[str, Any] = {
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 2,
        "optim": optimizer,
        "padding_free": path.endswith("packed"),
        # Layerwise optimizers step in the backward pass.
        "gradient_accumulation_steps": 1 if layerwise else 2,
        "logging_steps": 1,
        **changed,
    }
    if optimizer in LOW_RANK_NAMES:
        options |= {"optim_target_modules": "all-linear", "optim_args": "rank=4,update_proj_gap=2"}
    if "8bit" in optimizer and optimizer in ADAMW_NAMES:
        options["optim_args"] = "min_8bit_size=256"
    return ORPOTrainer(
        model=make_model("qwen3_tied", tokenizer),
        args=ORPOConfig(**arguments(folder, **options)),
        train_dataset=rows.to_iterable_dataset() if path.startswith("streamed") else rows,
        processing_class=tokenizer,
    )


def train(folder: Path, optimizer: str, path: str, **changed: Any) -> None:
    """From the newest whole checkpoint to the end, which is what it leaves in `digest`."""
    trainer = trainer_for(folder, optimizer, path, **changed)
    found = newest_whole(folder) if folder.is_dir() else None
    trainer.train(resume_from_checkpoint=None if found is None else str(found))
    trainer.save_model()
    sums = hashlib.sha256()
    for tensor in tensors([dict(trainer.model.named_parameters()), trainer.optimizer.state_dict()]):
        sums.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    (folder / "digest").write_text(f"{sums.hexdigest()} {losses}")


def tensors(value: Any) -> Iterator[torch.Tensor]:
    """Those of a state, in an order that depends on nothing."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for key in sorted(value, key=str):
            yield from tensors(value[key])
    elif isinstance(value, (list, tuple)):
        for each in value:
            yield from tensors(each)


def forked(
    target: Callable[[], object], log: Path, kill_after: float | None = None
) -> tuple[int, float]:
    """
    Runs a function in a process of its own.

    Args:
        target (`Callable`): What it runs.
        log (`Path`): What it prints goes there.
        kill_after (`float`, *optional*): Seconds after which it gets SIGKILL.

    Returns:
        `tuple`: Its exit status, as `subprocess` has it, and seconds.
    """
    begun = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with log.open("wb", buffering=0) as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            target()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    killed = False
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        passed = time.monotonic() - begun
        if ended:
            return os.waitstatus_to_exitcode(status), passed
        if kill_after is not None and passed > kill_after and not killed:
            os.kill(child, signal.SIGKILL)
            killed = True
        time.sleep(0.002)
