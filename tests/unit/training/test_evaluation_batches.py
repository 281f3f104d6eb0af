"""Rows of an evaluation over processes: each once, and as many batches on each process."""

from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from hypothesis import given, settings
from hypothesis import strategies as st

from oddsmith.training.evaluation_batches import FILLS_UP, evaluation_loader, shares


def accelerator(processes, index):
    return SimpleNamespace(
        num_processes=processes,
        process_index=index,
        distributed_type=None,
        torch_device_mesh=None,
        device=torch.device("cpu"),
    )


def collate(rows):
    return {"values": torch.tensor([row["value"] for row in rows])}


def batches(rows, order, size, processes, workers=0):
    loaders = [
        evaluation_loader(
            rows,
            order,
            size,
            accelerator(processes, index),
            collate_fn=collate,
            num_workers=workers,
        )
        for index in range(processes)
    ]
    return [[(batch["values"].tolist(), FILLS_UP in batch) for batch in each] for each in loaders]


def check(made, count, size):
    assert len({len(each) for each in made}) == 1
    kept = [value for each in made for values, fills in each for value in values if not fills]
    assert sorted(kept) == list(range(count))
    assert all(0 < len(values) <= size for each in made for values, _ in each)
    # Only the last step is filled up, and never on the process that has a row.
    assert not any(fills for each in made for _, fills in each[:-1])
    assert not all(each[-1][1] for each in made)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 40), st.integers(1, 5), st.integers(1, 4))
def test_every_row_is_in_one_batch(count, size, processes):
    rows = Dataset.from_dict({"value": range(count)})
    order = list(reversed(range(count)))
    made = batches(rows, order, size, processes)
    check(made, count, size)
    assert made[0][0][0][0] == count - 1  # the order that was asked for
    check(
        batches([{"value": value} for value in range(count)], order, size, processes), count, size
    )
    check(batches(rows.to_iterable_dataset(), None, size, processes), count, size)


@pytest.mark.parametrize("shards", [1, 2])
def test_streams_in_workers(shards):
    rows = Dataset.from_dict({"value": range(7)}).to_iterable_dataset(num_shards=shards)
    made = batches(rows, None, 2, 2, workers=shards)
    assert len(made[0]) == len(made[1])
    kept = [value for each in made for values, fills in each for value in values if not fills]
    assert sorted(kept) == list(range(7))


def test_parts_are_as_equal_as_possible():
    assert shares(7, 3) == [(0, 2), (2, 4), (4, 7)]
    assert shares(1, 3) == [(0, 0), (0, 0), (0, 1)]
