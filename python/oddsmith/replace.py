"""A model put in the place of another one, of which a folder never has parts that look like a whole.

Files get their places one by one, and a process can be killed between any two. So the new model is on disk
and whole, in a folder of its own, before the old one is touched; what makes a folder a model (its configuration
and its index of weights) goes first and comes last; and the next process that writes to the folder ends what
a killed one has begun.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from .stage import PREFIX, sync

__all__ = ["NEW", "complete", "replace_model"]

# The new model, while it is moved; transformers uploads nothing whose name begins like this.
NEW = "_new_model"
# In it: names of files that are removed.
_REMOVED = f"{PREFIX}removed.json"
# Without these nothing loads a folder as a model or an adapter.
_KEYS = {"config.json", "adapter_config.json", "model.safetensors.index.json"}
# Bytes of files that are compared. Larger ones are taken for changed.
_SMALL = 1 << 20


def replace_model(stage: Path, folder: Path, removed: Iterable[str] = ()) -> None:
    """
    Moves the files of a stage to the same places in a folder, which may have a model.

    Args:
        stage (`Path`): A folder in `folder`, as [`~oddsmith.stage.new_folder`] makes it; it goes.
        folder (`Path`): Where the files go. Other files stay.
        removed (`Iterable[str]`): Names of files in `folder` that the new model does not have.

    Raises:
        OSError: If that fails. The model that was there is whole, or the new one is in `_new_model`.
    """
    complete(folder)
    (stage / _REMOVED).write_text(json.dumps(sorted(removed)), encoding="utf-8")
    for path in stage.rglob("*"):
        sync(path)
    sync(stage)
    os.rename(stage, folder / NEW)
    sync(folder)
    complete(folder)


def complete(folder: Path) -> None:
    """
    Ends what [`replace_model`] has begun in a folder, if its process was killed.

    Raises:
        OSError: If that fails.
    """
    new = folder / NEW
    if not (new / _REMOVED).is_file():
        # The list is the last to go, and what it is missing in was moved in whole.
        shutil.rmtree(new, ignore_errors=True)
        return
    removed = [
        folder / name
        for name in json.loads((new / _REMOVED).read_text(encoding="utf-8"))
        if Path(name).name == name and (folder / name).is_file()
    ]
    files = [path for path in new.rglob("*") if path.is_file() and path.name != _REMOVED]
    changed = [file for file in files if not _equal(file, folder / file.relative_to(new))]
    # One file is replaced at once.
    if len(changed) + len(removed) > 1:
        for file in files:
            if file.name in _KEYS:
                (folder / file.relative_to(new)).unlink(missing_ok=True)
        sync(folder)
    for old in removed:
        old.unlink(missing_ok=True)
    for file in sorted(
        files, key=lambda file: (file.name in _KEYS, file.name == "config.json", file.name)
    ):
        place = folder / file.relative_to(new)
        if not _equal(file, place):
            _put(file, place)
    for parent in {folder / file.parent.relative_to(new) for file in files}:
        sync(parent)
    (new / _REMOVED).unlink()
    shutil.rmtree(new, ignore_errors=True)


def _equal(file: Path, place: Path) -> bool:
    # The time of weights says when they were saved, also if they are what they were.
    if not place.is_file() or place.is_symlink() or file.suffix == ".safetensors":
        return False
    return file.stat().st_size <= _SMALL and filecmp.cmp(file, place, shallow=False)


def _put(file: Path, place: Path) -> None:
    """A second name for a file, so that the new model stays whole where it is, if the file system can."""
    place.parent.mkdir(exist_ok=True)
    between = place.with_name(f"{PREFIX}{place.name}")
    between.unlink(missing_ok=True)
    try:
        os.link(file, between)
    except OSError:
        os.replace(file, place)
    else:
        os.replace(between, place)
