"""How the batches of a run would go through its model, without its weights."""

from typing import Any

import torch
from transformers import AutoConfig

from ..data.image_rows import NO_PACKING
from ..data.processor import auto_class
from ..integrations.model_path import TrainingPath, path_of

__all__ = ["find_path"]


def find_path(
    model: str,
    revision: str | None,
    trust_remote_code: bool,
    images: bool = False,
    args: Any = None,
    peft_config: Any = None,
) -> TrainingPath | None:
    """
    The path of a model in a run. No weights are loaded.

    Args:
        model (`str`): Folder or hub id.
        revision (`str`, *optional*): Branch, tag or commit of a hub model.
        trust_remote_code (`bool`): Allow code from the model's repository.
        images (`bool`, *optional*): Whether the rows have images.
        args ([`ORPOConfig`], *optional*): The arguments of the run; None for the defaults.
        peft_config (`PeftConfig`, *optional*): The adapter of the run.

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
        kwargs = {} if args is None else args.model_kwargs()
        attention = {name: kwargs[name] for name in ("attn_implementation",) if name in kwargs}
        with torch.device("meta"):
            kind = auto_class(config, images)
            core = kind.from_config(config, trust_remote_code=trust_remote_code, **attention)
            if peft_config is not None:
                from peft import get_peft_model

                core = get_peft_model(core, peft_config)
    except Exception:  # a folder with a tokenizer only, or whatever a model's own code may raise
        return None
    return path_of(core, args, NO_PACKING if images else None)
