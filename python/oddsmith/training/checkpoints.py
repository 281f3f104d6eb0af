"""Checkpoints of a run: which are whole, and which one a run goes on from."""

import json
import re
from pathlib import Path

from transformers.utils import logging

logger = logging.get_logger(__name__)

_NAME = re.compile(r"checkpoint-(\d+)")
# Written after everything else by a trainer that gives a checkpoint its name before it is whole.
STATE_FILE = "trainer_state.json"


def checkpoints(folder: str | Path) -> list[Path]:
    """Checkpoints in the output folder of a run, the newest first."""
    found = [
        (int(match[1]), path)
        for path in Path(folder).glob("checkpoint-*")
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    ]
    return [path for _, path in sorted(found, reverse=True)]


def is_whole(checkpoint: Path) -> bool:
    """Whether a checkpoint was written to its end."""
    try:
        state = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
        return type(state["global_step"]) is int
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return False


def newest_whole(folder: str | Path, since: float = 0.0) -> Path | None:
    """
    The newest checkpoint that was written to its end, if there is one.

    Args:
        folder (`str` or `Path`): Output folder of a run.
        since (`float`, *optional*, defaults to 0): Ignore those that were written before, in
            seconds since the epoch.
    """
    for checkpoint in checkpoints(folder):
        if not is_whole(checkpoint):
            logger.warning_once(f"{checkpoint} was not written to its end and is not used.")
        elif (checkpoint / STATE_FILE).stat().st_mtime >= since:
            return checkpoint
    return None
