"""What a model asks a mask to be, when it runs on a packed row.

A model asks transformers for its masks, one for each type of layer: causal, with a sliding window,
chunked. For a packed row, ours are made instead: a mask of one element that carries the
[`~oddsmith.packing.pattern.Pattern`] that was asked for, and that the attention function reads. What is
not one of these patterns is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..packing.pattern import Pattern, Segments

__all__ = ["CannotPack", "RowMask", "pattern_of", "row_mask"]

# Results of these are masks too: what models do to one between making and using it.
_KEEP = frozenset("to bool contiguous expand __getitem__ detach clone".split())


class CannotPack(Exception):
    """A model's attention cannot work on packed rows. The message is the reason."""


class RowMask(Tensor):
    """
    The attention mask of a packed row: `(1, N)` as an argument of the model, and `(1, 1, 1, 1)` with a
    pattern for its layers. The row itself goes with it, for models that give their layers the mask,
    but no keywords.
    """

    pattern: Pattern | None
    row: Any

    @classmethod
    def of(cls, values: Tensor, pattern: Pattern | None = None, row: Any = None) -> RowMask:
        """`values` as a mask."""
        mask = values.as_subclass(cls)
        mask.pattern, mask.row = pattern, row
        return mask

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            out = func(*args, **(kwargs or {}))
        kept = getattr(func, "__name__", "") in _KEEP
        if kept and args and isinstance(args[0], RowMask):
            return cls.of(out, *(getattr(args[0], name, None) for name in ("pattern", "row")))
        return out


def row_mask(
    segments: Segments, device: Any, by_sequence: bool = False, row: Any = None
) -> RowMask:
    """
    The argument `attention_mask` for a packed row.

    Args:
        segments (`tuple`): See [`~oddsmith.packing.batch.PackedBatch`].
        device (`torch.device`): Device of the row.
        by_sequence (`bool`, *optional*):
            Count a token as often as there are sequences with it: 2 for a shared prompt. A mixture of
            experts weighs its auxiliary loss by the mask.
        row (`PackedRow`, *optional*): What attention functions need to know about the row.

    Returns:
        `RowMask`: `(1, N)` `int64`.
    """
    counts = torch.ones(1, sum(map(sum, segments)), dtype=torch.int64)
    start = 0
    for shared, chosen, rejected in segments if by_sequence else ():
        counts[0, start : start + shared] = 2
        start += shared + chosen + rejected
    return RowMask.of(counts.to(device), row=row)


def pattern_mask(theirs: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """
    Stands in for transformers' function that makes a mask, `theirs`.

    Raises:
        [`CannotPack`]: If a model asks for a pattern that is not known.
    """
    given = kwargs.get("attention_mask")
    if not isinstance(given, RowMask):
        return theirs(*args, **kwargs)
    if kwargs.get("use_vmap"):
        raise CannotPack("its attention mask has a function of its own")
    pattern = pattern_of(kwargs["mask_function"], kwargs.get("local_size"), given.device)
    seen = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=given.device)
    return RowMask.of(seen, pattern, getattr(given, "row", None))


_known: dict[Any, Pattern] = {}
# Farther than a window or chunk reaches that is not told.
_FAR = 1 << 24


class _NoIdentity(Exception):
    """A function cannot be told from others by its code and the values that it has kept."""


def pattern_of(
    mask_function: Callable[..., Any], local_size: int | None, device: Any = "cpu"
) -> Pattern:
    """
    The pattern of a mask function of transformers.

    The function is evaluated at positions around the ends of windows and chunks.

    Args:
        mask_function (`Callable`): `(batch, head, query, key)` to whether the query sees the key.
        local_size (`int`, *optional*): Size of the window or chunk, if it has one.
        device (`torch.device`, *optional*): Where the function's tensors are.

    Raises:
        [`CannotPack`]: If it is none of causal, sliding window and chunk.
    """
    try:
        key = (_identity(mask_function), local_size)
    except _NoIdentity:  # has tensors; reading them would take as long as to evaluate it
        return _tried(mask_function, local_size, device)
    if key not in _known:
        if len(_known) > 256:
            _known.clear()
        _known[key] = _tried(mask_function, local_size, device)
    return _known[key]


def _tried(mask_function: Callable[..., Any], size: int | None, device: Any) -> Pattern:
    ends = (0, _FAR) if size is None else (0, size, 2 * size, 3 * size, _FAR + 3 * size)
    places = sorted({place for end in ends for place in range(max(0, end - 2), end + 3)})
    positions = torch.tensor(places, device=device)
    query, key = positions[:, None], positions[None]
    try:
        # A mask of transformers for one sequence: batch index 0, and any head.
        zero = torch.zeros((), dtype=torch.int64, device=device)
        asked = torch.as_tensor(mask_function(zero, zero, query, key), device=device)
        asked = asked.expand(len(places), len(places))
    except Exception as error:  # a function of a model's own can raise anything
        reason = f"{type(error).__name__}: {error}"
        raise CannotPack(f"its attention mask could not be read ({reason})") from error
    candidates = [Pattern()] if size is None else [Pattern(window=size), Pattern(chunk=size)]
    for candidate in candidates:
        seen = key <= query
        if candidate.window is not None:
            seen = seen & (key > query - candidate.window)
        if candidate.chunk is not None:
            seen = seen & (key // candidate.chunk == query // candidate.chunk)
        if torch.equal(seen, asked.bool()):
            return candidate
    raise CannotPack("its attention mask is neither causal nor a window or chunk")


def _identity(value: Any) -> Any:
    """What a function computes: its code and the values that it has kept."""
    if callable(value) and hasattr(value, "__code__"):
        cells = value.__closure__ or ()
        return (value.__code__, tuple(_identity(cell.cell_contents) for cell in cells))
    if isinstance(value, (tuple, list)):
        return tuple(map(_identity, value))
    if isinstance(value, (int, float, str, type(None))):
        return value
    raise _NoIdentity
