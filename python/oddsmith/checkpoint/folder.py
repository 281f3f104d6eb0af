"""Folders of checkpoints, on disk or from the hub."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError

from .. import _core
from ..errors import UserError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

# Weights in any format; all other files of a folder are copied with the model.
WEIGHT_FILE = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx)(\.index\.json)?$|.*\.ckpt\..*"
)
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
_TEMPLATES = "additional_chat_templates"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


@dataclass(frozen=True)
class Tensor:
    """A tensor of a file: its dtype by safetensors' name, such as `BF16`, and its sizes."""

    kind: str
    shape: tuple[int, ...]


def read_json(path: Path) -> dict[str, Any]:
    """
    A JSON object from a file.

    Raises:
        UserError: If the file has none.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, too deep
        raise UserError(f"{path}: is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: is {type(value).__name__}; must be a JSON object")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """
    The tensors of a safetensors file, in the order of their bytes.

    Raises:
        UserError: If it cannot be read or is damaged.
    """
    with file_errors():
        return {
            each["name"]: Tensor(each["kind"], tuple(each["shape"]))
            for each in _core.checkpoint_tensors(path)
        }


@contextlib.contextmanager
def file_errors() -> Iterator[None]:
    """Raises errors of files and their contents as [`UserError`]."""
    try:
        yield
    except OSError as error:
        name = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{name}{error.strerror or error}") from error
    except (ValueError, TypeError) as error:
        raise UserError(str(error)) from error


def local_folder(name: str | Path, files: tuple[str, ...] = _HUB_FILES) -> Path:
    """
    The folder of this name, or the downloaded folder of the hub model of this name.

    Raises:
        UserError: If neither exists.
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
        config (`dict`): Contents of `config.json`.
        shards (`list[Path]`): The files with weights.
        tensors (`dict[str, Tensor]`): All tensors by name.
        index (`dict`, *optional*): Contents of the index, if there are several files.

    Raises:
        UserError: If a file is missing or damaged, or does not match the index.
    """

    def __init__(self, path: Path):
        self.path = path
        if not path.is_dir():
            raise UserError(f"{path}: no such folder")
        refuse_links(path)
        self.config: dict[str, Any] = read_json(path / "config.json")
        self.index: dict[str, Any] | None = None
        if (path / WEIGHTS).is_file():
            self.shards: list[Path] = [path / WEIGHTS]
        elif (path / INDEX).is_file():
            self.index = read_json(path / INDEX)
            self.shards = self._indexed(self.index)
        else:
            others = sorted(file.name for file in path.iterdir() if WEIGHT_FILE.match(file.name))
            found = f"found {', '.join(others[:3])}" if others else "found no weights"
            raise UserError(f"{path}: must have {WEIGHTS} or {INDEX}; {found}")
        self.tensors: dict[str, Tensor] = {}
        for shard in self.shards:
            tensors = read_tensors(shard)
            self._check_index(shard, tensors)
            self.tensors |= tensors

    def _indexed(self, index: dict[str, Any]) -> list[Path]:
        map_ = index.get("weight_map")
        if not isinstance(map_, dict) or not map_:
            raise UserError(
                f"{self.path / INDEX}: weight_map is {map_!r}; must give a file for each tensor"
            )
        for name in map_.values():
            if not isinstance(name, str) or Path(name).name != name:
                raise UserError(f"{self.path / INDEX}: {name!r} is not a file name")
        names = set(map_.values())
        if not isinstance(index.get("metadata", {}), dict):
            raise UserError(f"{self.path / INDEX}: metadata must be a JSON object")
        return [self.path / name for name in sorted(names)]

    def _check_index(self, shard: Path, tensors: dict[str, Tensor]) -> None:
        if self.index is None:
            return
        for name, file in self.index["weight_map"].items():
            if file == shard.name and name not in tensors:
                raise UserError(f"{shard}: has no tensor {name!r}, which {INDEX} says it has")

    def others(self) -> list[Path]:
        """The files of the model other than weights: tokenizer, generation settings, code."""
        files = [
            file
            for file in self.path.iterdir()
            if file.is_file()
            and not file.name.startswith(".")
            and file.name != "config.json"
            and not WEIGHT_FILE.match(file.name)
        ]
        if (self.path / _TEMPLATES).is_dir():
            files += [file for file in (self.path / _TEMPLATES).iterdir() if file.is_file()]
        return sorted(files)


def refuse_links(folder: Path) -> None:
    """
    Checks that the links in a folder stay in it: what they lead to is read, and copied to the output.

    The hub's cache has links from `snapshots/<revision>` to `blobs` beside it.

    Raises:
        UserError: If one leads elsewhere.
    """
    real = folder.resolve()
    tree = real.parents[1] if real.parent.name == "snapshots" else real
    for path in (*folder.iterdir(), *(folder / _TEMPLATES).glob("*")):
        if path.is_symlink() and not path.resolve().is_relative_to(tree):
            raise UserError(
                f"{path}: is a link to {os.readlink(path)}, outside the folder of the model; put the file "
                "itself there"
            )
