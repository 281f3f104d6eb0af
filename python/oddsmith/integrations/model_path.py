"""The way of a run's batches through its model, and why it is not a faster one."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from .head_probe import HeadMismatch, probe_head
from .model_packing import CannotPack, RowLimits, check

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


def path_of(core: Any) -> TrainingPath:
    """
    The path of a model by itself, without adapters and with the default options.

    Args:
        core (`PreTrainedModel`): The model; its weights are not needed.
    """
    if core.config.is_encoder_decoder:
        return TrainingPath(plain_because="it is an encoder-decoder model")
    try:
        probe_head(core)
    except HeadMismatch as mismatch:
        return TrainingPath(plain_because=str(mismatch))
    try:
        return TrainingPath(limits=check(core))
    except CannotPack as cannot:
        return TrainingPath(str(cannot))
