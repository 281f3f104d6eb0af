"""What the self-tests of a GPU's kernels found, kept in a file beside the compiled kernels.

By the rules of src/cuda/cache.rs: the folder is this user's alone, and a file that is not what it
should be is made again, with a line.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

from .. import _core
from ..stage import staged_file
from .findings import Verdict

__all__ = ["kernel_folder", "locked", "read", "write"]

logger = logging.getLogger(__name__)

# Raised when the file changes its form.
_FORMAT = 2
# Bytes of a file, of which a verdict has about a hundred.
_MOST = 1 << 20
# GPUs and releases whose verdicts are kept; a file has about a thousand bytes.
_KEPT = 256
# How the file of a lock is opened: no link is followed.
_LOCK = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
# How often a lock is tried.
_PAUSE = 0.05


def kernel_folder() -> Path:
    """Where compiled kernels are kept, by the rule of src/cuda/cache.rs."""
    if own := os.environ.get("ODDSMITH_CACHE_DIR"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(shared) / "oddsmith" / "kernels"


def _file(key: str, kind: str = "json") -> Path:
    return kernel_folder() / f"verdicts-{key}.{kind}"


def read(key: str, device: str, families: list[str]) -> list[Verdict] | None:
    """
    The verdicts that were written under a key.

    Args:
        key (`str`): Digest of everything that they depend on.
        device (`str`): The name that the GPU has in this process.
        families (`list[str]`): Of which there must be a verdict.

    Returns:
        `list[Verdict]`, or None if there are none, or others may have written them.
    """
    if not _usable(kernel_folder()):
        return None
    path = _file(key)
    try:
        content = _core.read_private(path, _MOST)
        if content is None:
            return None
        rows = _rows(key, content)
        verdicts = [Verdict(device, **row) for row in rows]
        if [each.family for each in verdicts] != families:
            raise ValueError("has verdicts on other families")
        if not all(isinstance(verdict.passed, bool) for verdict in verdicts):
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        why = str(error) if isinstance(error, ValueError) else ""
        why = why.removeprefix(f"{path} ") if why else "is damaged or was changed"
        logger.warning("%s %s; the kernels are tried again", path, why)
        return None
    return verdicts


def _rows(key: str, content: bytes) -> list[dict[str, Any]]:
    damaged = "is damaged or was changed"
    try:
        found = json.loads(content)
    except ValueError:
        raise ValueError(damaged) from None
    if found["format"] != _FORMAT or found["digest"] != _digest(key, found["verdicts"]):
        raise ValueError(damaged)
    return found["verdicts"]


def _digest(key: str, rows: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps([_FORMAT, key, rows]).encode()).hexdigest()


def _usable(folder: Path) -> bool:
    """Whether nobody else can change the folder's files, with a line if somebody can."""
    fault = _core.kernel_folder_fault(folder)
    if fault is not None:
        _say_once(f"{fault[0]}: verdicts on kernels are not kept there; {fault[1]}")
    return fault is None


@functools.cache
def _say_once(line: str) -> None:
    logger.warning("%s", line)


def write(key: str, verdicts: list[Verdict]) -> None:
    """Keeps verdicts under a key. Where the folder cannot be written to, they are found again each time."""
    rows = [asdict(verdict) for verdict in verdicts]
    for row in rows:
        del row["device"]
    text = json.dumps({"format": _FORMAT, "digest": _digest(key, rows), "verdicts": rows}, indent=1)
    folder = kernel_folder()
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _usable(folder):
            return
        with staged_file(_file(key)) as file:
            if os.name == "posix":
                os.fchmod(file.fileno(), 0o600)
            file.write(text.encode())
        _trim(folder)


def _trim(folder: Path) -> None:
    found = sorted(folder.glob("verdicts-*"), key=lambda path: path.stat().st_mtime)
    for path in found[:-_KEPT]:
        path.unlink(missing_ok=True)


@contextmanager
def locked(key: str, limit: float) -> Iterator[None]:
    """
    Keeps other processes of this machine from the same work, as far as the file system can.

    Args:
        key (`str`): What is worked on.
        limit (`float`): Seconds after which another process is no longer waited for.
    """
    path = _file(key, "lock")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        usable = fcntl is not None and _usable(path.parent)
        file = open(os.open(path, _LOCK, 0o600), "a") if usable else None  # noqa: SIM115  # closed below
    except OSError:
        file = None
    if file is None or fcntl is None:
        yield
        return
    with file:
        end = time.monotonic() + limit
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    break
                time.sleep(_PAUSE)
            except OSError:  # a file system without locks
                break
        yield
