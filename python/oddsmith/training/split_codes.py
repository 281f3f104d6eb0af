"""4-bit weights under engines that split them: which can be served."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..quant.modules import Linear4bit
from ..quant.state import dtype_name

__all__ = ["check_codes", "check_codes_with_deepspeed"]


def check_codes(model: nn.Module, plugin: Any) -> None:
    """
    Checks that FSDP leaves the codes of 4-bit weights as they are.

    Args:
        model (`nn.Module`): The model.
        plugin (`FullyShardedDataParallelPlugin`): accelerate's settings of FSDP.

    Raises:
        ValueError: If it would join or cast them.
    """
    stored = _storage(model)
    if not stored:
        return
    if plugin.fsdp_version != 2:
        raise ValueError(
            "the model has 4-bit weights and FSDP is of version 1, which joins weights of different "
            "kinds: use FSDP2 (fsdp_config={'version': 2})"
        )
    computes = getattr(plugin.mixed_precision_policy, "param_dtype", None)
    if isinstance(computes, torch.dtype):
        _check_cast(stored, computes, "FSDP2", ", of which each process keeps all codes")


def check_codes_with_deepspeed(model: nn.Module, config: dict[str, Any]) -> None:
    """
    Checks that DeepSpeed leaves the codes of 4-bit weights as they are.

    Args:
        model (`nn.Module`): The model.
        config (`dict`): DeepSpeed's configuration.

    Raises:
        ValueError: If it would cast them with the other parameters, to 16 bits.
    """
    for name, computes in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        if config.get(name, {}).get("enabled") is True:
            _check_cast(_storage(model), computes, "DeepSpeed")


def _storage(model: nn.Module) -> set[torch.dtype]:
    """The dtypes in which a model's codes are stored."""
    return {m.weight.dtype for m in model.modules() if isinstance(m, Linear4bit)}


def _check_cast(
    stored: set[torch.dtype], computes: torch.dtype, engine: str, note: str = ""
) -> None:
    name = dtype_name(computes)
    cast = sorted(dtype_name(each) for each in stored if each.is_floating_point)
    if any(each != name for each in cast):
        raise ValueError(
            f"the model's 4-bit codes are stored as {cast[0]} and {engine} computes in {name}, to which it "
            f"would cast them: load the model with bnb_4bit_quant_storage={name!r}, or with 'uint8'{note}"
        )
