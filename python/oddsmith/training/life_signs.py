"""Whether a process that others wait for is alive, by a file: also in another container, or on another
machine that has the same folder.
"""

from __future__ import annotations

import os
import threading
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl: Any = None

__all__ = ["Beat", "Watch"]

# Seconds between two signs of life.
_BEAT = 2.0
# Seconds without one after which a process counts as dead. A library may hold the interpreter for a
# while, and file systems of a network show changes late.
SILENT = 600.0
# Seconds within which the first one must be seen.
START = 120.0


class Beat:
    """
    A process's signs of life while it works: a lock on a file, which the system opens when the process
    ends, however it ends; and a count in the file, for file systems without locks.

    Args:
        file (`Path`): Is written.

    Raises:
        OSError: If it cannot be written.
    """

    def __init__(self, file: Path):
        self._file = open(file, "wb", buffering=0)  # noqa: SIM115 - open as long as the lock
        self._count = 0
        self._ends = threading.Event()
        if fcntl is not None:
            with suppress(OSError):  # no locks here
                # Of this process alone: a lock by flock would be kept by the processes it forks.
                fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self._write()

    def __enter__(self) -> Beat:
        self._thread = threading.Thread(target=self._go_on, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ends.set()
        self._thread.join()
        self._file.close()

    def _go_on(self) -> None:
        while not self._ends.wait(_BEAT):
            with suppress(OSError):  # a full disk: the lock is left
                self._write()

    def _write(self) -> None:
        self._count += 1
        # In one write, always as long: no reader sees a part.
        self._file.seek(0)
        self._file.write(f"{os.getpid():<20}{self._count:<20}".encode())


class Watch:
    """
    Looks at the signs of life of another process.

    Args:
        file (`Path`): The file of its [`Beat`].
    """

    def __init__(self, file: Path):
        self.file = file
        self.has_seen = False
        self.process = ""
        self._signs = b""
        self._locked = False
        self._since = time.monotonic()

    def silence(self) -> str | None:
        """What says that the process is dead or cannot be seen; None if it may be alive."""
        try:
            with open(self.file, "rb") as file:
                signs, free = file.read(), self._is_free(file)
        except FileNotFoundError:
            if self.has_seen:  # removed by the process when it ended
                return "ended"
            signs, free = b"", False
        except OSError:
            signs, free = b"", False
        now = time.monotonic()
        if signs and signs != self._signs:
            self._signs, self._since, self.has_seen = signs, now, True
            self.process = signs[:20].decode().strip()
        # Only after it was seen locked: some file systems let everyone have every lock.
        if self._locked and free:
            return "ended"
        self._locked = self._locked or (bool(signs) and not free)
        if self.has_seen and now - self._since > SILENT:
            return f"gave no sign of life for {SILENT:.0f} s"
        if not self.has_seen and now - self._since > START:
            return f"has given no sign of life within {START:.0f} s"
        return None

    def _is_free(self, file: Any) -> bool:
        if fcntl is None:
            return True
        try:
            fcntl.lockf(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError:  # no locks here
            return True
        return True  # and open again with the file
