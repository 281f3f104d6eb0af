"""Packed rows through the models of transformers.

A [`~oddsmith.packing.batch.PackedBatch`] is one row of tokens without padding, `[prompt | chosen |
rejected]` for each pair. Each answer sees the prompt and itself, and no pair sees another.

The row is passed through the model as a keyword argument to its attention function, and with its mask,
for layers that pass no keywords on. While there is such a row, ours is registered instead of
transformers', under the same name: it computes packed rows and passes every other call on. Neither the
model nor its configuration is changed, and a layer that is recomputed in the backward pass gets the
same arguments from its checkpoint.
"""

from __future__ import annotations

from typing import Any

from ..packing.batch import PackedBatch
from .attention_table import PackedRow, why_not
from .packed_attention import ROW
from .packed_masks import CannotPack, row_mask

__all__ = ["CannotPack", "PackedRow", "check_seen", "packed_inputs", "row_of", "why_not"]


def packed_inputs(batch: PackedBatch, router: bool = False) -> dict[str, Any]:
    """
    Arguments of a model's forward for a packed batch.

    Args:
        batch ([`~oddsmith.packing.batch.PackedBatch`]): The batch.
        router (`bool`, *optional*):
            Ask a mixture of experts for its auxiliary loss. It weighs tokens by the mask, where those of a
            shared prompt count twice: a padded batch has them in both sequences.
    """
    row = PackedRow(batch.segments)
    mask = row_mask(batch.segments, batch.input_ids.device, by_sequence=router, row=row)
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": mask,
        ROW: row,
        **({"output_router_logits": True} if router else {}),
    }


def row_of(inputs: dict[str, Any]) -> PackedRow:
    """The row in [`packed_inputs`]."""
    return inputs[ROW]


def check_seen(inputs: dict[str, Any]) -> None:
    """
    Check a model after a run on [`packed_inputs`].

    Raises:
        RuntimeError: If none of its layers got the packed row.
    """
    if not inputs[ROW].seen:
        raise RuntimeError(
            "the model's attention did not get the packed row: it has changed since the trainer "
            "was created; set its attn_implementation again, or padding_free=False"
        )
