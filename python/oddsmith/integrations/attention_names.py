"""The names that a model's attention has in transformers' table."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = [
    "attention_name",
    "attention_named",
    "configs_of",
    "module_configs",
    "name_attention",
    "plain_attention",
    "text_config",
]

# Where a configuration has the name of its attention; the public name also changes others.
_ATTENTION = "_attn_implementation_internal"


def text_config(config: Any) -> Any:
    """The configuration of a model's text part."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def configs_of(config: Any) -> list[Any]:
    """A configuration and those within it."""
    found, queue = [], [config]
    while queue:
        each = queue.pop()
        found.append(each)
        queue += [x for x in vars(each).values() if hasattr(x, "model_type") and x not in found]
    return found


def attention_name(core: Any) -> str | None:
    """The name that the attention of a model's text part has in transformers' table."""
    return getattr(text_config(core.config), "_attn_implementation", None)


def plain_attention(core: Any) -> str:
    """The attention, computed by its definition on any device, that a model's own is compared with."""
    name = attention_name(core)
    return name if name in ("eager", "sdpa") else "eager"


@contextmanager
def attention_named(small: nn.Module, name: str) -> Iterator[None]:
    """A context in which the attention of a small model has another name."""
    before, configs = attention_name(small), module_configs(small)
    name_attention(configs, name)
    try:
        yield
    finally:
        name_attention(configs, before)


def module_configs(model: nn.Module) -> list[Any]:
    """The configurations that a model and its parts have."""
    # Parts of a model may have copies of its configuration.
    own = (getattr(module, "config", None) for module in model.modules())
    return list({id(each): each for each in own if hasattr(each, "model_type")}.values())


def name_attention(configs: list[Any], name: str | None) -> None:
    """Gives the attention of configurations, and of those within them, another name."""
    for config in configs:
        for each in configs_of(config):
            setattr(each, _ATTENTION, name)
