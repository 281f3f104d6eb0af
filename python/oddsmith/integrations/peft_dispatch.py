"""Selects the layer that peft creates for a 4-bit layer of oddsmith."""

from __future__ import annotations

import importlib.util
from typing import Any, cast

import torch
from torch import nn

from ..quant.modules import Linear4bit
from ..quant.nf4 import dequantize_nf4
from .patch import Patch, Unsupported, find
from .peft_merge import MERGING

__all__ = ["DISPATCH", "LoraDispatch", "serve_peft"]

_MODULE = "peft.tuners.lora.model"
_NAME = "dispatch_default"


class LoraDispatch(Patch):
    """[`~oddsmith.integrations.peft_lora.LoraLinear4bit`] on our 4-bit layers; peft handles all
    others.
    """

    target = f"{_MODULE}.{_NAME}"
    purpose = "LoRA on 4-bit layers: one autograd function per projection, and correct merging."
    tested = "peft 0.19 and 0.21"
    fallback = "adapters on 4-bit layers are computed by peft, which cannot merge them"
    needs = (
        f"{_MODULE}:{_NAME}",
        "peft.tuners.lora.layer:Linear",
        "peft.tuners.tuners_utils:BaseTunerLayer",
    )

    def _change(self) -> None:
        from .peft_lora import LoraLinear4bit

        self._module = find(f"{_MODULE}:__dict__")
        theirs = self._theirs = self._module[_NAME]

        def dispatch(target: Any, *args: Any, **kwargs: Any) -> nn.Module | None:
            base = target.get_base_layer() if hasattr(target, "get_base_layer") else target
            kind = LoraLinear4bit if isinstance(base, Linear4bit) else theirs
            return kind(target, *args, **kwargs)

        self._ours = self._module[_NAME] = dispatch

    def _restore(self) -> None:
        if self._module[_NAME] is self._ours:
            self._module[_NAME] = self._theirs

    @torch.no_grad()
    def _try_out(self) -> None:
        from peft import LoraConfig, get_peft_model

        # Independent of the caller's default device and dtype, and of autocast.
        plain = torch.autocast("cpu", enabled=False)
        with torch.random.fork_rng(devices=[]), torch.device("cpu"), plain:
            base = Linear4bit.from_linear(nn.Linear(64, 64, dtype=torch.float32))
            adapter = LoraConfig(r=2, lora_alpha=3, target_modules=["0"], init_lora_weights=False)
            model = get_peft_model(cast(Any, nn.Sequential(base)), adapter).float()
            layer = cast(Any, model.get_base_model())[0]
            x = torch.randn(3, 64, dtype=torch.float32)
            self._compare(layer, x)

    @staticmethod
    def _compare(layer: Any, x: torch.Tensor) -> None:
        from .peft_lora import LoraLinear4bit

        if not isinstance(layer, LoraLinear4bit):
            raise Unsupported(f"peft made a {type(layer).__name__}")
        base: Any = cast(Any, layer.get_base_layer())
        weight = dequantize_nf4(base.weight, base.weight.quant_state)
        a, b = (cast(nn.Linear, each["default"]).weight for each in (layer.lora_A, layer.lora_B))
        expected = nn.functional.linear(x, weight, base.bias) + 1.5 * x @ a.T @ b.T
        if not torch.allclose(layer(x), expected, rtol=1e-4, atol=1e-4):
            raise Unsupported("an adapter on a 4-bit layer gave another result")


DISPATCH = LoraDispatch()


def serve_peft() -> None:
    """Registers our layers with peft, if it is installed, for new and loaded models."""
    if importlib.util.find_spec("peft") is not None:
        DISPATCH.ensure()
        MERGING.ensure()
