"""Output folders that appear only when they are complete."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..replace import complete, replace_model
from ..stage import new_folder, sync
from .folder import INDEX, SHARD, WEIGHT_FILE, WEIGHTS, file_errors

# What a model has besides its weights. Files of the old one would be taken for the new one's.
_OF_A_MODEL = {
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "spiece.model",
    "tekken.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
    "vocab.json",
    "vocab.txt",
}


def copy_others(files: list[Path], base: Path, target: Path) -> None:
    """Copies files to the same relative paths below `target`."""
    for file in files:
        place = target / file.relative_to(base)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes JSON in the format of transformers' configurations and indices."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8")


def check_free(folder: Path, wanted: int) -> None:
    """
    Checks the free space before a long conversion.

    Raises:
        UserError: If the disk has less than `wanted` bytes.
    """
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise UserError(f"{folder}: {wanted / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")


@contextlib.contextmanager
def staged(out: Path, overwrite: bool) -> Iterator[Path]:
    """
    A temporary folder whose files move to `out` when the context ends without an error.

    A new `out` appears with one rename. In an existing one all files of the model are replaced, see
    [`~oddsmith.replace`]; until all are on disk it is unchanged. Files of the old model that the new one
    does not have are removed; all others stay.

    Args:
        out (`Path`): Output folder.
        overwrite (`bool`): Whether to replace an existing model.

    Raises:
        UserError: If there is already a model, or the folder cannot be created.
    """
    with file_errors():
        if out.exists() and not out.is_dir():
            raise UserError(f"{out}: is not a folder")
        if out.is_dir():
            complete(out)
        if out.is_dir() and not overwrite:
            there = [
                f.name
                for f in out.iterdir()
                if f.name == "config.json" or WEIGHT_FILE.match(f.name)
            ]
            if there:
                raise UserError(f"{out}: has {sorted(there)[0]} already; --overwrite replaces it")
        out.parent.mkdir(parents=True, exist_ok=True)
        with new_folder(out if out.is_dir() else out.parent) as stage:
            yield stage
            _publish(stage, out)


def _publish(stage: Path, out: Path) -> None:
    if not out.is_dir():
        for path in stage.rglob("*"):
            sync(path)
        os.rename(stage, out)
        sync(out.parent)
        return
    written = {path.name for path in stage.rglob("*")}
    stale = [
        old.name
        for old in out.iterdir()
        if old.name in (WEIGHTS, INDEX) or SHARD.fullmatch(old.name) or old.name in _OF_A_MODEL
    ]
    replace_model(stage, out, set(stale) - written)
