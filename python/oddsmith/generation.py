"""The table of generated completions of an evaluation."""

import json
from pathlib import Path
from typing import Any

from transformers.utils import logging

logger = logging.get_logger(__name__)

_COLUMNS = ("prompt", "policy")


def write_table(rows: list[tuple[str, str]], args: Any, step: int) -> Path:
    """
    Publish prompts and completions: to the log, to a file, and to the trackers that take tables.

    Args:
        rows (`list[tuple[str, str]]`): Prompt and completion.
        args (`TrainingArguments`): Says where.
        step (`int`): Optimiser steps done.

    Returns:
        `Path`: The file, a JSON object a line, in `output_dir/generations`.
    """
    for prompt, policy in rows:
        logger.info(f"step {step}\nprompt: {prompt}\npolicy: {policy}")
    path = Path(args.output_dir) / "generations" / f"step-{step}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = (json.dumps(dict(zip(_COLUMNS, row, strict=True)), ensure_ascii=False) for row in rows)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    if "wandb" in args.report_to:
        import wandb

        if wandb.run is not None:
            table = wandb.Table(columns=["Prompt", "Policy"], data=[list(row) for row in rows])
            wandb.log({"game_log": table})
    if "comet_ml" in args.report_to:
        import comet_ml

        experiment = comet_ml.get_running_experiment()
        if experiment is not None:
            experiment.log_table("game_log.csv", [list(row) for row in rows], headers=list(_COLUMNS))
    return path
