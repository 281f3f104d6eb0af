"""4-bit weights under engines that split them: which can be served."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..quant.modules import Linear4bit
from ..quant.state import dtype_name

__all__ = ["check_codes"]


def check_codes(model: nn.Module, plugin: Any) -> None:
    """
    Checks that FSDP leaves the codes of 4-bit weights as they are.

    Args:
        model (`nn.Module`): The model.
        plugin (`FullyShardedDataParallelPlugin`): accelerate's settings of FSDP.

    Raises:
        ValueError: If it would join or cast them.
    """
    stored = {m.weight.dtype for m in model.modules() if isinstance(m, Linear4bit)}
    if not stored:
        return
    if plugin.fsdp_version != 2:
        raise ValueError(
            "the model has 4-bit weights and FSDP is of version 1, which joins weights of different "
            "kinds: use FSDP2 (fsdp_config={'version': 2})"
        )
    computes = getattr(plugin.mixed_precision_policy, "param_dtype", None)
    cast = sorted(dtype_name(each) for each in stored if each.is_floating_point)
    if isinstance(computes, torch.dtype) and any(each != dtype_name(computes) for each in cast):
        name = dtype_name(computes)
        raise ValueError(
            f"the model's 4-bit codes are stored as {cast[0]} and FSDP2 computes in {name}, to which it "
            f"would cast them: load the model with bnb_4bit_quant_storage={name!r}, or with "
            "'uint8', of which each process keeps all codes"
        )
