"""How batches would go through the model, from its configuration alone."""

from typing import Any

import torch
from transformers import AutoConfig

from ..data.image_rows import NO_PACKING
from ..data.processor import auto_class
from ..integrations.model_path import TrainingPath, path_of

__all__ = ["find_path"]


def find_path(
    model: str, revision: str | None, trust_remote_code: bool, images: bool = False
) -> TrainingPath | None:
    """
    The path of a model with the default options and without an adapter. No weights are loaded.

    Args:
        model (`str`): Folder or hub id.
        revision (`str`, *optional*): Branch, tag or commit of a hub model.
        trust_remote_code (`bool`): Allow code from the model's repository.
        images (`bool`, *optional*): Whether the rows have images.

    Returns:
        [`TrainingPath`]: The path; None if there is no configuration, or none of a causal language
        model.
    """
    try:
        config: Any = AutoConfig.from_pretrained(
            model, revision=revision, trust_remote_code=trust_remote_code
        )
        if config.is_encoder_decoder:
            return TrainingPath(plain_because="it is an encoder-decoder model")
        with torch.device("meta"):
            kind = auto_class(config, images)
            core = kind.from_config(config, trust_remote_code=trust_remote_code)
    except Exception:  # a folder with a tokenizer only, or whatever a model's own code may raise
        return None
    found = path_of(core)
    return TrainingPath(NO_PACKING, found.plain_because) if images else found
