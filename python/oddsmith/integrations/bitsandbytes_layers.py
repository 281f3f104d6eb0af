"""Models that bitsandbytes has loaded, taken over as they stand."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.utils import logging

from ..quant.modules import Linear4bit, Params4bit
from ..quant.state import QuantState
from .transformers_quantizer import count_parameters, serve_peft

__all__ = ["adopt", "adopt_on_cpu"]

logger = logging.get_logger(__name__)


def adopt(model: nn.Module) -> nn.Module:
    """
    Puts [`~oddsmith.nn.Linear4bit`] in the place of bitsandbytes' layers. Codes and scales are shared,
    not copied.

    Args:
        model (`nn.Module`):
            A model with `bitsandbytes.nn.Linear4bit` layers, without adapters yet; changed in place.

    Returns:
        `nn.Module`: The model.

    Raises:
        ValueError: If there is no such layer, one is not NF4 or not quantised yet, or has an adapter.
            Nothing has been changed then.
    """
    found = {name: layer for name, layer in model.named_modules() if _is_theirs(layer)}
    if not found:
        raise ValueError(
            f"adopt: {type(model).__name__} has no Linear4bit layer of bitsandbytes; load it with a "
            "BitsAndBytesConfig, or hand it to ORPOTrainer as it is"
        )
    made = {name: _taken_over(name, layer) for name, layer in found.items()}
    for name, layer in made.items():
        model.set_submodule(name, layer)
    count_parameters(True)
    serve_peft()
    return model


def adopt_on_cpu(model: nn.Module) -> None:
    """
    What [`ORPOTrainer`] does with a model of bitsandbytes on a CPU: after one evaluation its layers
    there let no gradient through any more (0.50 lays the codes out anew for inference, for good).
    Layers that cannot be adopted stay, with a line in the log.

    Args:
        model (`nn.Module`): Any model; changed in place.
    """
    theirs = [layer for layer in model.modules() if _is_theirs(layer)]
    if not theirs or any(layer.weight.device.type != "cpu" for layer in theirs):
        return
    try:
        adopt(model)
    except ValueError as reason:
        logger.warning(
            f"{reason}. Its layers stay those of bitsandbytes, which on a CPU let no gradient through "
            "after an evaluation."
        )
    else:
        logger.info(f"{len(theirs)} layers of bitsandbytes are computed by oddsmith from now on.")


def _is_theirs(layer: nn.Module) -> bool:
    return any(
        each.__name__ == "Linear4bit" and each.__module__.startswith("bitsandbytes.")
        for each in type(layer).__mro__
    )


def _taken_over(name: str, theirs: Any) -> Linear4bit:
    if name.endswith("base_layer"):
        raise ValueError(f"adopt: {name} has an adapter; adopt the model before it gets one")
    if getattr(getattr(theirs.weight, "quant_state", None), "packing_format_for_cpu", False):
        theirs.state_dict()  # brings the codes back into their order, in place
    weight = theirs.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        raise ValueError(f"adopt: {name} is not quantised yet; move the model to a device first")
    if state.quant_type != "nf4":
        raise ValueError(f'adopt: {name} has quant_type {state.quant_type!r}; must be "nf4"')
    layer = Linear4bit(
        theirs.in_features,
        theirs.out_features,
        bias=theirs.bias is not None,
        compute_dtype=theirs.compute_dtype,
        device="meta",
    )
    layer.weight = Params4bit(
        weight.data,
        quant_state=_state(state),
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_storage=weight.dtype,
    )
    layer.bias = theirs.bias
    return layer.train(theirs.training)


def _state(theirs: Any) -> QuantState:
    parts = ("absmax", "shape", "code", "blocksize", "quant_type", "dtype", "offset")
    nested = None if theirs.state2 is None else _state(theirs.state2)
    return QuantState(**{part: getattr(theirs, part) for part in parts}, state2=nested)
