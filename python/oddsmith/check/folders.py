"""The folders that a run writes to."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path

from huggingface_hub import constants

from .. import _core
from .findings import Folder, Problem
from .verdicts import kernel_folder

__all__ = ["folder_problems", "folders"]

# Less than a small model and its checkpoints take.
_LITTLE_SPACE = 5 << 30


def folders() -> list[Folder]:
    """Kernels, models of the hub, temporary files and the current folder."""
    places = {
        "kernels": kernel_folder(),
        "hub": Path(constants.HF_HOME),
        "temporary": Path(tempfile.gettempdir()),
        "current": Path.cwd(),
    }
    return [_look_at(what, path) for what, path in places.items()]


def folder_problems(found: list[Folder]) -> list[Problem]:
    """What cannot be written, is nearly full, or can be changed by others."""
    problems = []
    for folder in found:
        if not folder.writable:
            what = f"{folder.path} cannot be written to"
            problems.append(Problem(what, _ELSEWHERE[folder.what]))
        elif folder.free < _LITTLE_SPACE:
            what = f"{folder.path} has {folder.free / 2**30:.1f} GB of free space"
            problems.append(Problem(what, f"make room, or {_ELSEWHERE[folder.what]}"))
        if folder.what == "kernels" and (fault := _core.kernel_folder_fault(folder.path)):
            what = f"{fault[0]}: kernels are not kept there, and are compiled by each process"
            problems.append(Problem(what, fault[1]))
    return problems


_ELSEWHERE = {
    "kernels": "name another with ODDSMITH_CACHE_DIR",
    "hub": "name another with HF_HOME",
    "temporary": "name another with TMPDIR",
    "current": "go to another, or name others with --output_dir",
}


def _look_at(what: str, path: Path) -> Folder:
    # The folder may not be there yet: it is made in the nearest one that is.
    there = next(place for place in (path, *path.absolute().parents) if place.is_dir())
    private = (
        _core.kernel_folder_fault(path) is None if what == "kernels" else _is_private(there, path)
    )
    writable = os.access(there, os.W_OK | os.X_OK)
    return Folder(what, str(path), shutil.disk_usage(there).free, writable, private)


def _is_private(there: Path, path: Path) -> bool:
    return there != path or not there.stat().st_mode & (stat.S_IWGRP | stat.S_IWOTH)
