"""What looks at a whole row of a batch, or at positions in it: one list, with the path that serves it.

A packed row holds the tokens of all pairs, so what depends on the length of a row, on the place of a
token in it or on other tokens than those that attention shows would be computed from other pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

__all__ = ["RULES", "TOKENWISE_METHODS", "Rule", "row_dependence", "virtual_tokens"]

# Methods of peft that change the output of layers token by token, so that a packed row is computed as
# a padded one. Each was compared on both; any other method is run on padded rows.
TOKENWISE_METHODS = frozenset({
    "ADALORA", "ADAMSS", "BEFT", "BOFT", "C3A", "DEFT", "DELORA", "FOURIERFT", "FROD", "GLORA",
    "GRALORA", "HIRA", "HRA", "IA3", "LN_TUNING", "LOHA", "LOKR", "LORA", "MISS", "OFT",
    "OSF", "PEANUT", "PSOFT", "RANDLORA", "ROAD", "SHIRA", "SUPERTUNING", "TINYLORA",
    "TRAINABLE_TOKENS", "UNILORA", "VBLORA", "VERA", "WAVEFT",
})  # fmt: skip

Path = Literal["padded", "plain"]


@dataclass(frozen=True)
class Rule:
    """
    Something that cannot run on a packed row.

    Args:
        path (`str`): The fastest path that computes it exactly: `"padded"`, the fused head on padded
            rows, or `"plain"`, from logits.
        because (`Callable`): Of a model and the arguments of a run: the reason, if it applies.
    """

    path: Path
    because: Callable[[Any, Any], str | None]


def _neftune(model: Any, args: Any) -> str | None:
    if getattr(args, "neftune_noise_alpha", None) is None:
        return None
    return "neftune_noise_alpha scales its noise by the length of a row"


def _compiled(model: Any, args: Any) -> str | None:
    asked = getattr(args, "torch_compile", False)
    if asked or getattr(model, "_orig_mod", None) is not None:
        return "a compiled model would be compiled again for the lengths of every batch"
    return None


def _activated(model: Any, args: Any) -> str | None:
    if any(getattr(each, "alora_invocation_tokens", None) for each in _adapters(model)):
        return "its adapter (activated LoRA) is active behind certain tokens of a row"
    return None


def _adapter_of_rows(model: Any, args: Any) -> str | None:
    for each in _adapters(model):
        if _method(each) not in TOKENWISE_METHODS and not each.is_prompt_learning:
            return f"its adapter ({_method(each)}) is not known to work token by token"
    return None


def _virtual(model: Any, args: Any) -> str | None:
    for each in _adapters(model):
        if each.is_prompt_learning:
            return f"its adapter ({_method(each)}) puts virtual tokens in front of each row"
    return None


def _encoder(model: Any, args: Any) -> str | None:
    return "it is an encoder-decoder model" if model.config.is_encoder_decoder else None


def _adapters(model: Any) -> Iterator[Any]:
    """Configurations of the adapters of a model that are active."""
    for each in _wrappers(model):
        configs = getattr(each, "peft_config", None)
        if isinstance(configs, dict):
            active: Any = getattr(each, "active_adapters", None) or configs
            active = active() if callable(active) else active
            yield from (configs[name] for name in active if name in configs)
            return


def _method(config: Any) -> str:
    return getattr(config.peft_type, "value", config.peft_type)


def _wrappers(model: Any) -> Iterator[Any]:
    """A model, and the models inside its wrappers by torch.compile and PEFT."""
    while model is not None:
        yield model
        model = getattr(model, "_orig_mod", None)


def virtual_tokens(model: nn.Module) -> bool:
    """Whether an active adapter puts virtual tokens in front of each row."""
    return any(each.is_prompt_learning for each in _adapters(model))


#: In the order in which they are asked.
RULES: tuple[Rule, ...] = (
    Rule("plain", _encoder),
    Rule("plain", _virtual),
    Rule("padded", _compiled),
    Rule("padded", _neftune),
    Rule("padded", _activated),
    Rule("padded", _adapter_of_rows),
)


def row_dependence(model: nn.Module, args: Any, path: Path) -> str | None:
    """
    Why a model with its adapters and the arguments of a run needs a path, or None.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        args ([`ORPOConfig`], *optional*): The arguments; None for the defaults.
        path (`str`): `"padded"` or `"plain"`.
    """
    reasons = (rule.because(model, args) for rule in RULES if rule.path == path)
    return next((reason for reason in reasons if reason is not None), None)
