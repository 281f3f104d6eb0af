"""Packed rows through the models of transformers.

A [`~oddsmith.packing.batch.PackedBatch`] is one row of tokens without padding, `[prompt | chosen |
rejected]` for each pair. Each answer sees the prompt and itself, and no pair sees another.

The row is passed through the model as a keyword argument to its attention function. While there is
such a row, ours is registered instead of transformers', under the same name: it computes packed rows
and passes every other call on. Neither the model nor its configuration is changed, and a layer that is
recomputed in the backward pass gets the same arguments from its checkpoint.
"""

from __future__ import annotations

from typing import Any

import torch

from ..packing.batch import PackedBatch
from .attention_table import PackedRow, why_not
from .model_core import observed
from .packed_attention import ROW
from .packed_masks import CannotPack, row_mask

__all__ = ["CannotPack", "PackedRow", "check", "check_seen", "packed_inputs"]


@torch.no_grad()
def check(core: Any) -> None:
    """
    Checks by a trial whether a model gives the same results on a packed row as on a padded batch.
    Nothing is changed.

    Raises:
        [`CannotPack`]: With the reason, if not.
    """
    reason = why_not(getattr(core.config, "_attn_implementation", None))
    if reason is not None:
        raise CannotPack(reason)
    try:
        with observed(core):
            reason = _try_out(core)
    except CannotPack as cannot:
        reason = str(cannot)
    except Exception as error:  # whatever a model's own code may raise
        reason = f"a packed row could not be tried out ({type(error).__name__}: {error})"
    if reason is not None:
        raise CannotPack(reason)


def _try_out(core: Any) -> str | None:
    """Compares two short pairs packed and padded; returns the problem, or None."""
    device = core.get_input_embeddings().weight.device
    if device.type == "meta":
        return "its weights are not in memory, so a packed row cannot be tried out"
    # Low ids: high ones of some models are image tokens. The first pair shares all but the last of
    # three prompt tokens, the second nothing; only position and neighbours distinguish its tokens.
    chosen, rejected = ([3, 5, 4, 6, 5, 3, 4], [5, 3]), ([3, 5, 4, 3], [5, 3, 5])
    pairs = [
        {
            "chosen_input_ids": a,
            "chosen_labels": a,
            "rejected_input_ids": b,
            "rejected_labels": [-100] * 3 + b[3:],
        }
        for a, b in zip(chosen, rejected, strict=True)
    ]
    batch = PackedBatch.build(pairs, share_prompt=True).to(device)
    ids = torch.zeros(4, 7, dtype=torch.int64, device=device)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate((*chosen, *rejected)):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    inputs = packed_inputs(batch)
    packed = core(**inputs, use_cache=False).logits[0, batch.rows]
    if not inputs[ROW].seen:
        return "its attention does not get the packed row"
    padded = core(input_ids=ids, attention_mask=mask, use_cache=False).logits
    # All rows that predict, in the order of the batch: chosen and rejected of each pair.
    order = [0, 2, 1, 3]
    padded = torch.cat([padded[row, : mask[row].sum() - 1] for row in order])
    room = 64 * torch.finfo(packed.dtype).eps * (1.0 + padded.abs().max())
    if packed.shape != padded.shape or (packed - padded).abs().max() > room:
        return "its results on a packed row differ from those on a padded batch"
    return None


def packed_inputs(batch: PackedBatch, router: bool = False) -> dict[str, Any]:
    """
    Arguments of a model's forward for a packed batch.

    Args:
        batch ([`~oddsmith.packing.batch.PackedBatch`]): The batch.
        router (`bool`, *optional*):
            Ask a mixture of experts for its auxiliary loss. It weighs tokens by the mask, where those of a
            shared prompt count twice: a padded batch has them in both sequences.
    """
    mask = row_mask(batch.segments, batch.input_ids.device, by_sequence=router)
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": mask,
        ROW: PackedRow(batch.segments),
        **({"output_router_logits": True} if router else {}),
    }


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
