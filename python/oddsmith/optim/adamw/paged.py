"""AdamW with its state in pages: a file on a CPU, pinned memory of the host on a GPU."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from .adamw_8bit import AdamW8bit
from .docs import ARGS_DOC, PAGES_DOC, REST_DOC
from .optimizer import DEVICE_BUDGET
from .pages import FilePages


class PagedAdamW8bit(AdamW8bit):
    __doc__ = f"""
    [`AdamW8bit`] with its state in pages.

    On a CPU the state is in a memory-mapped file and can be larger than the memory. On a GPU it is
    in pinned host memory, and is copied in and out while other parts are updated. It is freed with
    the optimiser.

    Args:
        {ARGS_DOC}
        {PAGES_DOC}
        optim_bits (`int`, *optional*, defaults to 8):
            8 or 32.
        min_8bit_size (`int`, *optional*, defaults to 4096):
            Parameters with at least this many elements have 8-bit moments.
        {REST_DOC}
        OSError: In a step or in `load_state_dict`, if `page_dir` is full; nothing is changed then.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        page_dir: str | os.PathLike[str] | None = None,
        device_budget: int = DEVICE_BUDGET,
        **options: Any,
    ):
        super().__init__(
            params,
            lr,
            betas,
            eps,
            weight_decay,
            pages=FilePages(page_dir),
            device_budget=device_budget,
            **options,
        )


class PagedAdamW32bit(PagedAdamW8bit):
    __doc__ = f"""
    AdamW with `fp32` moments in pages; see [`PagedAdamW8bit`].

    Args:
        {ARGS_DOC}
        {PAGES_DOC}
        {REST_DOC}
        OSError: In a step or in `load_state_dict`, if `page_dir` is full; nothing is changed then.
    """

    def __init__(self, params: Iterable[Any], *args: Any, **options: Any):
        super().__init__(params, *args, **{**options, "optim_bits": 32})
