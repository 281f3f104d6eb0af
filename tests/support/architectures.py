"""A tiny model of every causal architecture of the installed transformers."""

from collections.abc import Iterator
from typing import Any

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from oddsmith.integrations.small_model import small_model

# Options that switch on what is off by default: windows that half of the layers have.
_WINDOWED = {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 1}

# What runs in CI: dense, windows by keyword and by mask, chunks and a temperature, learned
# positions, experts, hybrids, a class that drops keywords, and one whose values have another width.
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
)


def configurations() -> dict[str, tuple[type, type]]:
    """Name of each configuration, with its class and the model's."""
    found = {}
    for config in MODEL_FOR_CAUSAL_LM_MAPPING:
        kind: Any = MODEL_FOR_CAUSAL_LM_MAPPING[config]
        found[config.__name__] = (config, kind[0] if isinstance(kind, (tuple, list)) else kind)
    return found


def tiny_models(name: str) -> Iterator[tuple[str, Any]]:
    """
    Tiny models of an architecture, with random weights in `float32`: by default and with windows, of
    seven tokens.

    Raises:
        LookupError: If its default configuration makes no small model of a decoder.
    """
    kind, model = configurations()[name]
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
