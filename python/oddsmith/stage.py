"""Stages: outputs that appear when they are complete, and on disk.

An output is written under another name beside its place, brought to disk and renamed: a process that
is killed, or a disk that is full, leaves what was there before. The process holds a lock on its stage,
which ends with it however it ends, so that the next one that writes to the folder removes what it left.

`tempfile` creates private files. To give them the usual mode, a process would have to set its umask
to read it, and files that another thread creates meanwhile would be open to all. Here the system
applies the umask.
"""

from __future__ import annotations

import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

__all__ = ["new_file", "new_folder", "publish", "staged_file", "sync"]

PREFIX = ".oddsmith-"
# Seconds in which a new stage may not have its lock yet.
_YOUNG = 60.0


def new_file(folder: Path) -> tuple[Path, BinaryIO]:
    """
    An empty file in `folder` to write an output to, open; its lock ends when it is closed.

    Raises:
        OSError: If it cannot be created.
    """
    remove_stale(folder)
    path = folder / f"{PREFIX}{secrets.token_hex(8)}"
    file = open(path, "xb")  # noqa: SIM115  # it is given away
    _lock(file.fileno())
    return path, file


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """
    An empty folder in `folder` to write an output to, which is removed, if it is there still, at the end.

    Raises:
        OSError: If it cannot be created.
    """
    remove_stale(folder)
    path = folder / f"{PREFIX}{secrets.token_hex(8)}"
    path.mkdir()
    # Windows opens no folders, and has no such locks.
    handle = None if fcntl is None else os.open(path, os.O_RDONLY)
    try:
        if handle is not None:
            _lock(handle)
        yield path
    finally:
        if handle is not None:
            os.close(handle)
        shutil.rmtree(path, ignore_errors=True)


@contextmanager
def staged_file(path: Path) -> Iterator[BinaryIO]:
    """
    A file to write to, which gets its name when the context ends without an error.

    Args:
        path (`Path`): Its name then; the folder is created.

    Raises:
        OSError: If it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    stage, file = new_file(path.parent)
    try:
        yield file
        file.flush()
        publish(stage, path, file)
    finally:
        with suppress(OSError):  # of a full disk, again
            file.close()
        stage.unlink(missing_ok=True)


def publish(stage: Path, path: Path, file: BinaryIO | None = None) -> None:
    """
    Brings a file, which may be open, to disk and gives it its name, in place of what has that name.

    Raises:
        OSError: If that fails, also for want of space.
    """
    if file is None:
        sync(stage)
    else:
        os.fsync(file.fileno())
        file.close()
    os.replace(stage, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Brings a file, or the names in a folder, to disk."""
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def remove_stale(folder: Path) -> None:
    """Removes the stages that processes have left in `folder` that are no more."""
    if fcntl is None:
        return
    for path in folder.glob(f"{PREFIX}*"):
        # Others may do the same now, and what belongs to another user stays.
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > _YOUNG and _is_left(path):
                shutil.rmtree(path) if path.is_dir() else path.unlink()


def _is_left(path: Path) -> bool:
    assert fcntl is not None
    handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # it is held, or this file system has no locks
        return False
    finally:
        os.close(handle)
    return True


def _lock(handle: int) -> None:
    # Without locks, stages are not removed by others.
    if fcntl is not None:
        with suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
