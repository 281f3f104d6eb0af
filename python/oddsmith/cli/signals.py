"""SIGTERM ends a command as an error does: what it has begun to write is removed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["CODE", "Ended", "ended_by_sigterm"]

# What shells give a process that it has ended.
CODE = 128 + signal.SIGTERM


class Ended(SystemExit):
    """Raised in the main thread by SIGTERM."""

    def __init__(self) -> None:
        super().__init__(CODE)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """
    Raises [`Ended`] on SIGTERM while it lasts.

    Where the process has a handler already, or another thread asks, nothing is changed. Training has
    a handler of its own, which saves a checkpoint.
    """
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(number: int, frame: Any) -> None:
    raise Ended
