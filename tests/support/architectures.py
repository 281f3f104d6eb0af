"""A tiny model of every causal architecture of the installed transformers."""

from collections.abc import Iterator
from textwrap import shorten
from typing import Any

import torch
from transformers.models.auto import configuration_auto, modeling_auto

from oddsmith.integrations.small_model import reaches, small_model

# Options that switch on what is off by default: windows that half of the layers have.
_WINDOWED = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}

# What runs in CI: dense, windows by keyword and by mask, chunks and a temperature, learned
# positions, experts, hybrids, a class that drops keywords, one whose values have another width, softcaps,
# sinks, shared keys and ALiBi.
SAMPLE = (
    "LlamaConfig",
    "Qwen2Config",
    "Qwen2MoeConfig",
    "Llama4TextConfig",
    "GPT2Config",
    "Gemma3TextConfig",
    "OPTConfig",
    "Phi3Config",
    "Ministral3Config",
    "JambaConfig",
    "FalconH1Config",
    "RecurrentGemmaConfig",
    "Qwen3NextConfig",
    "Qwen3_5TextConfig",
    "FalconConfig",
    "StableLmConfig",
    "DeepseekV3Config",
    "MiniMaxConfig",
    "Lfm2Config",
    "OlmoConfig",
    "Gemma2Config",
    "Gemma3nTextConfig",
    "GptOssConfig",
    "Cohere2Config",
    "BloomConfig",
)


# Without these, a configuration makes no model, or one of such sharp attention that rounding decides.
_NEEDED: dict[str, dict[str, Any]] = {
    **{
        f"Granite{kind}Config": {"attention_multiplier": 1 / 128}
        for kind in ("", "Moe", "MoeHybrid", "MoeShared", "MoeSWA", "SWA")
    },
    "HunYuanDenseV1Config": {"head_dim": 128},
    "HunYuanMoEV1Config": {"head_dim": 128},
}
# Options of released checkpoints that a configuration has not by default: its layers are of other kinds.
_RELEASED: dict[str, dict[str, dict[str, Any]]] = {
    "Lfm2Config": {"convolutions": {"layer_types": ["conv", "full_attention"] * 16}},
    "Lfm2MoeConfig": {"convolutions": {"layer_types": ["conv", "full_attention"] * 16}},
    "BambaConfig": {"attention": {"attn_layer_indices": [9, 18, 27]}},
    "GraniteMoeHybridConfig": {
        "attention only": {"layer_types": ["full_attention"] * 32},
        "hybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
    },
    "FalconConfig": {"ALiBi": {"alibi": True}},
    "OPTConfig": {"350m": {"word_embed_proj_dim": 512, "do_layer_norm_before": False}},
    "GPTJConfig": {"no rotation": {"rotary_dim": None}},
}


def cases(name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    What an architecture is tried with: its name, and options of its configuration. The default first,
    then windows and other kinds of layers that it has not by default.
    """
    config, needed = classes(name)[0](), _NEEDED.get(name, {})
    decodes = getattr(config, "is_encoder_decoder", False)
    yield "default", needed or (_DECODER if decodes else _causal(config))
    known = config.to_dict()
    if "use_sliding_window" in known and not reaches(config):
        yield "windows", {key: value for key, value in _WINDOWED.items() if key in known}
    for case, options in _RELEASED.get(name, {}).items():
        yield case, {**needed, **options}


# An encoder-decoder's decoder is a model of its own.
_DECODER: dict[str, Any] = {"is_encoder_decoder": False, "is_decoder": True}


def _causal(config: Any) -> dict[str, Any]:
    """Options with which a model that is an encoder by default is a decoder."""
    encoder = vars(config).get("is_decoder") is False
    return {"is_decoder": True} if encoder else {}


def core(name: str, options: dict[str, Any]) -> Any:
    """
    A model of a configuration with some options, on the meta device.

    Raises:
        LookupError: If it cannot be built, with the reason.
    """
    kind, model = classes(name)
    try:
        config = kind(**options)
        if getattr(config, "sub_configs", {}).get("text_config") is model.config_class:
            config = config.get_text_config()  # as AutoModelForCausalLM does
        with torch.device("meta"):
            return model(config)
    except Exception as bad:  # whatever the code of a model may raise
        raise LookupError(shorten(f"{type(bad).__name__}: {bad}", 200)) from bad


def configurations() -> dict[str, str]:
    """Name of the configuration of each architecture, with its type. Nothing is imported for it."""
    types: Any = vars(configuration_auto)["CONFIG_MAPPING_NAMES"]
    models = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return {name: kind for kind, name in types.items() if kind in models}


def classes(name: str) -> tuple[Any, Any]:
    """The classes of a configuration and its model."""
    config: Any = configuration_auto.CONFIG_MAPPING[configurations()[name]]
    kind: Any = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING[config]
    return config, kind[0] if isinstance(kind, (tuple, list)) else kind


def tiny_models(name: str) -> Iterator[tuple[str, Any]]:
    """
    Tiny models of an architecture, with random weights in `float32`: by default and with windows, of
    seven tokens.

    Raises:
        LookupError: If its default configuration makes no small model of a decoder.
    """
    kind, model = classes(name)
    yield "default", _tiny(name, kind, model)
    known = kind().to_dict()
    if "use_sliding_window" in known or "sliding_window" in known:
        options = {key: value for key, value in _WINDOWED.items() if key in known}
        yield "windows", _tiny(name, kind, model, **options)


def _tiny(name: str, kind: Any, model: Any, **options: Any) -> Any:
    try:
        config = kind(**options)
        if not getattr(config, "is_encoder_decoder", False):
            with torch.device("meta"):
                core = model(config)
            return small_model(core, reach=7, spread=5)
    except Exception as bad:  # many cannot be made of their defaults
        raise LookupError(f"{name}: {type(bad).__name__}: {bad}") from bad
    raise LookupError(f"{name} is an encoder-decoder")
