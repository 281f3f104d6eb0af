"""Which pairs go into a batch: grouped by length, or as many as a budget of tokens holds."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler


def pair_lengths(dataset: Dataset) -> np.ndarray:
    """
    Tokens of both sequences of each row, `(rows, 2)` `int64`.

    Args:
        dataset (`Dataset`): Prepared rows.
    """
    columns = ["chosen_input_ids", "rejected_input_ids"]
    if not set(columns) <= set(dataset.column_names):  # encoder-decoder: the prompt is apart
        columns = ["chosen_labels", "rejected_labels"]
    parts = []
    for table in dataset.select_columns(columns).with_format("arrow").iter(1000):
        sides = (pc.list_value_length(table[column]).to_numpy() for column in columns)
        parts.append(np.stack(list(sides), axis=1))
    return np.concatenate(parts).astype(np.int64)


class TokenBatches(Sampler[list[int]]):
    """
    Batches of pairs that hold at most so many tokens.

    Pairs are shuffled, then filled into batches in that order; each epoch has the same batches in
    another order, so that all epochs have as many. Each pair is in one batch of one process.

    Args:
        lengths (`Sequence[int]`): Tokens of each pair.
        max_tokens (`int`): Most tokens of a batch; a pair that is longer is a batch by itself.
        seed (`int`): Of the shuffling; the same on all processes.
        num_processes (`int`, *optional*, defaults to 1): Processes that share the batches.
        process_index (`int`, *optional*, defaults to 0): Which of them this is.

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
        self.seed, self.epoch = seed, 0
        self.num_processes, self.process_index = num_processes, process_index
        order = torch.randperm(len(lengths), generator=self._generator()).tolist()
        self.batches = _filled(order, lengths, max_tokens)
        # Every process takes the same number of steps: the longest lists are halved until they do.
        while len(self.batches) % num_processes:
            longest = max(range(len(self.batches)), key=lambda index: len(self.batches[index]))
            batch = self.batches[longest]
            if len(batch) == 1:  # nothing to halve: some pairs come twice, as under DDP elsewhere
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


class BatchHooks:
    """Part of [`~oddsmith.ORPOTrainer`]: how rows become batches."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        dataset = self.train_dataset if train_dataset is None else train_dataset
        strategy = getattr(self.args, "train_sampling_strategy", "random")
        by_length = strategy in ("group_by_length", "batch_rebalance")
        column = self.args.length_column_name
        if by_length and isinstance(dataset, Dataset) and column not in dataset.column_names:
            # transformers would measure `input_ids`, and there is no such column.
            dataset = Dataset.from_dict({column: pair_lengths(dataset).sum(axis=1)})
        return super()._get_train_sampler(dataset)

    def get_train_dataloader(self) -> DataLoader:
        """The training batches; by `max_tokens_per_batch` if that is set."""
        args = self.args
        if args.max_tokens_per_batch is None:
            return super().get_train_dataloader()
        if not isinstance(self.train_dataset, Dataset):
            raise ValueError(
                f"max_tokens_per_batch is {args.max_tokens_per_batch} and train_dataset a "
                f"{type(self.train_dataset).__name__}; needs a datasets.Dataset, whose lengths are "
                "known"
            )
        accelerator = self.accelerator
        batches = TokenBatches(
            pair_lengths(self.train_dataset).sum(axis=1),
            args.max_tokens_per_batch,
            args.seed if args.data_seed is None else args.data_seed,
            accelerator.num_processes,
            accelerator.process_index,
        )
        workers: dict[str, Any] = {}
        if args.dataloader_num_workers:
            workers["persistent_workers"] = args.dataloader_persistent_workers
            workers["prefetch_factor"] = args.dataloader_prefetch_factor
        loader = DataLoader(
            self.train_dataset,
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            **workers,
        )
        # The batches know their process: here is nothing left to distribute.
        return prepare_data_loader(
            loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True
        )
