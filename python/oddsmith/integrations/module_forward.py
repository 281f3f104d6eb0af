"""Replaces the forward of one module during a call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from .patch import Patch

__all__ = ["ModuleForward"]


class ModuleForward(Patch):
    """
    Replaces the `forward` of one module.

    Args:
        module (`nn.Module`): The module.
        forward (`Callable`): Replaces its `forward`.
        under_hooks (`bool`, *optional*, defaults to `True`): Keep the hooks of accelerate, which
            move weights and outputs between devices, around it.
    """

    target = "`forward` of a module"
    purpose = "Computes the loss where a model would make its logits, and tries a model out."
    tested = "torch 2.11, accelerate 1.10 and 1.15"
    fallback = "the loss is computed from logits"

    def __init__(
        self, module: nn.Module, forward: Callable[..., Any], under_hooks: bool = True
    ) -> None:
        super().__init__()
        self._own = vars(module)
        # Where accelerate stores a module's forward while its hooks are attached.
        hooked = under_hooks and "_old_forward" in self._own
        self._name = "_old_forward" if hooked else "forward"
        self._had = self._name in self._own
        self._before = self._own.get(self._name, getattr(module, self._name))
        self._forward = forward

    def _call(self, *args: Any, **kwargs: Any) -> Any:
        # Code that has wrapped this forward meanwhile calls the module's forward once it is undone.
        # No is_applied(): torch.compile, which follows calls to here, knows no locks.
        return (self._forward if self._users else self._before)(*args, **kwargs)

    def _change(self) -> None:
        self._mine = self._own[self._name] = self._call

    def _restore(self) -> None:
        if self._own.get(self._name) is not self._mine:
            return
        if self._had:
            self._own[self._name] = self._before
        else:
            del self._own[self._name]
