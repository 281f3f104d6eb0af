"""The number of parameters of models with 4-bit weights of oddsmith."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from ..quant.state import QuantState
from .patch import Patch, Unsupported, find

__all__ = ["COUNT", "ParameterCount"]

_NAME = "transformers:PreTrainedModel.num_parameters"


class ParameterCount(Patch):
    """A count that supports our weights; that of transformers imports bitsandbytes for 4-bit
    weights.
    """

    target = "transformers.PreTrainedModel.num_parameters"
    purpose = "Counts the values of 4-bit weights of oddsmith, without bitsandbytes."
    tested = "transformers 5.17 and 5.24"
    fallback = "4-bit models are counted by transformers, which needs bitsandbytes for it"
    needs = (_NAME,)

    def _check(self) -> None:
        known = inspect.signature(find(_NAME)).parameters
        missing = [each for each in ("only_trainable", "exclude_embeddings") if each not in known]
        if missing:
            raise Unsupported(f"it has no argument {', '.join(missing)}")

    def _change(self) -> None:
        self._owner = find(_NAME.rpartition(".")[0])
        self._inherits = "num_parameters" not in vars(self._owner)
        theirs = self._theirs = self._owner.num_parameters

        def num_parameters(
            self: Any, only_trainable: bool = False, exclude_embeddings: bool = False, **more: Any
        ) -> int:
            counts = {p: p.quant_state.shape.numel() for p in self.parameters() if _is_ours(p)}
            if not counts:
                return theirs(self, only_trainable, exclude_embeddings, **more)
            left_out = {
                module.weight
                for module in self.modules()
                if exclude_embeddings and isinstance(module, nn.Embedding)
            }
            return sum(
                counts.get(p, p.numel())
                for p in self.parameters()
                if p not in left_out and (p.requires_grad or not only_trainable)
            )

        self._ours = num_parameters
        self._owner.num_parameters = num_parameters

    def _restore(self) -> None:
        if vars(self._owner).get("num_parameters") is not self._ours:
            return
        if self._inherits:
            del self._owner.num_parameters
        else:
            self._owner.num_parameters = self._theirs


COUNT = ParameterCount()


def _is_ours(parameter: nn.Parameter) -> bool:
    return isinstance(getattr(parameter, "quant_state", None), QuantState)
