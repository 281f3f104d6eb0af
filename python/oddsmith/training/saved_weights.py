"""The files of a saved model's weights, and whether they are all there."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

__all__ = ["check_written", "stale_weights", "weight_files"]

# Of models and adapters. Parts of an engine's own checkpoints cannot be loaded by their names alone.
_WEIGHTS = ("model*.safetensors", "adapter_model*.safetensors", "pytorch_model*.bin")
_WEIGHTS += ("adapter_model*.bin",)
_ENGINE = "pytorch_model_fsdp"
# The names of one model's weights: in one file, or in several with an index.
_OF_A_MODEL = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?")
# Nanoseconds within which a file that is written twice may keep its time.
_TICK = 100_000_000


def weight_files(folder: Path, before: bool = False) -> dict[Path, tuple[int, int]]:
    """
    The files with weights in a folder and its adapters' folders, each with its time and size.

    Args:
        folder (`Path`): The folder of a model or adapter; it may be missing.
        before (`bool`, *optional*): Leave out files so new that their time would not tell whether
            they are written again.
    """
    found, now = {}, time.time_ns()
    for pattern in _WEIGHTS:
        for path in (*folder.glob(pattern), *folder.glob(f"*/{pattern}")):
            # Checkpoints are beside the model.
            if not path.name.startswith(_ENGINE) and not path.parent.name.startswith("checkpoint-"):
                status = path.stat()
                if status.st_mtime_ns + _TICK < now or not before:
                    found[path] = status.st_mtime_ns, status.st_size
    return found


def check_written(folder: Path, before: dict[Path, tuple[int, int]]) -> None:
    """
    Checks that a model was saved.

    Args:
        folder (`Path`): Where it was saved.
        before (`dict`): What [`weight_files`] found there before.

    Raises:
        RuntimeError: If no file with weights is new, or one that an index names is missing.
    """
    now = weight_files(folder)
    if not any(status[1] and before.get(path) != status for path, status in now.items()):
        raise RuntimeError(
            f"the model was not saved: no weights were written to {folder}; the weights of the last "
            "checkpoint, if there is one, are those of its step"
        )
    for index in folder.glob("*.index.json"):
        named = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        if missing := sorted(name for name in named if not (folder / name).is_file()):
            raise RuntimeError(
                f"the model was not saved: {index} names {', '.join(missing)}, which is not in {folder}"
            )


def stale_weights(new: Path, folder: Path) -> list[str]:
    """
    The names of files with a model's weights in a folder that a new model has not, which will be put there:
    they would be loaded in the place of the new ones, or beside them.

    Args:
        new (`Path`): The folder of the new model or adapter.
        folder (`Path`): Where it will be.
    """
    names = {path.name for path in new.iterdir() if _OF_A_MODEL.fullmatch(path.name)}
    there = {path.name for path in folder.iterdir() if _OF_A_MODEL.fullmatch(path.name)}
    return sorted(there - names) if names else []
