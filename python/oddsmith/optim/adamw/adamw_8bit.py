"""AdamW with moments of 8 bits."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .docs import ARGS_DOC, REST_DOC
from .moments import MIN_8BIT_SIZE
from .optimizer import BlockAdamW


class AdamW8bit(BlockAdamW):
    __doc__ = f"""
    AdamW with 8-bit moments: two bytes per element, and a scale per 256 elements.

    After Dettmers et al. 2022 (arXiv 2110.02861). Moments of fewer than `min_8bit_size` elements,
    and of groups with `optim_bits=32` (recommended for embeddings), are `fp32`. bitsandbytes is not
    needed. See [`BlockAdamW`] about NaN and saved states.

    Args:
        {ARGS_DOC}
        optim_bits (`int`, *optional*, defaults to 8):
            8 or 32.
        min_8bit_size (`int`, *optional*, defaults to 4096):
            Parameters with at least this many elements have 8-bit moments.
        {REST_DOC}
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        optim_bits: int = 8,
        min_8bit_size: int = MIN_8BIT_SIZE,
        stochastic_rounding: bool = False,
        seed: int = 0,
        **private: Any,
    ):
        defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "optim_bits": optim_bits,
            "min_8bit_size": min_8bit_size,
            "stochastic_rounding": stochastic_rounding,
            "full_precision": (),
        }
        super().__init__(params, defaults, seed=seed, **private)
