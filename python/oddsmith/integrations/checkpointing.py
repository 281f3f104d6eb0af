"""Activation checkpointing while a model is trained, with gradients for an adapter."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from .model_core import core_of
from .patch import Patch

__all__ = ["Checkpointing"]

# Attributes that enabling checkpointing sets in a model.
_FLAGS = (
    "gradient_checkpointing",
    "_gradient_checkpointing_func",
    "_require_grads_hooks",
    "_require_grads_hook",
)


class _Before:
    """A model before it was checkpointed."""

    def __init__(self, core: nn.Module) -> None:
        self.users = 0
        self.flags = {
            module: {name: vars(module)[name] for name in _FLAGS if name in vars(module)}
            for module in core.modules()
        }
        # The parts of a model for images and text have separate embeddings.
        found = map(_embeddings, self.flags)
        layers = {id(layer): layer for layer in found if layer is not None}
        self.hooks = {layer: set(layer._forward_hooks) for layer in layers.values()}

    def bring_back(self) -> None:
        for module, flags in self.flags.items():
            for name in _FLAGS:
                vars(module).pop(name, None)
            vars(module).update(flags)
        for layer, hooks in self.hooks.items():
            for key, hook in list(layer._forward_hooks.items()):
                if key not in hooks and _lets_gradients_through(hook):
                    del layer._forward_hooks[key]


_before: WeakKeyDictionary[nn.Module, _Before] = WeakKeyDictionary()


class Checkpointing(Patch):
    """
    Hooks that make the output of embeddings require a gradient: a reentrant checkpoint gives an
    adapter no gradient if none of its inputs requires one. At the end it also removes the
    checkpoints and the hooks, which cannot be pickled, of Trainer.

    Args:
        model (`nn.Module`): The model.
        reentrant (`bool`): Whether checkpoints are reentrant; others need no hooks.
    """

    target = "checkpointing flags of a model and forward hooks of its input embeddings"
    purpose = (
        "Gradients reach an adapter; after a run, a model pickles and is checkpointed as before."
    )
    tested = "torch 2.11, transformers 5.17 and 5.24, peft 0.19 and 0.21"
    fallback = "reentrant checkpoints give an adapter no gradient"

    def __init__(self, model: nn.Module, reentrant: bool = True) -> None:
        super().__init__()
        self._model = model
        self._reentrant = reentrant

    def _change(self) -> None:
        self._core = core_of(self._model)
        before = _before.setdefault(self._core, _Before(self._core))
        before.users += 1
        if self._reentrant:
            for layer in before.hooks:
                if _require_grad not in layer._forward_hooks.values():
                    layer.register_forward_hook(_require_grad)

    def _restore(self) -> None:
        before = _before[self._core]
        before.users -= 1
        if not before.users:  # no other run of the same model is active
            del _before[self._core]
            before.bring_back()


def _embeddings(module: Any) -> nn.Module | None:
    try:
        layer = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return layer if isinstance(layer, nn.Module) else None


def _require_grad(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    output.requires_grad_(True)


def _lets_gradients_through(hook: Any) -> bool:
    # The names of the functions in enable_input_require_grads, of transformers and of peft.
    return hook is _require_grad or getattr(hook, "__name__", "").startswith(
        "make_inputs_require_grad"
    )
