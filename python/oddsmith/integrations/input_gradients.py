"""Embeddings whose output requires a gradient, for checkpoints in front of an adapter."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .patch import Patch

__all__ = ["InputGradients"]


class InputGradients(Patch):
    """
    What `enable_input_require_grads` of transformers does, in hooks that come off again and that pickle.

    A reentrant checkpoint passes no gradient on to an adapter if no input of it requires one.

    Args:
        model (`nn.Module`): The model.
    """

    target = "forward hooks of a model's input embeddings"
    purpose = "Lets gradients through reentrant checkpoints to an adapter."
    tested = "torch 2.11, transformers 5.17 to 5.24"
    fallback = "reentrant checkpoints pass no gradient on to an adapter"

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self._model = model
        self._handles: list[RemovableHandle] = []

    def _change(self) -> None:
        # The parts of a model for images and text have embeddings of their own.
        found = {id(layer): layer for layer in map(_embeddings, self._model.modules())}
        found.pop(id(None), None)
        for layer in found.values():
            self._handles.append(layer.register_forward_hook(_require_grad))

    def _restore(self) -> None:
        while self._handles:
            self._handles.pop().remove()


def _embeddings(module: nn.Module) -> nn.Module | None:
    try:
        layer = module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None
    return layer if isinstance(layer, nn.Module) else None


def _require_grad(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    output.requires_grad_(True)
