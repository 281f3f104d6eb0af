"""A configuration of every method of the installed peft that a small causal model can have."""

from __future__ import annotations

import dataclasses
import importlib.util
from typing import Any

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

__all__ = ["METHODS", "OWN_TASKS", "UNAVAILABLE", "method_config"]

# Methods that need ids of tasks, or a second model, in each call: none can be trained here.
OWN_TASKS = frozenset({"MULTITASK_PROMPT_TUNING", "POLY", "XLORA"})

# Methods whose own code cannot run here, and why.
UNAVAILABLE = {
    "ADAMSS": None if importlib.util.find_spec("sklearn") else "needs scikit-learn",
}

_OPTIONS: dict[str, dict[str, Any]] = {
    "ADALORA": {"init_r": 6, "target_r": 4, "total_step": 100, "r": None},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 1, "target_modules": None},
    "C3A": {"block_size": 8},
    "CPT": {
        "cpt_token_ids": [3, 5, 4],
        "cpt_mask": [1, 1, 1],
        "cpt_tokens_type_mask": [1, 2, 3],
    },
    "FOURIERFT": {"n_frequency": 20},
    "IA3": {"feedforward_modules": []},
    "OFT": {"r": None, "oft_block_size": 8},
    "ROAD": {"group_size": 8},
    "SHADOW": {"target_modules": None},
    "TRAINABLE_TOKENS": {"token_indices": [3, 4, 5], "target_modules": ["embed_tokens"]},
    "VBLORA": {"vector_length": 8, "num_vectors": 16, "topk": 2},
    "WAVEFT": {"n_frequency": 20},
}


def method_config(name: str, **changed: Any) -> PeftConfig:
    """A small configuration of a method, for Llama-like models; `changed` replaces its options."""
    kind = next(kind for key, kind in PEFT_TYPE_TO_CONFIG_MAPPING.items() if key.value == name)
    known = {field.name for field in dataclasses.fields(kind)}
    options = {
        "task_type": "CAUSAL_LM",
        "target_modules": ["q_proj", "v_proj"],
        "r": 4,
        "rank": 4,
        "num_virtual_tokens": 3,
        **_OPTIONS.get(name, {}),
        **changed,
    }
    return kind(**{key: each for key, each in options.items() if key in known and each is not None})


METHODS = sorted(kind.value for kind in PEFT_TYPE_TO_CONFIG_MAPPING)
