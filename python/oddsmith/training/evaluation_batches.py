"""Evaluation over several processes: each row in one batch of one process."""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from .engine import data_parallel

# Key of a batch that only repeats a row, because other processes still have a batch and a split
# model needs all of them.
FILLS_UP = "_oddsmith_fills_up"


def shares(rows: int, processes: int) -> list[tuple[int, int]]:
    """Starts and ends of the parts of some rows, as equal as possible."""
    ends = [rows * index // processes for index in range(processes + 1)]
    return list(pairwise(ends))


def evaluation_loader(
    rows: Any,
    order: Sequence[int] | None,
    batch_size: int,
    accelerator: Accelerator,
    *,
    collate_fn: Callable[[list[Any]], Any],
    **options: Any,
) -> DataLoader[Any]:
    """
    The evaluation batches of this process.

    All processes have the same number of batches. If fewer rows than processes are left for the
    last one, a process without a row gets one that others have, in a batch marked by `FILLS_UP`.

    Args:
        rows (`Dataset` or `IterableDataset`): The rows, the same on all processes.
        order (`Sequence[int]`, *optional*): Order of the rows; None for a stream.
        batch_size (`int`): Rows of a batch.
        accelerator (`Accelerator`): Knows the processes.
        collate_fn (`Callable`): Makes a batch of rows.
        options (`Any`): Further arguments of the `DataLoader`.
    """
    size, index = data_parallel(accelerator)
    collate = _Collate(collate_fn)
    if order is None:
        stream = _StreamShare(rows, batch_size, size, index)
        # Rows come in batches already.
        loader = DataLoader(stream, batch_size=None, collate_fn=collate, **options)
    else:
        loader = DataLoader(
            _Rows(rows),
            batch_sampler=_Batches(order, batch_size, size, index),
            collate_fn=collate,
            **options,
        )
    # The batches are already those of this process, so accelerate must not split them.
    return prepare_data_loader(
        loader,
        accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        dispatch_batches=False,
    )


class _Repeated:
    """A row that fills a step up."""

    def __init__(self, row: Any):
        self.row = row


class _Collate:
    """A collator that marks batches of repeated rows; a class, so that workers can have it."""

    def __init__(self, collate: Callable[[list[Any]], Any]):
        self.collate = collate

    def __call__(self, rows: list[Any]) -> Any:
        if not isinstance(rows[0], _Repeated):
            return self.collate(rows)
        batch = self.collate([row.row for row in rows])
        batch[FILLS_UP] = True
        return batch


class _Batches(Sampler[list[int]]):
    """Indices of each batch; one below 0 is that of a repeated row."""

    def __init__(self, order: Sequence[int], batch_size: int, processes: int, index: int):
        self.order = order
        self.rows = batch_size * processes  # of a step of all processes
        self.processes, self.index = processes, index

    def __len__(self) -> int:
        return -(-len(self.order) // self.rows)

    def __iter__(self) -> Iterator[list[int]]:
        for first in range(0, len(self.order), self.rows):
            step = self.order[first : first + self.rows]
            start, end = shares(len(step), self.processes)[self.index]
            yield list(step[start:end]) or [-1 - step[0]]


class _Rows(Dataset[Any]):
    """Rows by the indices of `_Batches`."""

    def __init__(self, rows: Any):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Any:
        return _Repeated(self.rows[-1 - index]) if index < 0 else self.rows[index]

    def __getitems__(self, indices: list[int]) -> list[Any]:
        read = getattr(self.rows, "__getitems__", None)
        if read is None or indices[0] < 0:
            return [self[index] for index in indices]
        return read(indices)


class _StreamShare(IterableDataset[Any]):
    """Batches of this process from a stream that all processes read."""

    def __init__(self, rows: Any, batch_size: int, processes: int, index: int):
        self.rows = rows
        self.step = batch_size * processes
        self.processes, self.index = processes, index

    def __iter__(self) -> Iterator[list[Any]]:
        step: list[Any] = []
        for row in self.rows:
            step.append(row)
            if len(step) == self.step:
                yield self._own(step)
                step = []
        if step:
            yield self._own(step)

    def _own(self, step: list[Any]) -> list[Any]:
        start, end = shares(len(step), self.processes)[self.index]
        return step[start:end] or [_Repeated(step[0])]

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, if the stream is shuffled."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)
