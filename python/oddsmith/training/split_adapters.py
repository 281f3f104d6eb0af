"""Adapters under tensor parallelism: which can be trained on layers that processes share."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from torch import nn

__all__ = ["check_adapter_kind", "check_adapter_layers"]

# Options of peft's LoraConfig that change neither which weights there are nor how they are computed,
# or that were tried. Others, also those of a later peft, are refused.
_SERVED = (
    "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules", "use_rslora",
    "rank_pattern", "alpha_pattern", "layers_to_transform", "layers_pattern", "task_type",
    "inference_mode", "peft_type", "peft_version", "auto_mapping", "base_model_name_or_path",
    "revision", "megatron_core", "runtime_config",
)  # fmt: skip
# Those that begin without a change of the layer's own weights, which are split.
_STARTS = (True, False, "gaussian")
_INSTEAD = "use a plain LoraConfig, or FSDP2"


def check_adapter_kind(config: Any) -> None:
    """
    Checks that tensor parallelism can train an adapter.

    peft splits the weights of LoRA as the layers that they are on. Those of others end in the middle of
    a step, wait for each other without end, or are trained on a part of their gradient.

    Args:
        config (`PeftConfig`): Its configuration.

    Raises:
        ValueError: If it is not LoRA, or LoRA with an option that changes what is trained.
    """
    kind = str(getattr(config.peft_type, "value", config.peft_type))
    if kind != "LORA":
        raise ValueError(
            f"tensor parallelism trains LoRA alone, and the adapter is {kind}: {_INSTEAD}"
        )
    for name, value in _changed(config):
        raise ValueError(
            f"tensor parallelism trains LoRA alone, and the adapter has {name}={value!r}: {_INSTEAD}"
        )


def _changed(config: Any) -> Iterator[tuple[str, Any]]:
    """Options that are not served and not at their default."""
    defaults = type(config)()
    for name in (field.name for field in fields(config)):
        value = getattr(config, name)
        # What was saved may have an empty list for None.
        same = value == getattr(defaults, name) or not (value or getattr(defaults, name))
        if name == "init_lora_weights":
            same = value in _STARTS
        if name not in _SERVED and not same:
            yield name, value


def check_adapter_layers(model: nn.Module) -> None:
    """
    Checks that peft can compute an adapter on the layers that it is on, which tensor parallelism has
    split.

    Args:
        model (`nn.Module`): The model, with its adapter.

    Raises:
        ValueError: If it cannot.
    """
    for config in getattr(model, "peft_config", {}).values():
        check_adapter_kind(config)
    if (layer := _split_adapter(model)) is not None:
        raise ValueError(
            f"tensor parallelism splits the columns of {layer}, or its logits, where peft's adapter "
            "fails: leave it out of target_modules, such as ['q_proj', 'k_proj', 'v_proj', 'gate_proj', "
            "'up_proj'], or use FSDP2"
        )


def _split_adapter(model: nn.Module) -> str | None:
    """An adapted layer whose input is split, or that makes the logits."""
    for name, module in model.named_modules():
        base = getattr(module, "base_layer", None)
        placements = getattr(getattr(base, "weight", None), "placements", ())
        columns = any(place.is_shard(1) for place in placements)
        if columns or (placements and name.rpartition(".")[2] == "lm_head"):
            return name
    return None
