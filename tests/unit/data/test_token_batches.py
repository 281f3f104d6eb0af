"""Batches by length and by a budget of tokens: each pair once per epoch."""

import time

import numpy as np
import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from oddsmith.data.token_batches import TokenBatches, pair_lengths


def test_lengths_of_pairs():
    rows = {"chosen_input_ids": [[1, 2, 3], [4]], "rejected_input_ids": [[5], [6, 7]]}
    assert pair_lengths(Dataset.from_dict(rows)).tolist() == [[3, 1], [1, 2]]
    rows = {"chosen_labels": [[1, 2]], "rejected_labels": [[5]], "prompt_input_ids": [[1]]}
    assert pair_lengths(Dataset.from_dict(rows)).tolist() == [[2, 1]]


@given(
    st.lists(st.integers(1, 50), min_size=4, max_size=60),
    st.integers(20, 120),
    st.integers(1, 4),
)
def test_every_pair_is_in_one_batch(lengths, budget, processes):
    parts = [TokenBatches(lengths, budget, 7, processes, rank) for rank in range(processes)]
    batches = [list(part) for part in parts]
    assert len({len(each) for each in batches}) == 1 and len(batches[0]) == len(parts[0])
    every = [batch for each in batches for batch in each]
    pairs = [index for batch in every for index in batch]
    assert set(pairs) == set(range(len(lengths)))
    # More than once only if there are too few pairs for equal processes.
    if len(pairs) > len(lengths):
        assert len(pairs) - len(lengths) < processes
    for batch in every:
        assert len(batch) == 1 or sum(lengths[index] for index in batch) <= budget


def naive_batches(lengths, budget, seed, processes):
    """All batches of all processes, one pair after the other."""
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    batches, left = [], -1
    for index in order:
        left -= lengths[index]
        if left < 0 or not batches:
            batches.append([])
            left = budget - lengths[index]
        batches[-1].append(index)
    while len(batches) % processes:
        longest = max(range(len(batches)), key=lambda index: len(batches[index]))
        batch = batches[longest]
        if len(batch) == 1:
            batches += batches[: -len(batches) % processes]
            break
        half = len(batch) // 2
        batches[longest : longest + 1] = [batch[:half], batch[half:]]
    order = torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()
    return [[batches[index] for index in order[rank::processes]] for rank in range(processes)]


@given(
    st.integers(1, 12),
    # Pairs of no token, and ones that are longer than the budget, too.
    st.lists(st.integers(0, 50), min_size=12, max_size=90),
    st.integers(1, 120),
)
def test_batches_are_those_of_the_naive_form(processes, lengths, budget):
    made = [list(TokenBatches(lengths, budget, 7, processes, rank)) for rank in range(processes)]
    assert made == naive_batches(lengths, budget, 7, processes)


def test_a_million_pairs_over_many_processes():
    lengths = np.random.default_rng(0).integers(50, 2000, 1_000_000)
    seconds = []
    for _ in range(3):
        start = time.process_time()
        batches = TokenBatches(lengths, 8192, 3, 64, 63)
        next(iter(batches))
        seconds.append(time.process_time() - start)
    assert len(batches) > 1900 and min(seconds) < 1, seconds


def test_batches_are_filled():
    lengths = np.random.default_rng(0).integers(10, 200, 500)
    batches = list(TokenBatches(lengths, 1000, 3))
    filled = np.mean([lengths[batch].sum() for batch in batches]) / 1000
    assert filled > 0.85


def test_epochs_have_another_order():
    batches = TokenBatches(list(range(10, 60)), 100, 3)
    first = list(batches)
    assert list(batches) == first
    batches.set_epoch(1)
    second = list(batches)
    assert second != first
    assert sorted(map(tuple, second)) == sorted(map(tuple, first))


def test_wrong_sizes():
    with pytest.raises(ValueError, match="max_tokens is 0; must be positive"):
        TokenBatches([1, 2], 0, 1)
    with pytest.raises(ValueError, match="2 pairs are too few for 3 processes"):
        TokenBatches([1, 2], 5, 1, 3)
