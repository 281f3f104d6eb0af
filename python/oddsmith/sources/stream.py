"""Streams the rows of a dataset without loading it: files of any size, or from the hub."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from datasets import load_dataset

from ..errors import UserError
from .find import TRAIN_SPLITS, is_path, local_splits, reason
from .image_paths import COLUMNS, located
from .json_records import LONGEST
from .records import FileRecords, Record


class RecordStream:
    """
    The rows of a dataset in order, read one at a time.

    Args:
        name (`str`): As in [`load_source`].
        config (`str`, *optional*): Configuration of a hub dataset.
        split (`str`, *optional*): Split to read; by default the training split, or the only one.
        longest (`int`, *optional*, defaults to 64 MB): Most bytes of a row of a JSON file.

    Attributes:
        size (`int` or `None`): Bytes to read, for progress; `None` from the hub.

    Raises:
        UserError: If there is no such dataset or split.
    """

    def __init__(
        self,
        name: str,
        config: str | None = None,
        split: str | None = None,
        longest: int = LONGEST,
    ):
        self.name = name
        self._files: list[FileRecords] = []
        self._rows: Iterable[dict[str, Any]] | None = None
        path = Path(name).expanduser()
        if path.exists():
            groups = local_splits(path)
            chosen = groups[choose_split(name, groups, split)]
            self._files = [FileRecords(file, longest) for file in chosen]
        elif is_path(name):
            raise UserError(f"dataset {name}: no such file or folder")
        else:
            self._rows = _open_hub(name, config, split)
        self.size: int | None = sum(file.size for file in self._files) if self._files else None

    @property
    def done(self) -> int:
        """Bytes read so far."""
        return sum(file.done for file in self._files)

    def __iter__(self) -> Iterator[Record]:
        for file in self._files:
            folder = file.path.parent.absolute()
            # The rows of a saved dataset came from other files.
            saved = file.path.suffix == ".arrow"
            for record in file:
                fields = record.fields
                if fields is not None and not saved and any(fields.get(x) for x in COLUMNS):
                    record = record._replace(fields=located(fields, folder, record.where))
                yield record
        if self._rows is not None:
            rows, number = iter(self._rows), 0
            while True:
                try:
                    fields = next(rows, None)
                except Exception as error:  # network, parsers of the hub: no common exception type
                    raise UserError(
                        f"dataset {self.name} after row {number}: {reason(error)}"
                    ) from error
                if fields is None:
                    return
                number += 1
                yield Record(fields, self.name, "row", number)


def choose_split(name: str, splits: Iterable[str], wanted: str | None) -> str:
    """
    The split to read: `wanted`, or the training split, or the only one.

    Raises:
        UserError: If it does not exist, or the choice is not unique.
    """
    splits = list(splits)
    if wanted is not None:
        if wanted not in splits:
            raise UserError(f"--split is {wanted!r}; dataset {name} has {', '.join(splits)}")
        return wanted
    for split in TRAIN_SPLITS + (tuple(splits) if len(splits) == 1 else ()):
        if split in splits:
            return split
    raise UserError(
        f"dataset {name} has the splits {', '.join(splits)}; name the one to read with --split"
    )


def _open_hub(name: str, config: str | None, split: str | None) -> Iterable[dict[str, Any]]:
    try:
        splits = load_dataset(name, config, streaming=True)
    except Exception as error:
        raise UserError(
            f"dataset {name} is not a local path and cannot be loaded from the hub: {reason(error)}"
        ) from error
    return cast(Mapping[str, Iterable[dict[str, Any]]], splits)[
        choose_split(name, map(str, splits), split)
    ]
