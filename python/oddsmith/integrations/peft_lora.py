"""LoRA on 4-bit layers for peft: one autograd function per projection, and correct merging."""

from __future__ import annotations

from typing import Any, cast

import torch
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn

from ..quant.linear import linear_nf4_lora
from ..quant.modules import Linear4bit
from .peft_merge import in_full

__all__ = ["LoraLinear4bit"]

# Initialisations of an adapter that change the base, which is not possible with 4-bit weights.
_CHANGING = ("pissa", "olora", "corda", "loftq", "lora_ga")

# Other forms of LoRA, which read or change the base in other ways.
_VARIANTS = ("use_dora", "arrow_config", "use_bdlora", "alora_invocation_tokens", "velora_config")
_VARIANTS += ("monteclora_config", "kasa_config")


class LoraLinear4bit(peft_layer.Linear):
    """
    [`Linear4bit`] with low-rank adapters, as peft's `lora.Linear`.

    With one active adapter, no dropout and no autocast, the base product, the low-rank product and
    their gradients are one autograd function that adds in place. Everything else is computed by
    peft.

    Args:
        base_layer ([`Linear4bit`]): The layer.
        adapter_name (`str`): Name of the first adapter.
        config (`LoraConfig`): Its configuration.
        kwargs: Rank, alpha and the like, as peft passes them.

    Raises:
        ValueError: For DoRA and other variants, and for initialisations that change the base.
    """

    #: Its own `merge` and `unmerge` have the full weight; `peft_merge` gives it to other adapters.
    merges_in_full = True

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any
    ) -> None:
        _check(config)
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def update_layer(self, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
        _check(config)
        super().update_layer(adapter_name, *args, config=config, **kwargs)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        name = self._only_adapter(args, kwargs)
        if name is None or torch.is_autocast_enabled(x.device.type):
            return super().forward(x, *args, **kwargs)
        base = cast(Linear4bit, self.base_layer)
        state = base.quant_state
        if state is None:
            return super().forward(x, *args, **kwargs)
        dtype = base.compute_dtype or x.dtype
        out = linear_nf4_lora(
            x.to(dtype),
            base.weight,
            state,
            cast(nn.Linear, self.lora_A[name]).weight,
            cast(nn.Linear, self.lora_B[name]).weight,
            self.scaling[name],
            base.bias,
        )
        return out.to(x.dtype)

    def _only_adapter(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
        """The adapter, if it is the only active one and is applied to the input directly."""
        active = [name for name in self.active_adapters if name in self.lora_A]
        if args or kwargs or self.disable_adapters or self.merged or len(active) != 1:
            return None
        (name,) = active
        dropout: Any = cast(Any, self.lora_dropout[name])
        drops = not isinstance(dropout, nn.Identity) and self.training and dropout.p > 0
        plain = type(self.base_layer) is Linear4bit and name not in self.lora_variant
        return name if plain and not drops and self.lora_B[name].bias is None else None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the base, which is rounded to 4 bits again; `safe_merge` refuses NaN."""
        with in_full(cast(Linear4bit, self.get_base_layer())):
            super().merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        """Removes merged adapters, up to the rounding to 4 bits."""
        with in_full(cast(Linear4bit, self.get_base_layer())):
            super().unmerge()


def _check(config: Any) -> None:
    for name in _VARIANTS:
        if getattr(config, name, None):
            raise ValueError(
                f"LoraConfig: {name} is not supported for 4-bit layers of oddsmith; remove it, or load "
                "the model in full precision"
            )
    begin = config.init_lora_weights
    if isinstance(begin, str) and begin.lower().startswith(_CHANGING):
        raise ValueError(
            f"LoraConfig: init_lora_weights is {begin!r}, which changes the base; 4-bit layers of oddsmith "
            'take True, False, "gaussian", "orthogonal" and "eva"'
        )
