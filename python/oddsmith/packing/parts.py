"""Parts: what a sequence attends to as calls of a causal flash kernel, without a mask.

Queries that see a window of `w` tokens, in tiles of at most `w`: a tile attends to itself (causal), to keys that
all its queries see, and to those that leave the window query by query. The last are a triangle the other
way round, which is causal if queries and keys are read backwards.
"""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import NamedTuple

from .pattern import Pattern


class Kind(Enum):
    """Which keys of a part a query sees."""

    CAUSAL = "those up to its own place"
    ALL = "all of them"
    REVERSED = "those from its own place on"


class Part(NamedTuple):
    """
    Queries and their keys, as often as there are equal ones.

    Args:
        kind ([`Kind`]): Which of the keys a query sees.
        query (`int`): Position of the first query in the sequence.
        queries (`int`): Their number.
        key (`int`): Position of the first key.
        keys (`int`): Their number.
        repeats (`int`): Equal parts.
        step (`int`): From one of them to the next; at least the numbers of queries and of keys.
    """

    kind: Kind
    query: int
    queries: int
    key: int
    keys: int
    repeats: int = 1
    step: int = 0


def parts(shared: int, length: int, pattern: Pattern) -> Iterator[Part]:
    """
    The parts of a sequence. Each query is in one that is causal, and in others only after it; no key is
    in two parts of a query.

    Args:
        shared (`int`): Position of the first query: keys before it have no queries here.
        length (`int`): Tokens of the sequence.
        pattern ([`~oddsmith.packing.pattern.Pattern`]): A window or a chunk or neither.

    Raises:
        ValueError: If the pattern has both.
    """
    window, chunk = pattern
    if window is not None and chunk is not None:
        raise ValueError(f"pattern is {pattern}; must have a window or a chunk, not both")
    # Queries before `begin` see all keys from `first` on.
    begin, first = length, 0
    if window is not None:
        begin = max(shared, min(window, length))
    elif chunk is not None:
        first = shared - shared % chunk
        begin = min(first + chunk, length)
    if begin > shared:
        yield _causal(shared, begin - shared)
        if shared > first:
            yield Part(Kind.ALL, shared, begin - shared, first, shared - first)
    size = window or chunk or length
    count, rest = divmod(length - begin, size)
    if count:
        yield _causal(begin, size, count)
        if window is not None and window > 1:
            less = window - 1
            yield Part(Kind.REVERSED, begin, less, begin - less, less, count, size)
    if rest:
        begin = length - rest
        yield _causal(begin, rest)
        if window is not None:
            yield Part(Kind.ALL, begin, rest, length - window, window - rest)
            if rest > 1:
                yield Part(Kind.REVERSED, begin, rest - 1, begin - window + 1, rest - 1)


def _causal(begin: int, size: int, count: int = 1) -> Part:
    return Part(Kind.CAUSAL, begin, size, begin, size, count, size)
