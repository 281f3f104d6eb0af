"""Models that take images: the checks before training, and parameters without use."""

import inspect

from torch import nn

from ..config import ORPOConfig
from ..data.processor import is_image_text_config
from ..integrations.model_core import core_of


def check_image_model(model: nn.Module, args: ORPOConfig) -> None:
    """
    Check that a model can be trained on rows with images.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        args ([`ORPOConfig`]): For `n_gpu`.

    Raises:
        ValueError: If it takes no images, its adapter consists of virtual tokens, or batches would
            be split by DataParallel.
    """
    if args.n_gpu > 1:
        raise ValueError(
            "rows have images, and DataParallel would split them from their text; start one "
            "process per GPU with accelerate launch or torchrun"
        )
    core = core_of(model)
    if "pixel_values" not in inspect.signature(core.forward).parameters:
        raise ValueError(
            f"rows have images, but model is a {type(core).__name__}, which takes none; load it "
            "with AutoModelForImageTextToText, or train on the text alone with "
            "dataset.remove_columns(...)"
        )
    if getattr(getattr(model, "active_peft_config", None), "is_prompt_learning", False):
        raise ValueError(
            "rows have images and the adapter consists of virtual tokens, which would move them; "
            "use another adapter, such as peft.LoraConfig"
        )


def allow_unused_parameters(model: nn.Module, args: ORPOConfig) -> None:
    """
    Let DDP find parameters without a gradient, if a model has parts for images.

    A batch of text alone leaves these without one, and DDP would stop. Transformers only allows it
    without gradient checkpointing. As in TRL; not with reentrant checkpointing, which fails then.

    Args:
        model (`PreTrainedModel` or `PeftModel`): The model.
        args ([`ORPOConfig`]): Its `ddp_find_unused_parameters` is set if it is None.
    """
    if not is_image_text_config(core_of(model).config):
        return
    options = args.gradient_checkpointing_kwargs
    reentrant = isinstance(options, dict) and options.get("use_reentrant")
    if args.ddp_find_unused_parameters is None and not reentrant:
        args.ddp_find_unused_parameters = True
