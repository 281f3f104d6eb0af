"""Parts of a sequence: by hand, and all of what each query sees once."""

from itertools import product

import pytest
import torch

from oddsmith.packing.parts import Kind, Part, parts
from oddsmith.packing.pattern import CAUSAL, Pattern

PATTERNS = (
    CAUSAL,
    *(Pattern(window=size) for size in range(1, 13)),
    *(Pattern(chunk=size) for size in range(1, 13)),
)


def test_parts_by_hand():
    assert list(parts(2, 5, CAUSAL)) == [
        Part(Kind.CAUSAL, 2, 3, 2, 3, 1, 3),
        Part(Kind.ALL, 2, 3, 0, 2),
    ]
    # Ten tokens that see four: four from the beginning, four more, and two, of which the first sees what is three
    # tokens before it.
    assert list(parts(0, 10, Pattern(window=4))) == [
        Part(Kind.CAUSAL, 0, 4, 0, 4, 1, 4),
        Part(Kind.CAUSAL, 4, 4, 4, 4, 1, 4),
        Part(Kind.REVERSED, 4, 3, 1, 3, 1, 4),
        Part(Kind.CAUSAL, 8, 2, 8, 2, 1, 2),
        Part(Kind.ALL, 8, 2, 6, 2),
        Part(Kind.REVERSED, 8, 1, 5, 1),
    ]
    # A prompt of five ends within the second chunk.
    assert list(parts(5, 11, Pattern(chunk=3))) == [
        Part(Kind.CAUSAL, 5, 1, 5, 1, 1, 1),
        Part(Kind.ALL, 5, 1, 3, 2),
        Part(Kind.CAUSAL, 6, 3, 6, 3, 1, 3),
        Part(Kind.CAUSAL, 9, 2, 9, 2, 1, 2),
    ]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_each_key_is_seen_once_and_a_causal_part_is_first(pattern):
    for shared, own in product((0, 1, 3, 6, 8), (1, 2, 5, 9, 16)):
        length = shared + own
        found = torch.zeros(length, length, dtype=torch.int64)
        begun, written = set(), set(range(shared))
        for part in parts(shared, length, pattern):
            assert part.repeats == 1 or part.step >= max(part.queries, part.keys)
            if part.kind is not Kind.ALL:
                assert part.queries == part.keys > 0
            for i, a, b in product(range(part.repeats), range(part.queries), range(part.keys)):
                query, key = part.query + i * part.step + a, part.key + i * part.step + b
                if part.kind is Kind.CAUSAL:
                    begun.add(query)
                    written.add(key)
                assert query in begun and key in written
                seen = {Kind.CAUSAL: b <= a, Kind.ALL: True, Kind.REVERSED: b >= a}
                found[query, key] += int(seen[part.kind])
        mask = pattern.mask(range(shared, length), range(length), torch.device("cpu"))
        assert torch.equal(found[shared:], mask.long()) and not found[:shared].any()


def test_a_window_and_a_chunk_are_refused():
    with pytest.raises(ValueError, match=r"pattern is .*; must have a window or a chunk, not both"):
        list(parts(0, 4, Pattern(window=2, chunk=2)))
