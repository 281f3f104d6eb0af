"""The rows of data files, counted by the reader of all commands before `datasets` reads them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from datasets import config
from tqdm import tqdm

from ..errors import UserError
from ..stage import staged_file
from .json_records import LONGEST
from .records import FileRecords

__all__ = ["count_rows"]

# Changes with what the reader takes.
_READER = 1


def count_rows(paths: Sequence[Path], longest: int = LONGEST) -> int:
    """
    The number of rows in files that can be read to their ends.

    `datasets` reads some damaged files without a word. Files that have not changed since they were
    counted are not read again.

    Args:
        paths (`Sequence[Path]`): JSON files.
        longest (`int`, *optional*, defaults to 64 MB): Most bytes of a row.

    Raises:
        UserError: Names the file and line that cannot be read.
    """
    files = [FileRecords(path, longest) for path in paths]
    total = 0
    with tqdm(
        total=sum(file.size for file in files), desc="checking", unit="B", unit_scale=True,
        delay=1.0, leave=False, disable=None,
    ) as bar:  # fmt: skip
        for file in files:
            total += _known(file) or _count(file, bar)
    return total


def _count(file: FileRecords, bar: tqdm) -> int:
    count, before = 0, bar.n
    for record in file:
        if record.problem is not None:
            raise UserError(f"{record.where}: {record.problem}")
        count += 1
        if count % 256 == 0:
            bar.update(before + file.done - bar.n)
    # A folder that cannot be written to costs the next run some time.
    with suppress(OSError), staged_file(_verdict(file)) as verdict:
        verdict.write(str(count).encode())
    return count


def _known(file: FileRecords) -> int | None:
    try:
        return int(_verdict(file).read_text())
    except (OSError, ValueError):
        return None


def _verdict(file: FileRecords) -> Path:
    status = file.path.stat()
    key = (_READER, file.path.resolve(), status.st_size, status.st_mtime_ns, file.longest)
    name = hashlib.sha256(repr(key).encode()).hexdigest()
    return Path(config.HF_DATASETS_CACHE) / "oddsmith" / "counted" / name
