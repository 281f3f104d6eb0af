"""ImageCollator: calls the processor on the rows of a batch."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.utils import logging

from .collator import PairBatch, PreferenceCollator
from .image_rows import TOKEN_TYPES, ImageRows
from .pictures import IMAGE_COLUMNS

logger = logging.get_logger(__name__)

# Begins the key of each input of the model that comes from the images of a batch. These are there
# once for each pair; the trainer repeats them for the two sequences.
IMAGE_INPUT = "image_inputs."


class ImageCollator:
    """
    Makes batches of pairs whose prompts have images.

    Pixel values are too large to be kept for a whole dataset, and text cannot be tokenised without
    knowing the sizes of its images, so both are done here, in the workers of the data loader if it
    has any. The batch is that of [`PreferenceCollator`], padded, with `image_inputs.pixel_values`
    and the like in addition, and a tensor of token types for each sequence if the processor returns
    them. Columns of images are left out.

    Args:
        rows ([`ImageRows`]): Makes the rows.
        pad ([`PreferenceCollator`]): Pads them; without packing.
    """

    def __init__(self, rows: ImageRows, pad: PreferenceCollator):
        self.rows = rows
        self.pad = pad

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> PairBatch:
        """
        The batch of some rows.

        Raises:
            ValueError: For a faulty row; the message has the beginning of its prompt.
        """
        made = self.rows.build(features, [_shown(feature) for feature in features])
        for row in made.rows:
            if not (max(row["chosen_labels"]) >= 0 or max(row["rejected_labels"]) >= 0):
                logger.warning_once(
                    f"{_shown(row)} has no completion tokens within max_length "
                    f"{self.rows.builder.max_length}, because its prompt with its images has "
                    f"{len(row['prompt_input_ids'])}; such rows teach nothing. Raise max_length, "
                    "make the images smaller in the processor, or set overlength='drop'."
                )
        kept = [
            {
                **{name: value for name, value in feature.items() if name not in IMAGE_COLUMNS},
                **row,
            }
            for feature, row in zip(features, made.rows, strict=True)
        ]
        batch = self.pad(kept)
        for name in batch:
            if name.endswith(TOKEN_TYPES):
                side = name.partition("_")[0]
                batch[name] = _pad(batch[name], batch[f"{side}_input_ids"].shape[1], side)
        batch.update({f"{IMAGE_INPUT}{name}": value for name, value in made.inputs.items()})
        return batch


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """
    Inputs of a model from the images of a batch, once for each pair.

    Args:
        batch (`Mapping[str, Any]`): From [`ImageCollator`]; another has none.
    """
    return {
        name.removeprefix(IMAGE_INPUT): value
        for name, value in batch.items()
        if name.startswith(IMAGE_INPUT)
    }


def both_sides(batch: Mapping[str, Any], concatenated: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """
    Inputs of a model beside token ids and mask, for chosen and rejected sequences of a batch.

    Args:
        batch (`Mapping[str, Any]`): From [`ImageCollator`]; another has none.
        concatenated (`Mapping[str, Tensor]`): Its sequences, chosen ones first.

    Returns:
        `dict[str, Tensor]`: The images of the chosen sequences, then the same for the rejected
            ones; and the type of each token, `(2B, T)`.
    """
    made = {}
    for name, value in model_inputs(batch).items():
        device = concatenated["concatenated_input_ids"].device
        made[name] = torch.cat([value, value]).to(device)
    for kind in TOKEN_TYPES:
        if f"concatenated_{kind}" in concatenated:
            made[kind] = concatenated[f"concatenated_{kind}"]
    return made


def _pad(rows: Sequence[Sequence[int]], width: int, side: str) -> Tensor:
    """Token types `(B, width)`, with 0 where the side's ids are padded."""
    padded = torch.zeros(len(rows), width, dtype=torch.int64)
    for row, types in zip(padded, rows, strict=True):
        # Prompts are padded on the left.
        place = slice(width - len(types), None) if side == "prompt" else slice(len(types))
        row[place] = torch.as_tensor(types, dtype=torch.int64)
    return padded


def _shown(row: Mapping[str, Any]) -> str:
    text = repr(row.get("prompt", row.get("chosen")))
    return f"the row with prompt {text if len(text) <= 80 else text[:77] + '...'}"
