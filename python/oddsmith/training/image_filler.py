"""A sequence with an image for batches of text, where the vision part of a model is split."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from ..data.image_rows import TOKEN_TYPES, ImageBatch
from ..data.pictures import IMAGE_COLUMNS

__all__ = ["SEARCHED_ROWS", "ImageFiller", "row_with_image"]

# Rows that are looked at for one with an image.
SEARCHED_ROWS = 1000


class ImageFiller:
    """
    Lets all processes run the vision part of a model if one of them has to.

    FSDP and ZeRO-3 gather the weights of a layer when it runs, so a process whose batch is text alone
    would let the others wait without end. Such a batch gets one more sequence, the prompt of a row with
    images. It is in no term of the loss, so that its gradients are zero. If no process has an image, the
    vision part has no gradient, as in one process.

    Args:
        batch ([`ImageBatch`]): Of one row with images.
        counted (`bool`): Whether the model has a loss of its own, which would count the sequence.
    """

    def __init__(self, batch: ImageBatch, counted: bool = False):
        (row,) = batch.rows
        self.counted = counted
        self.ids: list[int] = list(row["prompt_input_ids"])
        self.types: dict[str, list[int]] = {
            kind: list(row[f"prompt_{kind}"]) for kind in TOKEN_TYPES if f"prompt_{kind}" in row
        }
        self.inputs = batch.inputs

    def fill(
        self, inputs: Mapping[str, Tensor], extra: Mapping[str, Any], padding_value: int
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """
        The inputs of a model, with the sequence at their end if another process has images and this
        one has none. Called by all processes for each batch.

        Args:
            inputs (`Mapping`): Sequences of a batch: `concatenated_input_ids` and the like, `(2B, T)`.
            extra (`Mapping`): From [`~oddsmith.data.image_collator.both_sides`].
            padding_value (`int`): Token id of the padding.

        Raises:
            ValueError: On all processes, if the sequence is needed and would be counted.
        """
        ids = inputs["concatenated_input_ids"]
        has_images = any(name not in TOKEN_TYPES for name in extra)
        found = torch.tensor([float(has_images), float(not has_images)], device=ids.device)
        distributed.all_reduce(found, distributed.ReduceOp.MAX)
        some_have, some_have_none = found.bool().tolist()
        if some_have and some_have_none and self.counted:
            raise ValueError(
                "only some processes have images in their batches, and the model's auxiliary loss would "
                "count the image that the others get to run its split vision part: set "
                "output_router_logits=False, use DDP, or train on rows that all have images"
            )
        if has_images or not some_have:
            return dict(inputs), dict(extra)
        width = max(ids.shape[1], len(self.ids))
        values = {"input_ids": padding_value, "attention_mask": 0, "labels": -100}
        own = {"input_ids": self.ids, "attention_mask": [1] * len(self.ids), "labels": []}
        filled = dict(inputs)
        for name, padding in values.items():
            key = f"concatenated_{name}"
            filled[key] = _with_row(inputs[key], own[name], width, padding)
        made: dict[str, Any] = {
            name: value.to(ids.device) if torch.is_tensor(value) else value
            for name, value in self.inputs.items()
        }
        for kind, types in self.types.items():
            made[kind] = _with_row(torch.zeros_like(ids), types, width, 0)
        return filled, made


def _with_row(rows: Tensor, row: list[int], width: int, padding: int) -> Tensor:
    """Padded rows `(N, T)` with one more, `(N + 1, width)`."""
    rows = F.pad(rows, (0, width - rows.shape[1]), value=padding)
    added = torch.as_tensor(row, dtype=rows.dtype, device=rows.device)
    return torch.cat([rows, F.pad(added, (0, width - len(row)), value=padding)[None]])


def row_with_image(rows: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The first row that has an image, of the first ones; None if there is none."""
    for row in islice(iter(rows), SEARCHED_ROWS):
        for name in IMAGE_COLUMNS:
            value = row.get(name)
            if value is not None and not (isinstance(value, (list, tuple)) and not value):
                return row
    return None
