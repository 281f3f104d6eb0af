"""Old checkpoints are removed: none is left in part under its name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from transformers.trainer_utils import sort_checkpoints

from ..stage import sync
from .checkpoints import STATE_FILE

__all__ = ["keep_best", "rotate"]


def rotate(folder: Path, limit: int | None, best: str | None, stage: Path) -> None:
    """
    Removes the oldest checkpoints of a run, those that transformers would: the newest and the best one stay.

    Args:
        folder (`Path`): Output folder of the run.
        limit (`int`, *optional*): `save_total_limit`; all stay if it is missing or not positive.
        best (`str`, *optional*): The best checkpoint.
        stage (`Path`): Name in `folder` that a checkpoint gets before its files are removed.
    """
    if limit is None or limit <= 0:
        return
    found = sort_checkpoints(str(folder), use_mtime=True)
    kept = {*found[-1:], *([] if best is None else [str(Path(best))])}
    spare = len(found) - max(limit, len(kept))
    for checkpoint in [each for each in found if each not in kept][: max(spare, 0)]:
        _remove(Path(checkpoint), stage)


def keep_best(folder: Path, best: str, stage: Path) -> None:
    """
    Removes all checkpoints but the best one.

    Args:
        folder (`Path`): Output folder of the run.
        best (`str`): The best checkpoint.
        stage (`Path`): Name in `folder` that a checkpoint gets before its files are removed.
    """
    for checkpoint in sort_checkpoints(str(folder)):
        if not os.path.samefile(checkpoint, best):
            _remove(Path(checkpoint), stage)


def _remove(checkpoint: Path, stage: Path) -> None:
    if checkpoint.is_symlink():  # what it leads to is not this run's; transformers leaves it too
        return
    shutil.rmtree(stage, ignore_errors=True)
    try:
        # The stage itself, not a folder in it: a full disk, which this makes room on, has none for a new one.
        os.rename(checkpoint, stage)
        sync(stage.parent)
    except OSError:
        # It is a mount, or a file of it is open on Windows: at least it is not whole now.
        (checkpoint / STATE_FILE).unlink(missing_ok=True)
        shutil.rmtree(checkpoint, ignore_errors=True)
    shutil.rmtree(stage, ignore_errors=True)
