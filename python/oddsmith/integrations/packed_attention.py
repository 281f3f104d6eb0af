"""The attention function that a model of transformers calls when it runs on a packed row.

It stands in for each function in transformers' table while there is such a row, reads the arguments that
models give those functions, and computes the same attention within each sequence of the row. Calls
without a row are passed on.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ..packing import attention_cuda
from ..packing.attention import packed_attention
from ..packing.pattern import Pattern
from .packed_masks import CannotPack, RowMask
from .patch import find

__all__ = ["ROW", "attend"]

# Keyword that carries a packed row through the model to `attend`.
ROW = "oddsmith_row"

_TARGET_DTYPE = "transformers.integrations.flash_attention:get_target_dtype"

# Tensors among the arguments of attention functions that do not change what they compute.
_UNUSED = frozenset({"position_ids", "cache_position", "num_items_in_batch"})

# Every name in the eager attention functions that compute the definition. Another one may read what
# is not an argument.
_EAGER_NAMES = frozenset(
    "F cat contiguous device dropout dtype expand float float32 functional getattr hasattr head_dim "
    "logsumexp matmul max maybe_autocast nn num_key_value_groups repeat_kv reshape shape sigmoid sinks "
    "size softmax tanh to torch training transpose type unsqueeze values view".split()
)


def attend(*args: Any, theirs: Callable[..., Any], name: str, **kwargs: Any) -> Any:
    """
    Attention for a layer: on a packed row, if the layer gets one, else by `theirs`.

    Args:
        args (`Any`): Arguments of the function, as transformers' `sdpa_attention_forward`.
        theirs (`Callable`): The function that this one stands in for.
        name (`str`): Its name in the table.
        kwargs (`Any`): Keyword arguments; `oddsmith_row` is a
            [`~oddsmith.integrations.attention_table.PackedRow`].

    Returns:
        `tuple`: `(1, N, heads, d_v)`, and None for the weights.

    Raises:
        [`CannotPack`]: If the layer needs something that is not computed on packed rows.
    """
    row = kwargs.pop(ROW, None)
    if row is None:  # the layer's code passes no keywords on
        mask = args[4] if len(args) > 4 else kwargs.get("attention_mask")
        row = getattr(mask, "row", None) if isinstance(mask, RowMask) else None
    if row is None:
        return theirs(*args, **kwargs)
    if name == "eager" and not _is_the_definition(theirs):
        raise CannotPack("its attention is an eager function of its own")
    return _attend(row, "flash" in name, *args, **kwargs), None


def _attend(
    row: Any,
    flash: bool,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> Tensor:
    row.seen.add(module)
    unknown = [x for x, v in kwargs.items() if isinstance(v, Tensor) and x not in _UNUSED]
    if unknown:
        raise CannotPack(f"its attention has a {', '.join(unknown)}")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise CannotPack("its attention is not causal")
    pattern = _pattern(attention_mask, sliding_window, flash)
    device = query.device.type
    if torch.is_autocast_enabled(device):  # as autocast does for libtorch's attention
        dtype = torch.get_autocast_dtype(device)
    elif flash and device in attention_cuda.DEVICES and query.dtype == torch.float32:
        # Normalisation in float32 makes such queries in 16-bit models.
        dtype = find(_TARGET_DTYPE)(query, module)
    else:
        dtype = query.dtype
    query, key, value = (x.to(dtype) for x in (query, key, value))
    out = packed_attention(
        query,
        key,
        value,
        row.segments,
        pattern=pattern,
        scale=scaling,
        softcap=softcap,
        sinks=s_aux,
        dropout=dropout,
    )
    return out.transpose(1, 2).contiguous()


def _pattern(mask: Any, window: int | None, flash: bool) -> Pattern:
    """Which tokens a layer sees: its mask says it, but flash attention gets its window apart."""
    asked = mask.pattern if isinstance(mask, RowMask) else None
    if asked is None:
        # Only flash attention takes the mask of the padding itself.
        if mask is not None and not (flash and isinstance(mask, RowMask)):
            raise CannotPack("its attention has a mask of its own")
        asked = Pattern()
    return Pattern(window, asked.chunk) if flash else asked


@lru_cache(maxsize=64)
def _is_the_definition(eager: Callable[..., Any]) -> bool:
    code = getattr(eager, "__code__", None)
    return code is not None and _EAGER_NAMES.issuperset(code.co_names)
