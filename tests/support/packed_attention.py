"""Attention over a packed row by its definition: a mask of the complete row."""

import torch
from torch import Tensor

# For each pair the lengths of its shared prompt, and of the rest of its chosen and rejected
# sequence.
SEGMENTS = ((4, 3, 2), (0, 2, 5), (3, 0, 1), (2, 4, 0))


def mask(segments: tuple[tuple[int, int, int], ...], window: int | None = None) -> Tensor:
    """Which positions `(N, N)` a token sees: its prompt and its block, causal, within the
    window."""
    owner = [
        (pair, part)
        for pair, lengths in enumerate(segments)
        for part, length in enumerate(lengths)
        for _ in range(length)
    ]
    place, seen = [], {}
    for pair, part in owner:
        # An answer continues at the end of the prompt.
        key = (pair, part)
        start = segments[pair][0] if part else 0
        place.append(start + seen.get(key, 0))
        seen[key] = seen.get(key, 0) + 1
    return torch.tensor(
        [
            [
                a[0] == b[0] and b[1] in (0, a[1]) and 0 <= place[i] - place[j] < (window or 10**9)
                for j, b in enumerate(owner)
            ]
            for i, a in enumerate(owner)
        ]
    )


def tensors(segments: tuple[tuple[int, int, int], ...], dtype: torch.dtype) -> list[Tensor]:
    """Query of 4 heads, key and value of 2, `(1, heads, N, 8)`."""
    torch.manual_seed(4)
    count = sum(map(sum, segments))
    return [torch.randn(1, heads, count, 8).to(dtype) for heads in (4, 2, 2)]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: tuple[tuple[int, int, int], ...],
    scale: float | None = None,
    window: int | None = None,
) -> Tensor:
    """The attention of [`mask`], in `float64`; differentiable."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1).double() for x in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(
        query.double(), key, value, attn_mask=mask(segments, window).to(query.device), scale=scale
    )


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}
