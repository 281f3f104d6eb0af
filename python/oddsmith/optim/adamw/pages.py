"""Storage of a paged optimiser's state: a memory-mapped file, or pinned host memory."""

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

# How often this process was made by a fork of one that had imported this. A forked process shares the pages of its parent.
_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)


def carve(storage: torch.UntypedStorage, entries: list[Entry]) -> list[Tensor]:
    """Consecutive tensors in one storage."""
    tensors, start = [], 0
    for shape, dtype in entries:
        whole = torch.empty(0, dtype=dtype, device=storage.device)
        place = start // dtype.itemsize
        # torch's stub asks for strides, which have a default.
        tensors.append(whole.set_(storage, place, shape))  # pyright: ignore[reportCallIssue]
        start += padded_bytes((shape, dtype))
    return tensors


def _by_dtype(entries: list[Entry], storage: Callable[[int], torch.UntypedStorage]) -> list[Tensor]:
    """Tensors in one storage per dtype: torch.save refuses a storage with several dtypes."""
    tensors: dict[int, Tensor] = {}
    for dtype in {dtype for _, dtype in entries}:
        places = [place for place, entry in enumerate(entries) if entry[1] == dtype]
        same = [entries[place] for place in places]
        tensors |= zip(places, carve(storage(sum(map(padded_bytes, same))), same))
    return [tensors[place] for place in range(len(entries))]


def padded_bytes(entry: Entry) -> int:
    """Bytes from a tensor to the next one."""
    size = math.prod(entry[0]) * entry[1].itemsize
    return -(-size // ALIGNMENT) * ALIGNMENT


class FilePages:
    """
    Tensors in memory-mapped files: the system writes pages to disk when memory is full.

    A file has its full size from the start, so that a full disk is an error at once and not in the
    middle of a step. It is unlinked once it is mapped, so it is freed with its last tensor, even if
    the process is killed.

    Args:
        folder (`str` or `Path`, *optional*): Where the files are; the system's folder for temporary
            files by default.

    Raises:
        ValueError: If there is no such folder, or it is not writable.
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
        self._made_after: int = _forks

    def check_process(self) -> None:
        """
        Checks that the pages belong to this process.

        Raises:
            RuntimeError: If they are those of the process that this one was forked from.
        """
        if self._made_after != _forks:
            raise RuntimeError(
                "this process was forked from the one that made the paged optimizer, and a step would "
                "change the state of both; make the optimizer in the process that uses it"
            )

    def allocate(self, entries: list[Entry]) -> list[Tensor]:
        """
        Tensors of zeros.

        Raises:
            OSError: If the disk is full.
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
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(handle, 0, total)
            elif total > shutil.disk_usage(self.folder).free:  # systems that cannot reserve
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            else:
                os.ftruncate(handle, total)
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
    """Tensors in pinned host memory, which a GPU reads and writes while it computes."""

    def allocate(self, entries: list[Entry]) -> list[Tensor]:
        """Tensors of zeros, in pinned memory if there is a GPU."""
        pinned = torch.cuda.is_available()

        def storage(total: int) -> torch.UntypedStorage:
            return torch.zeros(total, dtype=torch.uint8, pin_memory=pinned).untyped_storage()

        return _by_dtype(entries, storage)
