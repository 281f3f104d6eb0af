"""Folders of checkpoints: found on disk, and put in place when they are whole."""

from __future__ import annotations

import contextlib
import json
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

# Weights in any form; whatever else is in a folder goes with the model.
WEIGHT_FILE = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|gguf|onnx)(\.index\.json)?$|.*\.ckpt\..*"
)
_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.py")
_TEMPLATES = "additional_chat_templates"
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


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
    with file_errors():
        return {
            each["name"]: Tensor(each["kind"], tuple(each["shape"]))
            for each in _core.checkpoint_tensors(path)
        }


@contextlib.contextmanager
def file_errors() -> Iterator[None]:
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
            others = sorted(file.name for file in path.iterdir() if WEIGHT_FILE.match(file.name))
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
            and not WEIGHT_FILE.match(file.name)
        ]
        if (self.path / _TEMPLATES).is_dir():
            files += [file for file in (self.path / _TEMPLATES).iterdir() if file.is_file()]
        return sorted(files)
