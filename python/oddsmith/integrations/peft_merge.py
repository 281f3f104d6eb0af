"""Merging of peft's adapters into 4-bit layers of oddsmith."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any, cast

import torch
from torch import nn

from ..quant.modules import Linear4bit, Params4bit
from ..quant.nf4 import dequantize_nf4
from ..quant.sharded import is_part
from .patch import Patch, Unsupported, find

__all__ = ["MERGING", "AdapterMerging", "in_full"]

_TUNER = "peft.tuners.tuners_utils:BaseTuner"
_LAYER = "peft.tuners.tuners_utils:BaseTunerLayer"
# The methods of a tuner that merge its layers.
_METHODS = ("_unload_and_optionally_merge", "merge_adapter", "unmerge_adapter")


@contextmanager
def in_full(base: Linear4bit) -> Iterator[None]:
    """A context in which a layer's weight is in `float32`; it is quantised again at the end, and
    unchanged after an error.

    Raises:
        RuntimeError: If the weight is not quantised yet, or split over processes.
    """
    codes = base.weight
    if is_part(codes):
        raise RuntimeError(
            "the weights are split over processes; save the adapter, and merge it with `oddsmith merge`"
        )
    state = codes.quant_state
    if state is None:
        raise RuntimeError("the weight is not quantised yet; move the layer to a device first")
    full = dequantize_nf4(codes, state, torch.float32)
    base.weight = cast(Params4bit, nn.Parameter(full, requires_grad=False))
    try:
        yield
        changed = base.weight.data.to(state.dtype)
        fresh = codes.with_data(changed, None).quantize_(codes.device)
    except BaseException:
        base.weight = codes
        raise
    base.weight = fresh


@contextmanager
def _layers_in_full(model: nn.Module) -> Iterator[None]:
    """A context in which `merge` and `unmerge` of adapters on 4-bit layers work on full weights."""
    kind = find(_LAYER)
    with ExitStack() as stack:
        for layer in model.modules():
            if not isinstance(layer, kind):
                continue
            base = cast(Any, layer).get_base_layer()
            if isinstance(base, Linear4bit) and not getattr(layer, "merges_in_full", False):
                for name in ("merge", "unmerge"):
                    _give_full(layer, base, name, stack)
        yield


def _give_full(layer: nn.Module, base: Linear4bit, name: str, stack: ExitStack) -> None:
    theirs = getattr(layer, name)

    def ours(*args: Any, **kwargs: Any) -> Any:
        with in_full(base):
            return theirs(*args, **kwargs)

    vars(layer)[name] = ours
    stack.callback(vars(layer).pop, name, None)


class AdapterMerging(Patch):
    """Gives peft's adapters the full weights of 4-bit layers to merge into, one layer at a time."""

    target = f"{_TUNER.replace(':', '.')}, its methods {', '.join(_METHODS)}"
    purpose = "Adapters merge into 4-bit layers, which peft would take for full weights."
    tested = "peft 0.19 and 0.21"
    fallback = "only LoRA adapters can be merged into 4-bit layers"
    needs = (_TUNER, _LAYER, *(f"{_TUNER}.{name}" for name in _METHODS))

    def _change(self) -> None:
        self._tuner = find(_TUNER)
        self._theirs = {name: getattr(self._tuner, name) for name in _METHODS}
        self._ours = {name: _wrapped(method) for name, method in self._theirs.items()}
        for name, method in self._ours.items():
            setattr(self._tuner, name, method)

    def _restore(self) -> None:
        for name, method in self._ours.items():
            if vars(self._tuner).get(name) is method:
                setattr(self._tuner, name, self._theirs[name])

    @torch.no_grad()
    def _try_out(self) -> None:
        from peft import IA3Config, get_peft_model

        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            base = Linear4bit.from_linear(nn.Linear(64, 64, dtype=torch.float32))
            config = IA3Config(target_modules=["0"], feedforward_modules=[])
            before = dequantize_nf4(base.weight, cast(Any, base.quant_state))
            model = cast(Any, get_peft_model(cast(Any, nn.Sequential(base)), config))
            scale = next(each for name, each in model.named_parameters() if "ia3_l" in name)
            scale.fill_(2.0)
            model.merge_adapter()
            after = dequantize_nf4(base.weight, cast(Any, base.quant_state))
        # The same codes with scales of twice the size.
        if not torch.allclose(after, 2.0 * before, rtol=0.0, atol=0.1 * float(before.abs().max())):
            raise Unsupported("a merged adapter gave another weight")


def _wrapped(theirs: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(theirs)
    def ours(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _layers_in_full(self.model):
            return theirs(self, *args, **kwargs)

    return ours


MERGING = AdapterMerging()
