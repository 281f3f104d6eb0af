"""Which hooks a subclass, or an instance, has of its own."""

from typing import Any


def is_overridden(instance: Any, base: type, name: str) -> bool:
    """Whether `instance.name` is another function than `base.name`."""
    mine = getattr(instance, name)
    return getattr(mine, "__func__", mine) is not getattr(base, name)
