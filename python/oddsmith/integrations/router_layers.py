"""Routers of experts that are linear layers by class, but return more than a tensor.

peft takes them for linear layers, and then fails in the first step: `all-linear` puts an adapter on the
routers of Llama 4.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.utils import logging

__all__ = ["adapted_router", "without_routers"]

logger = logging.get_logger(__name__)


def without_routers(model: nn.Module, peft_config: Any) -> Any:
    """
    The configuration of an adapter, without routers among the layers of `all-linear`.

    Args:
        model (`PreTrainedModel`): The model.
        peft_config (`PeftConfig`): The configuration; not changed.
    """
    if getattr(peft_config, "target_modules", None) != "all-linear":
        return peft_config
    excluded = getattr(peft_config, "exclude_modules", "")
    if isinstance(excluded, str):  # a pattern, or there is no such option
        return peft_config
    names = {name.rpartition(".")[2] for name, layer in model.named_modules() if _is_router(layer)}
    if not names - set(excluded or ()):
        return peft_config
    changed = copy.deepcopy(peft_config)
    changed.exclude_modules = sorted(names | set(excluded or ()))
    logger.warning(
        f"The adapter is on all linear layers but {', '.join(sorted(names))}: these return more than "
        "a tensor, which peft cannot adapt."
    )
    return changed


def adapted_router(model: nn.Module) -> str | None:
    """
    The name of a router with an adapter, which cannot run; None if there is none.

    Args:
        model (`PeftModel`): The model with its adapter.
    """
    for name, layer in model.named_modules():
        base: Any = getattr(layer, "get_base_layer", None)
        if base is not None and _is_router(base()):
            return name
    return None


def _is_router(layer: Any) -> bool:
    """Whether a linear layer of a model's own class returns something else than a tensor."""
    own = isinstance(layer, nn.Linear) and type(layer).__module__.startswith("transformers")
    if not own or type(layer).forward is nn.Linear.forward:
        return False
    values = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
    ghosts = {name: torch.empty_like(value, device="meta") for name, value in values.items()}
    tokens = torch.empty(2, layer.in_features, device="meta", dtype=layer.weight.dtype)
    try:
        with torch.no_grad():
            made = functional_call(layer, ghosts, (tokens,))
    except Exception:  # whatever the code of a layer may raise, such as for want of an argument
        return False
    return not isinstance(made, Tensor)
