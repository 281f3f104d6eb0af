"""What the self-tests of a GPU's kernels found, kept in a file beside the compiled kernels."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

from ..stage import staged_file
from .findings import Verdict

__all__ = ["kernel_folder", "locked", "read", "write"]

# Raised when the file changes its form.
_FORMAT = 1
# GPUs and releases whose verdicts are kept; a file has about a thousand bytes.
_KEPT = 256
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
        `list[Verdict]`, or None if there are none, or the file is damaged.
    """
    try:
        found = json.loads(_file(key).read_text(encoding="utf-8"))
        if found["format"] != _FORMAT:
            return None
        verdicts = [Verdict(device, **verdict) for verdict in found["verdicts"]]
        usable = all(isinstance(verdict.passed, bool) for verdict in verdicts)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return verdicts if usable and [each.family for each in verdicts] == families else None


def write(key: str, verdicts: list[Verdict]) -> None:
    """Keeps verdicts under a key. Where the folder cannot be written to, they are found again each time."""
    rows = [asdict(verdict) for verdict in verdicts]
    for row in rows:
        del row["device"]
    text = json.dumps({"format": _FORMAT, "verdicts": rows}, indent=1)
    with suppress(OSError):
        with staged_file(_file(key)) as file:
            file.write(text.encode())
        _trim(kernel_folder())


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
        import fcntl

        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except (ImportError, OSError):
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
