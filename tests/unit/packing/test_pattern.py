"""Patterns: windows and chunks by hand."""

import torch

from oddsmith.packing.pattern import CAUSAL, Pattern, longest_sequence


def test_masks_by_hand():
    device = torch.device("cpu")
    four = range(4)
    assert CAUSAL.mask(range(2, 4), four, device).int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert Pattern(window=2).mask(four, four, device).int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [0, 1, 1, 0],
        [0, 0, 1, 1],
    ]
    # Chunks of three begin at positions 0 and 3, whatever is first in the mask.
    assert Pattern(chunk=3).mask(range(2, 5), range(1, 5), device).int().tolist() == [
        [1, 1, 0, 0],
        [0, 0, 1, 0],
        [0, 0, 1, 1],
    ]


def test_the_first_token_that_is_seen():
    assert [CAUSAL.first_seen(place) for place in range(3)] == [0, 0, 0]
    assert [Pattern(window=2).first_seen(place) for place in range(5)] == [0, 0, 1, 2, 3]
    assert [Pattern(chunk=3).first_seen(place) for place in range(7)] == [0, 0, 0, 3, 3, 3, 6]


def test_limits_that_no_sequence_reaches_are_left_out():
    # Sequences of four tokens: a window of four is all of them.
    assert Pattern(window=4).within(4) == CAUSAL
    assert Pattern(window=3).within(4) == Pattern(window=3)
    assert Pattern(chunk=4).within(4) == CAUSAL
    assert Pattern(chunk=3).within(4) == Pattern(chunk=3)


def test_the_longest_sequence():
    assert longest_sequence(((4, 3, 2), (0, 2, 5), (3, 0, 1))) == 7
    assert longest_sequence(()) == 0
