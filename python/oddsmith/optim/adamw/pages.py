"""Where a paged optimiser keeps its state: in a file that is memory, or in the host's pinned memory."""

from __future__ import annotations

import errno
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

# Tensors begin at multiples of this many bytes.
ALIGNMENT = 256

Entry = tuple[tuple[int, ...], torch.dtype]


def carve(storage: torch.UntypedStorage, entries: list[Entry]) -> list[Tensor]:
    """Tensors one behind the other in a storage."""
    tensors, start = [], 0
    for shape, dtype in entries:
        whole = torch.empty(0, dtype=dtype, device=storage.device)
        place = start // dtype.itemsize
        # torch's stub asks for strides, which have a default.
        tensors.append(whole.set_(storage, place, shape))  # pyright: ignore[reportCallIssue]
        start += padded_bytes((shape, dtype))
    return tensors


def _by_dtype(entries: list[Entry], storage: Callable[[int], torch.UntypedStorage]) -> list[Tensor]:
    """Tensors in one storage a dtype: torch.save refuses storages that are seen as several."""
    tensors: dict[int, Tensor] = {}
    for dtype in {dtype for _, dtype in entries}:
        places = [place for place, entry in enumerate(entries) if entry[1] == dtype]
        same = [entries[place] for place in places]
        tensors |= zip(places, carve(storage(sum(map(padded_bytes, same))), same))
    return [tensors[place] for place in range(len(entries))]


def padded_bytes(entry: Entry) -> int:
    """Bytes of a tensor up to where the next begins."""
    size = math.prod(entry[0]) * entry[1].itemsize
    return -(-size // ALIGNMENT) * ALIGNMENT


class FilePages:
    """
    Tensors in files that are mapped into memory: the system writes what it has no room for.

    A file is as large as its tensors from the start, so that a full disk is an error there and then and
    not in the middle of a step. It has no name once it is mapped: it goes with its last tensor, even if
    the process is killed.

    Args:
        folder (`str` or `Path`, *optional*): Where the files are; the system's folder for temporary
            files by default.

    Raises:
        ValueError: If there is no such folder, or nothing can be written there.
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None):
        self.folder: Path = Path(tempfile.gettempdir() if folder is None else folder)
        try:
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise ValueError(
                f"page_dir is {str(self.folder)!r}; must be a folder that can be written to: "
                f"{error.strerror}"
            ) from None

    def allocate(self, entries: list[Entry]) -> list[Tensor]:
        """
        Tensors of zeros.

        Raises:
            OSError: If the disk has no room for them.
        """
        return _by_dtype(entries, self._file)

    def _file(self, total: int) -> torch.UntypedStorage:
        if total == 0:
            return torch.UntypedStorage(0)
        handle, name = tempfile.mkstemp(prefix="oddsmith-", suffix=".pages", dir=self.folder)
        try:
            self._reserve(handle, total)
            storage = torch.UntypedStorage.from_file(name, True, total)
            return cast(torch.UntypedStorage, storage)  # the class that it is called on
        finally:
            os.close(handle)
            os.unlink(name)

    def _reserve(self, handle: int, total: int) -> None:
        try:
            os.posix_fallocate(handle, 0, total)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            free = shutil.disk_usage(self.folder).free
            raise OSError(
                error.errno,
                f"the optimizer's state takes {total:,} bytes, and {free:,} are free in page_dir. The "
                "run can go on from its last checkpoint, with a page_dir that has room",
                str(self.folder),
            ) from None


class PinnedPages:
    """Tensors in memory of the host that a GPU copies from and to while it computes."""

    def allocate(self, entries: list[Entry]) -> list[Tensor]:
        """Tensors of zeros, in page-locked memory where there is a GPU."""
        pinned = torch.cuda.is_available()

        def storage(total: int) -> torch.UntypedStorage:
            return torch.zeros(total, dtype=torch.uint8, pin_memory=pinned).untyped_storage()

        return _by_dtype(entries, storage)
