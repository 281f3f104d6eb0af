"""Attention over a packed row by its definition: a mask of the complete row."""

import torch
from torch import Tensor

# For each pair the lengths of its shared prompt, and of the rest of its chosen and rejected
# sequence.
SEGMENTS = ((4, 3, 2), (0, 2, 5), (3, 0, 1), (2, 4, 0))


def mask(
    segments: tuple[tuple[int, int, int], ...], window: int | None = None, chunk: int | None = None
) -> Tensor:
    """Which positions `(N, N)` a token sees: its prompt and its block, causal, within the window
    or chunk."""
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
                a[0] == b[0]
                and b[1] in (0, a[1])
                and 0 <= place[i] - place[j] < (window or 10**9)
                and (chunk is None or place[i] // chunk == place[j] // chunk)
                for j, b in enumerate(owner)
            ]
            for i, a in enumerate(owner)
        ]
    )


def tensors(
    segments: tuple[tuple[int, int, int], ...], dtype: torch.dtype, value_width: int = 8
) -> list[Tensor]:
    """Query of 4 heads, key and value of 2, `(1, heads, N, 8)`."""
    torch.manual_seed(4)
    count = sum(map(sum, segments))
    widths = ((4, 8), (2, 8), (2, value_width))
    return [torch.randn(1, heads, count, width).to(dtype) for heads, width in widths]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: tuple[tuple[int, int, int], ...],
    scale: float | None = None,
    window: int | None = None,
    chunk: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The attention of [`mask`], in `float64`; differentiable."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1).double() for x in (key, value))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query.double() @ key.transpose(2, 3) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = mask(segments, window, chunk).to(query.device)
    scores = scores.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        column = sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    return scores.softmax(-1)[..., : key.shape[2]] @ value


TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2e-2}
