"""Which pairs form a batch: grouped by length, or as many as fit a token budget."""

import heapq
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.utils.data import Sampler

from .arrow_rows import arrow_batches


def pair_lengths(dataset: Dataset) -> np.ndarray:
    """
    Tokens of both sequences of each row, `(rows, 2)` `int64`.

    Args:
        dataset (`Dataset`): Prepared rows.
    """
    columns = ["chosen_input_ids", "rejected_input_ids"]
    if not set(columns) <= set(dataset.column_names):  # encoder-decoder models
        columns = ["chosen_labels", "rejected_labels"]
    parts = []
    for table in arrow_batches(dataset, columns, 1000):
        sides = (
            pc.call_function("list_value_length", [table[column]]).to_numpy() for column in columns
        )
        parts.append(np.stack(list(sides), axis=1))
    return np.concatenate(parts).astype(np.int64)


class TokenBatches(Sampler[list[int]]):
    """
    Batches of pairs with at most `max_tokens` tokens.

    Pairs are shuffled, then filled into batches in that order. Each epoch has the same batches in
    another order, so that all epochs have the same number of steps. Each pair is in one batch of
    one process.

    Args:
        lengths (`Sequence[int]` or `np.ndarray`): Tokens of each pair.
        max_tokens (`int`): Most tokens of a batch; a longer pair is a batch alone.
        seed (`int`): Seed of the shuffling; the same on all processes.
        num_processes (`int`, *optional*, defaults to 1): Processes that share the batches.
        process_index (`int`, *optional*, defaults to 0): Index of this process.

    Raises:
        ValueError: If `max_tokens` is not positive, or there are fewer pairs than processes.
    """

    def __init__(
        self,
        lengths: Sequence[int] | np.ndarray,
        max_tokens: int,
        seed: int,
        num_processes: int = 1,
        process_index: int = 0,
    ):
        if max_tokens <= 0:
            raise ValueError(f"max_tokens is {max_tokens}; must be positive")
        if len(lengths) < num_processes:
            raise ValueError(f"{len(lengths)} pairs are too few for {num_processes} processes")
        self.seed: int = seed
        self.epoch: int = 0
        self.num_processes: int = num_processes
        self.process_index: int = process_index
        order = torch.randperm(len(lengths), generator=self._generator()).numpy()
        ends = _ends(np.asarray(lengths, dtype=np.int64)[order], max_tokens)
        # Batch i is `order[starts[i]:ends[i]]`.
        self._order: np.ndarray = order
        self._starts: np.ndarray
        self._ends: np.ndarray
        self._starts, self._ends = _evened(ends, num_processes)

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(len(self._starts), generator=self._generator()).numpy()
        for index in order[self.process_index :: self.num_processes]:
            yield self._order[self._starts[index] : self._ends[index]].tolist()

    def __len__(self) -> int:
        return len(self._starts) // self.num_processes


def _ends(lengths: np.ndarray, max_tokens: int) -> np.ndarray:
    """Ends of batches that are filled with pairs one after the other."""
    total = np.cumsum(lengths)
    # Where a batch ends that begins with pair i: before the first pair that exceeds the budget.
    following = np.searchsorted(total, total - lengths + max_tokens, side="right")
    following = np.maximum(following, np.arange(1, len(lengths) + 1)).tolist()
    ends, end, pairs = [], 0, len(lengths)
    while end < pairs:
        end = following[end]
        ends.append(end)
    return np.array(ends)


def _evened(ends: np.ndarray, num_processes: int) -> tuple[np.ndarray, np.ndarray]:
    """Starts and ends of a multiple of `num_processes` batches."""
    starts = np.concatenate([[0], ends[:-1]])
    missing = -len(ends) % num_processes
    # Every process takes the same number of steps: the longest batches are halved until they do.
    # Only the `missing` longest can be halved, or their halves; the first of equal ones goes first.
    longest = np.argsort(starts - ends, kind="stable")[:missing]
    heap = [(int(starts[i] - ends[i]), int(starts[i])) for i in longest]
    heapq.heapify(heap)
    halved = []
    while missing and heap[0][0] < -1:
        size, start = heap[0]
        half = -size // 2
        heapq.heapreplace(heap, (-half, start))
        heapq.heappush(heap, (size + half, start + half))
        halved.append(start + half)
        missing -= 1
    starts = np.sort(np.concatenate([starts, np.array(halved, dtype=starts.dtype)]))
    ends = np.append(starts[1:], ends[-1:])
    # What cannot be halved: some pairs come twice, as usual under DDP.
    return np.append(starts, starts[:missing]), np.append(ends, ends[:missing])
