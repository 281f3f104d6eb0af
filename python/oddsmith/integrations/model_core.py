"""A model without its wrappers, and trial runs without side effects."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel
from torch import nn

from .bitsandbytes_layers import KeptLayout, on_cpu
from .module_forward import ModuleForward

__all__ = ["core_of", "observed"]


def core_of(model: Any) -> Any:
    """The model of transformers inside the wrappers of DDP, FSDP, DeepSpeed, torch.compile and
    PEFT.
    """
    model = extract_model_from_parallel(model, keep_torch_compile=False)
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def observed(core: nn.Module) -> Iterator[None]:
    """
    A context for a forward pass without side effects: no gradient, no dropout; modes and the state
    of the random generators are restored.
    """
    modes = {module: module.training for module in core.modules()}
    devices = {each.device for each in core.parameters() if each.device.type == "cuda"}
    for module in modes:
        module.training = False
    # After an earlier run, accelerate's mixed precision may still wrap the forward, which rounds.
    own = vars(core).get("_original_forward")
    plain = nullcontext() if own is None else ModuleForward(core, own, under_hooks=False)
    kept = KeptLayout(core) if on_cpu(core) else nullcontext()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=list(devices)), plain, kept:
            yield
    finally:
        for module, training in modes.items():
            module.training = training
