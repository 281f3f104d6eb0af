"""What all processes of a node say alike is said by one of them. Standard library only."""

import hashlib
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any

# Messages of this process, and whether it says them.
_claimed: dict[str, bool] = {}


def shared_folder() -> Path | None:
    """
    A folder that the processes of one node share until the launcher removes it; None if there is
    one process, or a launcher that has none.

    It is that of torchrun's reports of errors, `.../attempt_0/<local rank>/error.json`.
    """
    report = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if not report or os.environ.get("LOCAL_WORLD_SIZE", "1") == "1":
        return None
    return Path(report).parent.parent


def is_ours(message: str) -> bool:
    """
    Whether this process says a message: the first one that asks does, always.

    No process waits for another, so that a message which only one has is never lost.
    """
    if message not in _claimed:
        _claimed[message] = _claim(message)
    return _claimed[message]


def _claim(message: str) -> bool:
    folder = shared_folder()
    if folder is None:
        return True
    name = hashlib.sha256(message.encode("utf-8", "replace")).hexdigest()
    try:
        os.close(os.open(folder / f"said-{name}", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    except OSError:  # the launcher has removed it
        return True
    return True


def say(message: str) -> None:
    """Prints a line on stderr, if no other process of the node has."""
    if is_ours(message):
        print(message, file=sys.stderr, flush=True)


class _OncePerNode(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        if record.levelno < logging.WARNING:
            return True
        return is_ours(f"{record.name}: {record.getMessage()}")


def quieten() -> None:
    """Lets one process of the node log a warning, and show a Python warning, that all have."""
    if shared_folder() is None:
        return
    names = ("transformers", "datasets", "huggingface_hub", "accelerate", "oddsmith")
    loggers = [logging.getLogger(), *map(logging.getLogger, names)]
    handlers = {handler for logger in loggers for handler in logger.handlers}
    if logging.lastResort is not None:
        handlers.add(logging.lastResort)
    for handler in handlers:
        if not any(isinstance(each, _OncePerNode) for each in handler.filters):
            handler.addFilter(_OncePerNode())
    if not isinstance(warnings.showwarning, _ShowWarning):
        warnings.showwarning = _ShowWarning(warnings.showwarning)


class _ShowWarning:
    def __init__(self, show: Any):
        self.show = show

    def __call__(self, message: Any, category: type[Warning], *args: Any, **kwargs: Any) -> None:
        if is_ours(f"{category.__name__}: {message}"):
            self.show(message, category, *args, **kwargs)
