"""The way of a run's batches through its model, and why it is not a faster one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from . import model_head, model_packing
from .model_core import core_of
from .model_packing import RowLimits
from .row_dependence import row_dependence

__all__ = ["TrainingPath", "path_of"]


@dataclass(frozen=True)
class TrainingPath:
    """
    How batches go through a model.

    Args:
        padded_because (`str`, *optional*): Why batches keep their padding; None if they are packed.
        plain_because (`str`, *optional*): Why the loss is computed from logits, of padded batches;
            None if it is computed in the output head.
        limits ([`RowLimits`], *optional*): The batches that are packed; others keep their padding.
    """

    padded_because: str | None = None
    plain_because: str | None = None
    limits: RowLimits = field(default_factory=RowLimits)

    @property
    def batches(self) -> Literal["packed", "padded"]:
        """`"packed"` without padding, or `"padded"`."""
        free = self.padded_because is None and self.plain_because is None
        return "packed" if free else "padded"

    @property
    def head(self) -> Literal["fused", "plain"]:
        """Where the loss is computed: `"fused"` in the output head, or `"plain"` from its logits."""
        return "fused" if self.plain_because is None else "plain"

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why it is not packed and fused; empty if it is."""
        found = (self.plain_because, None if self.plain_because else self.padded_because)
        return tuple(reason for reason in found if reason is not None)

    def __str__(self) -> str:
        if self.plain_because is not None:
            return f"The loss is computed from logits, not in the fused head: {self.plain_because}."
        if self.padded_because is not None:
            return f"Batches keep their padding: {self.padded_because}."
        limits = f"{self.limits}"
        line = "Batches are packed without padding, and the loss is computed in the fused head"
        return f"{line}, for {limits}; others keep their padding." if limits else f"{line}."


def path_of(model: Any, args: Any = None, padded_because: str | None = None) -> TrainingPath:
    """
    The path of a model with its adapters and the arguments of a run.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model; its weights are not needed.
        args ([`ORPOConfig`], *optional*): The arguments; None for the defaults.
        padded_because (`str`, *optional*): Why rows cannot be packed, whatever the model is.
    """
    if not getattr(args, "use_fused_head", True):
        return TrainingPath(plain_because="use_fused_head is False")
    plain_because = row_dependence(model, args, "plain")
    if plain_because is not None:
        return TrainingPath(plain_because=plain_because)
    try:
        model_head.check(model)
    except model_head.HeadMismatch as mismatch:
        return TrainingPath(plain_because=str(mismatch))
    if not getattr(args, "padding_free", True):
        padded_because = "padding_free is False"
    padded_because = padded_because or row_dependence(model, args, "padded")
    if padded_because is not None:
        return TrainingPath(padded_because)
    try:
        return TrainingPath(limits=model_packing.check(core_of(model)))
    except model_packing.CannotPack as cannot:
        return TrainingPath(str(cannot))
