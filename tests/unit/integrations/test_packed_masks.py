"""Masks of packed rows: which pattern a model asks for."""

import pytest
import torch
from transformers import masking_utils
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from oddsmith.integrations.packed_masks import (
    CannotPack,
    RowMask,
    pattern_mask,
    pattern_of,
    row_mask,
)
from oddsmith.packing.pattern import Pattern

NO_PADDING = torch.zeros(1, dtype=torch.int64)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 4096])
def test_the_functions_of_transformers_are_known(size):
    assert pattern_of(causal_mask_function, None) == Pattern()
    window = sliding_window_causal_mask_function(size)
    assert pattern_of(window, size) == Pattern(window=size)
    if size > 1:  # a chunk of one token is a window of one
        chunk = chunked_causal_mask_function(size, NO_PADDING)
        assert pattern_of(chunk, size) == Pattern(chunk=size)


@pytest.mark.parametrize(
    ("function", "size"),
    [
        (bidirectional_mask_function, None),
        (sliding_window_causal_mask_function(4), 5),
        (sliding_window_causal_mask_function(4), None),
        (masking_utils.sliding_window_bidirectional_mask_function(4), 4),
        (masking_utils.or_masks(causal_mask_function, bidirectional_mask_function), None),
        (chunked_causal_mask_function(4, torch.tensor([1])), 4),
    ],
)
def test_other_functions_are_refused(function, size):
    with pytest.raises(CannotPack, match="neither causal nor a window or chunk"):
        pattern_of(function, size)


def test_a_function_that_cannot_be_evaluated_is_refused():
    def fails(batch, head, query, key):
        raise IndexError("no such token")

    with pytest.raises(CannotPack, match="could not be read .IndexError: no such token"):
        pattern_of(fails, None)


def test_functions_of_one_code_with_other_values_are_told_apart():
    def make(size):
        return lambda batch, head, query, key: (key <= query) & (key > query - size)

    assert pattern_of(make(3), 3) == Pattern(window=3)
    with pytest.raises(CannotPack):
        pattern_of(make(2), 3)
    # Nor are functions with the same tensor but other contents remembered.
    assert pattern_of(chunked_causal_mask_function(4, NO_PADDING), 4) == Pattern(chunk=4)
    with pytest.raises(CannotPack):
        pattern_of(chunked_causal_mask_function(4, NO_PADDING + 2), 4)


def test_the_mask_of_a_row():
    segments = ((2, 1, 3), (0, 2, 1))
    mask = row_mask(segments, "cpu")
    assert mask.tolist() == [[1] * 9] and mask.dtype == torch.int64
    # Two sequences have each token of a shared prompt.
    assert row_mask(segments, "cpu", by_sequence=True).tolist() == [[2, 2, 1, 1, 1, 1, 1, 1, 1]]


def test_masks_are_kept_by_what_models_do_to_them():
    row = object()
    mask = RowMask.of(torch.ones(1, 1, 1, 1, dtype=torch.bool), Pattern(window=3), row)
    for changed in (mask.to(torch.float32), mask[:, :, :, :5], mask.expand(1, 2, 1, 1)):
        assert isinstance(changed, RowMask) and changed.pattern == Pattern(window=3)
        assert changed.row is row
    # What is computed from one is a tensor like any other.
    assert type(mask + 1) is torch.Tensor and type(mask.sum()) is torch.Tensor


def test_only_masks_of_rows_are_ours():
    def theirs(*args, **kwargs):
        return args, kwargs

    given = {"attention_mask": torch.ones(1, 3), "mask_function": causal_mask_function}
    assert pattern_mask(theirs, 1, **given) == ((1,), given)
    given["attention_mask"] = row_mask(((0, 1, 2),), "cpu", row="the row")
    made = pattern_mask(theirs, 1, **given)
    assert made.pattern == Pattern() and made.row == "the row"
    with pytest.raises(CannotPack, match="a function of its own"):
        pattern_mask(theirs, 1, **given, use_vmap=True)
