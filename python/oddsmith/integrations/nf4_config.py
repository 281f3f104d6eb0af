"""Selects oddsmith for models with 4-bit weights, for one configuration or for all."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .quantizer_table import MERGE, TABLE, NF4ByOddsmith, serve_all

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig

__all__ = ["NF4Config", "use_for_bitsandbytes"]


def NF4Config(
    compute_dtype: torch.dtype | str | None = None,
    double_quant: bool = False,
    skip_modules: list[str] | None = None,
    **kwargs: Any,
) -> BitsAndBytesConfig:
    """
    Settings that load a model with NF4 weights (Dettmers et al. 2023) of oddsmith, whether bitsandbytes
    is installed or not. Models with other settings are not affected.

    A function, not a subclass, because transformers compares the class with that of a checkpoint.
    The choice of oddsmith is stored in its `bnb_4bit_quant_type`, a string equal to `"nf4"`; copies
    and `from_dict(config.to_dict())` keep it. A saved checkpoint has a plain `"nf4"`.

    Args:
        compute_dtype (`torch.dtype` or `str`, *optional*, defaults to `torch.float32`):
            Dtype that the inputs of linear layers are cast to.
        double_quant (`bool`, *optional*, defaults to `False`):
            Quantise the scales too, which saves 0.4 bits per value.
        skip_modules (`list[str]`, *optional*):
            Layers not to quantise; the output head if not given.
        kwargs:
            Further arguments of `BitsAndBytesConfig`.

    Returns:
        `BitsAndBytesConfig`: For `from_pretrained`; it is also saved in checkpoints.

    Raises:
        ValueError: If `kwargs` select another type of weights.
    """
    from transformers import BitsAndBytesConfig

    settings = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_compute_dtype": compute_dtype,
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_skip_modules": skip_modules,
        **kwargs,
    }
    kind = settings["bnb_4bit_quant_type"]
    if kind != "nf4" or settings.get("load_in_8bit"):
        found = "load_in_8bit=True" if kind == "nf4" else f"bnb_4bit_quant_type={kind!r}"
        raise ValueError(
            f'NF4Config: got {found}; must be bnb_4bit_quant_type="nf4". For other weights, which '
            "bitsandbytes computes, use transformers.BitsAndBytesConfig"
        )
    settings["bnb_4bit_quant_type"] = NF4ByOddsmith("nf4")
    TABLE.ensure()
    MERGE.ensure()
    return BitsAndBytesConfig(**settings)


def use_for_bitsandbytes(on: bool = True) -> None:
    """
    Load all models with NF4 weights with oddsmith from now on, even if bitsandbytes is installed;
    without it, `import oddsmith` does so. Other weights of 4 or 8 bits are loaded by bitsandbytes.

    Args:
        on (`bool`, *optional*, defaults to `True`): `False` loads them with bitsandbytes again.
    """
    serve_all(on)
