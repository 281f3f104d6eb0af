"""Batches of a training run: the sampler of the dataloader."""

from typing import Any, cast

import torch
from accelerate.data_loader import prepare_data_loader
from datasets import Dataset
from torch.utils.data import DataLoader, Sampler

from ..data.token_batches import TokenBatches, pair_lengths
from .engine import data_parallel
from .trainer_parts import TrainerParts

# Of `train_sampling_strategy`: those that need the length of each row.
LENGTH_STRATEGIES = ("group_by_length", "batch_rebalance")


class BatchHooks(TrainerParts):
    """Part of [`~oddsmith.ORPOTrainer`]: how rows become batches."""

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[Any] | None:
        dataset: Any = self.train_dataset if train_dataset is None else train_dataset
        strategy = getattr(self.args, "train_sampling_strategy", "random")
        by_length = strategy in LENGTH_STRATEGIES
        column = self.args.length_column_name
        own = dataset if isinstance(dataset, Dataset) else None
        if by_length and own is not None and column not in own.column_names:
            # transformers would use the length of `input_ids`, but there is no such column.
            own = Dataset.from_dict({column: pair_lengths(own).sum(axis=1)})
            return super()._get_train_sampler(cast(Any, own))
        return super()._get_train_sampler(cast(Any, dataset))

    def _track_num_input_tokens(self, inputs: dict[str, Any]) -> None:
        # transformers looks for `input_ids`; these are the sequences of both sides.
        if self.is_encoder_decoder:
            parts = ["prompt_{}", "prompt_{}"]
        else:
            parts = ["chosen_{}", "rejected_{}"]
        both = {
            column: torch.cat([inputs[part.format(column)].flatten() for part in parts])
            for column in ("input_ids", "attention_mask")
            if all(part.format(column) in inputs for part in parts)
        }
        if "input_ids" in both:
            name = getattr(self.model, "main_input_name", "input_ids")
            inputs = {**both, name: both["input_ids"]}
        super()._track_num_input_tokens(inputs)

    def get_train_dataloader(self) -> DataLoader[Any]:
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
            *data_parallel(accelerator),
        )
        workers: dict[str, Any] = {}
        if args.dataloader_num_workers:
            workers["persistent_workers"] = args.dataloader_persistent_workers
            workers["prefetch_factor"] = args.dataloader_prefetch_factor
        loader = DataLoader(
            cast(Any, self.train_dataset),  # torch reads it by index, whatever its class
            batch_sampler=batches,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            **workers,
        )
        # The batches are already those of this process, so accelerate must not split them.
        return prepare_data_loader(
            loader, accelerator.device, num_processes=1, process_index=0, put_on_device=True
        )
