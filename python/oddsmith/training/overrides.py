"""Finds hooks that a subclass or an instance overrides."""

from typing import Any


def is_overridden(instance: Any, base: type, name: str) -> bool:
    """Whether `instance.name` is not the function `base.name`."""
    mine = getattr(instance, name)
    return getattr(mine, "__func__", mine) is not getattr(base, name)
