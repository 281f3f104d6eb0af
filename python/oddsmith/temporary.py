"""Temporary files and folders with the mode of new files.

`tempfile` creates private files. To give them the usual mode, a process would have to set its umask
to read it, and files that another thread creates meanwhile would be open to all. Here the system
applies the umask.
"""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import BinaryIO

__all__ = ["new_file", "new_folder"]


def new_file(folder: Path, prefix: str) -> tuple[Path, BinaryIO]:
    """A new empty file in `folder`, open for writing."""
    path = folder / f"{prefix}{secrets.token_hex(8)}"
    return path, open(path, "xb")


def new_folder(folder: Path, prefix: str) -> Path:
    """A new empty folder in `folder`."""
    path = folder / f"{prefix}{secrets.token_hex(8)}"
    path.mkdir()
    return path
