"""Replaces the layers of models that bitsandbytes has loaded."""

from __future__ import annotations

from typing import Any

from torch import nn

from ..quant.modules import Linear4bit, Params4bit
from ..quant.state import QuantState
from .parameter_count import COUNT
from .patch import Patch, Unsupported
from .peft_dispatch import serve_peft

__all__ = ["AdoptedLayers", "KeptLayout", "adopt", "on_cpu"]


def adopt(model: nn.Module) -> nn.Module:
    """
    Replaces bitsandbytes' layers by [`~oddsmith.nn.Linear4bit`], which share their codes and
    scales.

    Args:
        model (`nn.Module`):
            A model with `bitsandbytes.nn.Linear4bit` layers, without adapters yet; changed in place.

    Returns:
        `nn.Module`: The model.

    Raises:
        ValueError: If there is no such layer, one is not NF4 or not quantised yet, or has an
            adapter. Nothing is changed then.
    """
    _exchange(model, _made_of(model))
    return model


class AdoptedLayers(Patch):
    """
    [`adopt`] that can be undone: bitsandbytes' layers, which share their codes with ours, return.

    Args:
        model (`nn.Module`): The model.
    """

    target = "bitsandbytes.nn.Linear4bit layers of a model on a CPU"
    purpose = (
        "After an evaluation on a CPU, bitsandbytes 0.50 permanently changes the layout of codes, and its "
        "layers give no gradient."
    )
    tested = "bitsandbytes 0.50"
    fallback = "bitsandbytes computes its layers, and needs more time for them"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model

    def _check(self) -> None:
        try:
            self._made = _made_of(self._model, adapted=True)
        except ValueError as reason:
            raise Unsupported(str(reason)) from reason

    def _change(self) -> None:
        self._theirs = {name: self._model.get_submodule(name) for name in self._made}
        _exchange(self._model, self._made)

    def _restore(self) -> None:
        for name, layer in self._theirs.items():
            # Layers that got an adapter are kept, and so are layers that others have replaced.
            if _submodule(self._model, name) is self._made[name]:
                layer.train(self._made[name].training)
                self._model.set_submodule(name, layer)
        self._theirs, self._made = {}, {}


class KeptLayout(Patch):
    """
    Layers of bitsandbytes that stay as they are when they run in evaluation mode; those that have run
    so before get their former layout back.

    Args:
        model (`nn.Module`): The model.
    """

    target = "support_avx512bf16_for_cpu of bitsandbytes.nn.Linear4bit layers of a model on a CPU"
    purpose = (
        "Layers that cannot be replaced, as fp4 ones, would change the layout of their codes in an "
        "evaluation, for good, and then give no gradient."
    )
    tested = "bitsandbytes 0.50"
    fallback = "after an evaluation on a CPU its layers give no gradient"

    _NAME = "support_avx512bf16_for_cpu"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._before: list[tuple[nn.Module, Any]] = []

    def _check(self) -> None:
        self._layers = [layer for layer in self._model.modules() if _is_theirs(layer)]
        if any(_is_relaid(layer) and not hasattr(layer, self._NAME) for layer in self._layers):
            raise Unsupported("another version of bitsandbytes")

    def _change(self) -> None:
        for layer in self._layers:
            _restore_layout(layer)
            if hasattr(layer, self._NAME):
                self._before.append((layer, getattr(layer, self._NAME)))
                setattr(layer, self._NAME, False)

    def _restore(self) -> None:
        for layer, value in self._before:
            setattr(layer, self._NAME, value)
        self._before.clear()


def on_cpu(model: nn.Module) -> bool:
    """Whether a model has 4-bit layers of bitsandbytes, all of them on a CPU."""
    theirs = [layer for layer in model.modules() if _is_theirs(layer)]
    return bool(theirs) and all(layer.weight.device.type == "cpu" for layer in theirs)


def _submodule(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return model.get_submodule(name)
    except AttributeError:  # an adapter has been merged
        return None


def _made_of(model: nn.Module, adapted: bool = False) -> dict[str, Linear4bit]:
    found = {name: layer for name, layer in model.named_modules() if _is_theirs(layer)}
    if not found:
        raise ValueError(
            f"adopt: {type(model).__name__} has no Linear4bit layer of bitsandbytes; load it with a "
            "BitsAndBytesConfig, or pass it to ORPOTrainer directly"
        )
    for name in found:
        if name.endswith("base_layer") and not adapted:
            raise ValueError(f"adopt: {name} has an adapter; adopt the model before it gets one")
    return {name: _taken_over(name, layer) for name, layer in found.items()}


def _exchange(model: nn.Module, made: dict[str, Linear4bit]) -> None:
    for name, layer in made.items():
        model.set_submodule(name, layer)
    COUNT.ensure()
    serve_peft()


def _is_theirs(layer: nn.Module) -> bool:
    return any(
        each.__name__ == "Linear4bit" and each.__module__.startswith("bitsandbytes.")
        for each in type(layer).__mro__
    )


def _taken_over(name: str, theirs: Any) -> Linear4bit:
    weight = theirs.weight
    state = getattr(weight, "quant_state", None)
    if state is None:
        raise ValueError(f"adopt: {name} is not quantised yet; move the model to a device first")
    if state.quant_type != "nf4":
        raise ValueError(f'adopt: {name} has quant_type {state.quant_type!r}; must be "nf4"')
    _restore_layout(theirs)
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


def _is_relaid(theirs: Any) -> bool:
    state = getattr(theirs.weight, "quant_state", None)
    return bool(getattr(state, "packing_format_for_cpu", False))


def _restore_layout(theirs: Any) -> None:
    """Undoes what an evaluation on a CPU has done to a layer, in place."""
    if not _is_relaid(theirs):
        return
    theirs.state_dict()  # restores the order of the codes
    state = theirs.weight.quant_state
    if state.absmax.ndim == 2:  # but of scales only if they are quantised
        state.absmax = state.absmax.T.reshape(-1).float()


def _state(theirs: Any) -> QuantState:
    parts = ("absmax", "shape", "code", "blocksize", "quant_type", "dtype", "offset")
    nested = None if theirs.state2 is None else _state(theirs.state2)
    return QuantState(**{part: getattr(theirs, part) for part in parts}, state2=nested)
