"""Pattern: which earlier tokens of its own sequence a token attends to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

Segments = tuple[tuple[int, int, int], ...]


class Pattern(NamedTuple):
    """
    Causal attention, limited by a window or a chunk. Positions are those in the sequence.

    Args:
        window (`int`, *optional*): A token sees this many tokens, itself included.
        chunk (`int`, *optional*): A token sees its own chunk; chunks of this size begin at position 0.
    """

    window: int | None = None
    chunk: int | None = None

    def within(self, longest: int) -> Pattern:
        """The same pattern for sequences of at most `longest` tokens, without limits that they
        never reach.
        """
        window, chunk = (x if x is not None and x < longest else None for x in self)
        return Pattern(window, chunk)

    def first_seen(self, position: int) -> int:
        """The first position that the token at `position` sees."""
        first = 0
        if self.window is not None:
            first = max(first, position + 1 - self.window)
        if self.chunk is not None:
            first = max(first, position - position % self.chunk)
        return first

    def mask(self, queries: range, keys: range, device: torch.device) -> Tensor:
        """Which keys each query sees, `(queries, keys)` `bool`."""
        query = torch.arange(queries.start, queries.stop, device=device)[:, None]
        key = torch.arange(keys.start, keys.stop, device=device)
        seen = key <= query
        if self.window is not None:
            seen &= key > query - self.window
        if self.chunk is not None:
            seen &= key // self.chunk == query // self.chunk
        return seen


CAUSAL = Pattern()


def longest_sequence(segments: Segments) -> int:
    """Tokens of the longest sequence of a packed row."""
    return max((shared + max(rest) for shared, *rest in segments), default=0)
