"""What a model's layers are: those that mix neighbours in a row, and those that its class has not."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .small_model import class_of, layers_of

__all__ = ["in_memory", "is_exact", "is_foreign", "is_sharded", "mixer", "strange"]

# Parameters of recurrences, by their last name.
_RECURRENT = ("A_log", "dt_bias", "time_decay", "recurrent_param", "igate_preact", "time_mix_key")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d)
# Packages whose wrappers and hooks leave what a layer computes for a token to this token.
_KNOWN = (
    "torch.",
    "accelerate.",
    "transformers.",
    "peft.",
    "bitsandbytes.",
    "oddsmith.",
    "deepspeed.",
)


def mixer(core: Any) -> str | None:
    """
    A part of the model's layers that mixes a position with its neighbours in the row, whatever
    sequence they are of: a convolution, a recurrence or a state-space model. None if there is none.
    """
    for layers in layers_of(core):
        for index, layer in enumerate(layers):
            for name, module in layer.named_modules():
                own = {key for key, _ in module.named_parameters(recurse=False)}
                wide = isinstance(module, nn.RNNBase) or (
                    isinstance(module, _CONVOLUTIONS) and max(module.kernel_size) > 1
                )
                if wide or own & set(_RECURRENT):
                    # Its parent's name says what it is.
                    parent = name.rpartition(".")[0] if wide else name
                    kind = type(layer.get_submodule(parent)).__name__
                    return f"layer {index} has a recurrence or convolution ({kind})"
    return None


def strange(core: nn.Module, small: nn.Module) -> str | None:
    """
    What a model has that a small one of its class has not: other layers, a forward or a hook that
    somebody else has set. None if it has nothing of that kind.
    """
    classes = {class_of(module) for module in small.modules()}
    for name, module in core.named_modules():
        kind = class_of(module)
        if kind not in classes and not _is_known(kind.__module__):
            return f"{name or 'it'} is a {kind.__module__}.{kind.__name__}"
        own = vars(module)
        if "forward" in own and "_old_forward" not in own and "_original_forward" not in own:
            if not _is_known(getattr(own["forward"], "__module__", "") or ""):
                return f"{name or 'it'} has a forward of its own"
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values()):
            if not _is_known(_module_of(hook)):
                return f"{name or 'it'} has a hook"
    return None


def is_foreign(core: nn.Module) -> bool:
    """Whether the code of a model is not transformers' own, as with `trust_remote_code`."""
    return not class_of(core).__module__.startswith("transformers.")


def _is_known(module: str) -> bool:
    return f"{module}.".startswith(_KNOWN)


def _module_of(hook: Any) -> str:
    function = getattr(hook, "func", hook)  # of functools.partial
    return getattr(function, "__module__", None) or type(hook).__module__


def is_sharded(core: nn.Module) -> bool:
    """Whether weights are split over processes, as FSDP2, ZeRO-3 and tensor parallelism do."""
    return any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in core.parameters())


def in_memory(core: nn.Module) -> bool:
    """Whether all weights are whole and in memory, so that the model can run as it is."""
    gone = any(p.device.type == "meta" or p.numel() == 0 for p in core.parameters())
    return not gone and not is_sharded(core)


def is_exact(core: nn.Module) -> bool:
    """Whether a model computes in `float32` or better throughout."""
    dtypes = {p.dtype for p in core.parameters() if p.is_floating_point()}
    layers = {getattr(module, "compute_dtype", None) for module in core.modules()}
    dtypes |= {each for each in layers if isinstance(each, torch.dtype)}
    return dtypes <= {torch.float32, torch.float64}
