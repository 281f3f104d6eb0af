"""Folders of checkpoints: found on disk, and put in place when they are whole."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from . import _core
from .errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Weights in any form; whatever else is in a folder goes with the model.
_WEIGHT_FILE = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx)(\.index\.json)?$|.*\.ckpt\..*"
)
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
_TEMPLATES = "additional_chat_templates"
_SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: safetensors' name of its dtype, such as `BF16`, and its sizes."""

    kind: str
    shape: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """
    A JSON object from a file.

    Raises:
        UserError: If there is none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # no UTF-8, no JSON
        raise UserError(f"{path}: is no JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: is {type(value).__name__}; must be a JSON object")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """
    The tensors of a safetensors file, in the order of their bytes.

    Raises:
        UserError: If it cannot be read or is damaged.
    """
    with user_errors():
        return {
            name: Tensor(kind, tuple(shape)) for name, kind, shape in _core.checkpoint_tensors(path)
        }


@contextlib.contextmanager
def user_errors() -> Iterator[None]:
    """Errors of files and of what is in them, as the user's."""
    try:
        yield
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{name}{error.strerror or error}") from error
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def local_folder(name: str | Path, files: tuple[str, ...] = _HUB_FILES) -> Path:
    """
    The folder of this name, or of the model of this name on the hub, which is fetched.

    Raises:
        UserError: If there is neither.
    """
    path = Path(name)
    if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)):
        return path
    try:
        return Path(snapshot_download(str(name), allow_patterns=list(files)))
    except (OSError, ValueError, HfHubHTTPError) as error:
        raise UserError(f"{name}: no such folder, and the hub says: {error}") from error


class Checkpoint:
    """
    A folder with a model in safetensors.

    Args:
        path (`Path`): The folder.

    Attributes:
        config (`dict`): What `config.json` says.
        shards (`list[Path]`): The files with weights.
        tensors (`dict[str, Tensor]`): All tensors by name.
        index (`dict`, *optional*): What the index says, if there are several files.

    Raises:
        UserError: If a file is missing, damaged, or not what the index says.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_dir():
            raise UserError(f"{path}: no such folder")
        self.config = read_json(path / "config.json")
        self.index: dict[str, Any] | None = None
        if (path / WEIGHTS).is_file():
            self.shards = [path / WEIGHTS]
        elif (path / INDEX).is_file():
            self.index = read_json(path / INDEX)
            self.shards = self._indexed()
        else:
            others = sorted(file.name for file in path.iterdir() if _WEIGHT_FILE.match(file.name))
            found = f"found {', '.join(others[:3])}" if others else "found no weights"
            raise UserError(f"{path}: must have {WEIGHTS} or {INDEX}; {found}")
        self.tensors: dict[str, Tensor] = {}
        for shard in self.shards:
            tensors = read_tensors(shard)
            self._check_index(shard, tensors)
            self.tensors |= tensors

    def _indexed(self) -> list[Path]:
        map_ = self.index.get("weight_map")
        if not isinstance(map_, dict) or not map_:
            raise UserError(
                f"{self.path / INDEX}: weight_map is {map_!r}; must name a file a tensor"
            )
        names = set(map_.values())
        for name in names:
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"{self.path / INDEX}: {name!r} is no name of a file")
        return [self.path / name for name in sorted(names)]

    def _check_index(self, shard: Path, tensors: dict[str, Tensor]) -> None:
        if self.index is None:
            return
        for name, file in self.index["weight_map"].items():
            if file == shard.name and name not in tensors:
                raise UserError(f"{shard}: has no tensor {name!r}, which {INDEX} says it has")

    def others(self) -> list[Path]:
        """The files that go with the model: tokenizer, generation settings, code; not its weights."""
        files = [
            file
            for file in self.path.iterdir()
            if file.is_file()
            and not file.name.startswith(".")
            and file.name != "config.json"
            and not _WEIGHT_FILE.match(file.name)
        ]
        if (self.path / _TEMPLATES).is_dir():
            files += [file for file in (self.path / _TEMPLATES).iterdir() if file.is_file()]
        return sorted(files)


def copy_others(files: list[Path], base: Path, target: Path) -> None:
    """Copies files to the same places below `target`."""
    for file in files:
        place = target / file.relative_to(base)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """As transformers writes configurations and indices."""
    text = json.dumps(value, indent=2, sort_keys=True) + "\n"
    path.write_text(text, encoding="utf-8")


def check_free(folder: Path, wanted: int) -> None:
    """
    Asks for room before hours are spent.

    Raises:
        UserError: If the disk has less than `wanted` bytes.
    """
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise UserError(f"{folder}: {wanted / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free")


@contextlib.contextmanager
def staged(out: Path, overwrite: bool) -> Iterator[Path]:
    """
    A folder whose files are put into `out` when the context ends without an error.

    A new `out` appears with one rename. In one that exists, files are replaced one by one, the
    configuration last, after all of them are on disk; until then it is as it was.

    Args:
        out (`Path`): The folder to be.
        overwrite (`bool`): A model that is there may be replaced.

    Raises:
        UserError: If there is a model already, or the folder cannot be made.
    """
    with user_errors():
        if out.exists() and not out.is_dir():
            raise UserError(f"{out}: is no folder")
        if out.is_dir() and not overwrite:
            there = [
                f.name
                for f in out.iterdir()
                if f.name == "config.json" or _WEIGHT_FILE.match(f.name)
            ]
            if there:
                raise UserError(f"{out}: has {sorted(there)[0]} already; --overwrite replaces it")
        out.parent.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".oddsmith-", dir=out if out.is_dir() else out.parent))
    try:
        with user_errors():
            yield stage
            _publish(stage, out)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _publish(stage: Path, out: Path) -> None:
    # The configuration names what the weights have to be: it comes last.
    files = sorted(
        (path for path in stage.rglob("*") if path.is_file()),
        key=lambda path: (path.name == "config.json", path.name == INDEX, path.name),
    )
    for file in files:
        _sync(file)
    if not out.is_dir():
        mask = os.umask(0)
        os.umask(mask)
        stage.chmod(0o777 & ~mask)  # mkdtemp lets nobody else in
        os.rename(stage, out)
        _sync(out.parent)
        return
    written = set()
    for file in files:
        place = out / file.relative_to(stage)
        place.parent.mkdir(exist_ok=True)
        os.replace(file, place)
        written.add(place.name)
    for old in out.iterdir():
        ours = old.name in (WEIGHTS, INDEX) or _SHARD.fullmatch(old.name)
        if ours and old.name not in written:
            old.unlink()
    _sync(out)


def _sync(path: Path) -> None:
    if os.name != "posix" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
