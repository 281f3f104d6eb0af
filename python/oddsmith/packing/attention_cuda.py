"""Attention over a packed row of pairs by one call of a variable-length flash kernel, on CUDA."""

import importlib
import inspect
from collections.abc import Callable
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .attention_cpu import blocks
from .pattern import Pattern, Segments

# Where the kernels run.
DEVICES = ("cuda",)

# Limit of flash attention.
_WIDEST_HEAD = 256


def can_run(
    query: Tensor, pattern: Pattern, softcap: float | None, sinks: Tensor | None, dropout: float
) -> bool:
    """Whether the installed kernel supports this call."""
    if (
        query.device.type not in DEVICES
        or query.dtype not in (torch.float16, torch.bfloat16)
        or query.shape[-1] > _WIDEST_HEAD
        or pattern.chunk is not None
        or sinks is not None
        or dropout
    ):
        return False
    kernel = _kernel()
    return kernel is not None and (softcap is None or kernel.knows_softcap)


def packed_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Segments,
    scale: float | None,
    window: int | None,
    softcap: float | None = None,
) -> Tensor:
    """
    Attention of each block to its prompt's keys and its own, causal at the lower right.

    Args:
        query (`Tensor`): `(1, heads, N, d)`, `float16` or `bfloat16`.
        key (`Tensor`): `(1, key heads, N, d)`.
        value (`Tensor`): As `key`.
        segments (`tuple`): See [`~oddsmith.packing.batch.PackedBatch`].
        scale (`float`, *optional*): Factor on the products; one over the root of d if None.
        window (`int`, *optional*): Positions that a token sees, itself included.
        softcap (`float`, *optional*): Bound of the scores; see [`can_run`].

    Returns:
        `Tensor`: `(1, heads, N, d)`.
    """
    kernel = _kernel()
    if kernel is None:
        raise RuntimeError("packed_varlen: no kernel for it is installed; ask can_run first")
    plan = _plan(segments, query.device)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if plan.keys is not None:
        key, value = (x.index_select(0, plan.keys) for x in (key, value))
    out = kernel.run(query, key, value, plan, scale, window, softcap)
    return out.transpose(0, 1)[None]


def kernel_name() -> str | None:
    """The module whose kernel is used; None if there is none."""
    kernel = _kernel()
    return None if kernel is None else kernel.name


class _Plan:
    """Bounds of the blocks for a kernel, on the device, computed once for all layers."""

    def __init__(self, segments: Segments, device: torch.device):
        queries, keys, places = [0], [0], []
        for own, prompt in blocks(segments):
            seen = [*range(prompt.start, prompt.stop)] if prompt is not None else []
            seen += range(own.start, own.stop)
            queries.append(own.stop)
            keys.append(keys[-1] + len(seen))
            places += seen
        # Without a shared prompt every key is seen only by its own block.
        self.keys = torch.tensor(places, device=device) if len(places) > queries[-1] else None
        self.query_bounds, self.key_bounds = (
            torch.tensor(bounds, dtype=torch.int32, device=device) for bounds in (queries, keys)
        )
        self.longest_query, self.longest_key = (
            max(end - start for start, end in pairwise(bounds)) for bounds in (queries, keys)
        )


@lru_cache(maxsize=4)
def _plan(segments: Segments, device: torch.device) -> _Plan:
    return _Plan(segments, device)


class _Kernel(NamedTuple):
    """A variable-length kernel: `run(query, key, value, plan, scale, window, softcap)`."""

    name: str
    run: Callable[..., Tensor]
    knows_softcap: bool


@lru_cache(maxsize=1)
def _kernel() -> _Kernel | None:
    """The kernel of the newest package that is installed, or libtorch's."""
    for module in ("flash_attn_interface", "flash_attn"):
        try:
            # The user may have it.
            function = importlib.import_module(module).flash_attn_varlen_func
            known = inspect.signature(function).parameters
        except (ImportError, AttributeError, ValueError):
            continue
        return _Kernel(module, partial(_by_package, function), "softcap" in known)
    return _of_torch()


def _by_package(
    function: Callable[..., Any],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: _Plan,
    scale: float | None,
    window: int | None,
    softcap: float | None,
) -> Tensor:
    out = function(
        query,
        key,
        value,
        plan.query_bounds,
        plan.key_bounds,
        max_seqlen_q=plan.longest_query,
        max_seqlen_k=plan.longest_key,
        softmax_scale=scale,
        causal=True,
        window_size=(-1 if window is None else window - 1, 0),
        **({} if softcap is None else {"softcap": softcap}),
    )
    # Some versions return the log-sum-exp too.
    return out if isinstance(out, Tensor) else out[0]


def _of_torch() -> _Kernel | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None

    def run(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: _Plan,
        scale: Any,
        window: Any,
        softcap: None,
    ) -> Tensor:
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        out = varlen_attn(
            query,
            key,
            value,
            plan.query_bounds,
            plan.key_bounds,
            plan.longest_query,
            plan.longest_key,
            scale=scale,
            window_size=(-1 if window is None else window - 1, 0),
        )
        # With the log-sum-exp only where it is asked for.
        return out if isinstance(out, Tensor) else out[0]

    return _Kernel("torch.nn.attention.varlen", run, knows_softcap=False)
