"""Which pairs form a batch: grouped by length, or as many as fit a token budget."""

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
        lengths (`Sequence[int]`): Tokens of each pair.
        max_tokens (`int`): Most tokens of a batch; a longer pair is a batch alone.
        seed (`int`): Seed of the shuffling; the same on all processes.
        num_processes (`int`, *optional*, defaults to 1): Processes that share the batches.
        process_index (`int`, *optional*, defaults to 0): Index of this process.

    Raises:
        ValueError: If `max_tokens` is not positive, or there are fewer pairs than processes.
    """

    def __init__(
        self,
        lengths: Sequence[int],
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
        order = torch.randperm(len(lengths), generator=self._generator()).tolist()
        self.batches: list[list[int]] = _filled(order, lengths, max_tokens)
        # Every process takes the same number of steps: the longest lists are halved until they do.
        while len(self.batches) % num_processes:
            longest = max(range(len(self.batches)), key=lambda index: len(self.batches[index]))
            batch = self.batches[longest]
            if len(batch) == 1:  # cannot be halved: some pairs come twice, as usual under DDP
                missing = -len(self.batches) % num_processes
                self.batches += self.batches[:missing]
                break
            half = len(batch) // 2
            self.batches[longest : longest + 1] = [batch[:half], batch[half:]]

    def _generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed + self.epoch)

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(len(self.batches), generator=self._generator()).tolist()
        for index in order[self.process_index :: self.num_processes]:
            yield self.batches[index]

    def __len__(self) -> int:
        return len(self.batches) // self.num_processes


def _filled(order: list[int], lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    batches, left = [], -1
    for index in order:
        left -= int(lengths[index])
        if left < 0 or not batches:
            batches.append([])
            left = max_tokens - int(lengths[index])
        batches[-1].append(index)
    return batches
