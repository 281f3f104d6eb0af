"""Completions that are logged with each evaluation (`generate_during_eval`)."""

import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import is_comet_available, is_wandb_available
from transformers.utils import logging

from ..stage import staged_file

logger = logging.get_logger(__name__)

COLUMNS = ("Prompt", "Policy")
_LOGGED_CHARACTERS = 200


def pick_rows(dataset: Any, count: int, seed: int) -> list[dict[str, Any]]:
    """Up to `count` random rows, or the first ones of a stream."""
    if not hasattr(dataset, "__len__"):
        return list(islice(iter(dataset), count))
    # A separate generator: the global one belongs to the training run.
    indices = random.Random(seed).sample(range(len(dataset)), k=min(count, len(dataset)))
    return [dataset[index] for index in indices]


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Restores torch's random state, so that sampling in evaluation does not affect training."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with torch.random.fork_rng(devices=list(devices)):
        yield


def completion_of(text: str, prompt: str) -> str:
    """The text after the prompt in a decoded sequence."""
    return text[len(prompt) :] if text.startswith(prompt) else text


def log_completions(
    rows: Sequence[tuple[str, str]], output_dir: str, step: int, prefix: str, report_to: Any
) -> Path:
    """
    Write a table of completions to the log, to a file, and to wandb or Comet if configured.

    Args:
        rows (`Sequence[tuple[str, str]]`): Prompts and completions.
        output_dir (`str`): The file is `completions/{prefix}_{step}.jsonl` below it.
        step (`int`): Training step.
        prefix (`str`): Names the evaluation.
        report_to (`list[str]`): Integrations in use.

    Returns:
        `Path`: The file.
    """
    path = Path(output_dir) / "completions" / f"{prefix}_{step:06d}.jsonl"
    with staged_file(path) as file:
        for row in rows:
            line = json.dumps(dict(zip(COLUMNS, row, strict=True)), ensure_ascii=False) + "\n"
            # A completion may be half of a character that UTF-16 writes in two.
            file.write(line.encode("utf-8", "replace"))

    lines = [f"{_short(prompt)} -> {_short(completion)}" for prompt, completion in rows]
    # The user asked for these by a flag, so log them at a level that is shown by default.
    logger.warning("\n".join([f"Completions at step {step}, also in {path}:", *lines]))

    if "wandb" in report_to and is_wandb_available():
        import wandb  # pyright: ignore[reportMissingImports]  # the user has it

        if wandb.run is not None:
            table = wandb.Table(columns=list(COLUMNS), data=[list(row) for row in rows])
            wandb.log({"game_log": table})
    if "comet_ml" in report_to and is_comet_available():
        import comet_ml  # pyright: ignore[reportMissingImports]

        experiment = comet_ml.get_running_experiment()
        if experiment is not None:
            experiment.log_table(
                filename="game_log.csv", tabular_data=[list(row) for row in rows], headers=COLUMNS
            )
    return path


def _short(text: str) -> str:
    shown = json.dumps(text, ensure_ascii=False)
    return shown if len(shown) <= _LOGGED_CHARACTERS else shown[: _LOGGED_CHARACTERS - 1] + "…"
