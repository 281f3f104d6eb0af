"""The sampler and loader of a run; tests/e2e/test_trainer_batches.py trains with them."""

import pytest
from datasets import Dataset
from torch.utils.data import RandomSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from oddsmith.data.token_batches import TokenBatches, pair_lengths
from support.trainer_runs import pairs


def test_rows_are_drawn_at_random_unless_asked(make):
    sampler = make()._get_train_sampler()
    assert type(sampler) is RandomSampler and len(sampler) == 6


@pytest.mark.parametrize("strategy", ["group_by_length", "batch_rebalance"])
def test_lengths_of_both_sides_are_grouped(make, strategy):
    trainer = make(config={"train_sampling_strategy": strategy})
    lengths = pair_lengths(trainer.train_dataset).sum(axis=1).tolist()
    sampler = trainer._get_train_sampler()
    if strategy == "group_by_length":
        assert isinstance(sampler, LengthGroupedSampler)
    assert list(sampler.lengths) == lengths
    # A column of that name is used unchanged, and so is another dataset.
    given = Dataset.from_dict({trainer.args.length_column_name: [5, 9, 2]})
    assert list(trainer._get_train_sampler(given).lengths) == [5, 9, 2]


def test_batches_of_tokens(make):
    trainer = make(config={"max_tokens_per_batch": 150, "data_seed": 5})
    loader = trainer.get_train_dataloader()
    lengths = pair_lengths(trainer.train_dataset).sum(axis=1)
    expected = [list(batch) for batch in TokenBatches(lengths, 150, 5, 1, 0)]
    texts = [batch["chosen"] for batch in loader]
    assert texts == [[trainer.train_dataset["chosen"][i] for i in batch] for batch in expected]
    assert len(texts) > 1


def test_the_seed_of_the_run_is_that_of_the_batches(make):
    trainer = make(config={"max_tokens_per_batch": 150, "seed": 11})
    (first, *_) = trainer.get_train_dataloader()
    lengths = pair_lengths(trainer.train_dataset).sum(axis=1)
    (expected, *_) = TokenBatches(lengths, 150, 11, 1, 0)
    assert first["chosen"] == [trainer.train_dataset["chosen"][i] for i in expected]


def test_workers_are_those_of_the_arguments(make):
    trainer = make(
        config={
            "max_tokens_per_batch": 150, "dataloader_num_workers": 2,
            "dataloader_prefetch_factor": 3, "dataloader_persistent_workers": True,
        }
    )  # fmt: skip
    loader = trainer.get_train_dataloader()
    assert (loader.num_workers, loader.prefetch_factor) == (2, 3) and loader.persistent_workers


def test_a_stream_has_no_lengths(make):
    stream = pairs(6).to_iterable_dataset()
    trainer = make(train_dataset=stream, config={"max_tokens_per_batch": 99})
    with pytest.raises(ValueError, match="max_tokens_per_batch is 99 and train_dataset a Iterable"):
        trainer.get_train_dataloader()


@pytest.mark.parametrize("kind", ["all", "non_padding"])
def test_tokens_seen_are_those_of_both_sides(make, kind):
    trainer = make(config={"include_num_input_tokens_seen": kind, "max_steps": 1})
    trainer.train()
    batches = list(trainer.get_train_dataloader())
    seen = trainer.state.num_input_tokens_seen
    real = int(pair_lengths(trainer.train_dataset).sum())
    sides = [batch[f"{side}_input_ids"] for batch in batches for side in ("chosen", "rejected")]
    # One step has two of the three batches.
    assert 0 < seen < (real if kind == "non_padding" else sum(side.numel() for side in sides))
    assert trainer.state.log_history[0]["num_input_tokens_seen"] == seen
