"""A small model of another one's class and configuration, to try things out on.

It has random weights in `float32`, few layers of each kind, and narrow ones. What a model's code
does to a batch shows there as in the model itself, but neither rounding, quantisation, adapters nor
where the weights are can blur it, and the model is not touched.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeGuard

import torch
from torch import nn
from transformers.utils import logging

from .attention_names import (
    attention_name,
    configs_of,
    module_configs,
    name_attention,
    plain_attention,
    text_config,
)
from .zero3 import outside_zero3

__all__ = [
    "REACH",
    "SPREAD",
    "NotSmall",
    "class_of",
    "layers_of",
    "longest_position",
    "reaches",
    "small_model",
    "spreads",
]

# Names, or parts of them, of how far a layer of a small model sees. Scaled below a trial's length.
_REACHES = (
    "sliding_window",
    "window_size",
    "attention_window",
    "local_window",
    "attention_chunk_size",
)
_REACHES += ("chunk_length", "chunk_size")
#: How far that is.
REACH = 4
# Tokens of a row after which attention changes its temperature, or selects keys.
_SPREADS = ("floor_scale", "log_scaling_n_floor", "original_max_position_embeddings")
_SPREADS += ("index_topk", "index_topk_blocks", "index_block_size")
#: The same for a small model.
SPREAD = 3
# Chunks of a computation, not of the sequence.
_COMPUTING = ("feed_forward", "mamba", "lm_head", "conv", "layers", "pattern")

# The number of last layers that attend to the keys of earlier ones.
_SHARED = "num_kv_shared_layers"

_VOCABULARY = 96
_EXPERTS = 4
_RANK = 16
_INNER = 48
# With more parameters than this it would take seconds and gigabytes.
_MOST = 100_000_000

_NARROW = {
    "intermediate_size": _INNER,
    "moe_intermediate_size": _INNER,
    "shared_expert_intermediate_size": _INNER,
    "moe_shared_expert_intermediate_size": _INNER,
    "shared_intermediate_size": _INNER,
    "intermediate_size_mlp": _INNER,
    "ffn_dim": _INNER,
    "ffn_hidden_size": _INNER,
    "expert_ffn_hidden_size": _INNER,
    "n_inner": _INNER,
    "q_lora_rank": _RANK,
    "kv_lora_rank": _RANK,
    # Without their kernels, state-space layers take memory for the states of every pair in a chunk.
    "mamba_d_state": _RANK,
    "ssm_state_size": _RANK,
    "mamba_chunk_size": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
# Number and width of the heads of state-space layers, which are as wide together as the model is or
# some multiple of it.
_STATE_HEADS = (("mamba_n_heads", "mamba_d_head"), ("n_mamba_heads", "mamba_headdim"))


class NotSmall(Exception):
    """There is no small model of a class and configuration. The message is the reason."""


def reaches(config: Any) -> list[int]:
    """How far a model's windowed and chunked layers see, in tokens; empty if all see everything."""
    found = []
    for each in configs_of(config):
        for name, value in vars(each).items():
            if _is_reach(name) and _is_count(value):
                found.append(value)
    return found


def spreads(config: Any) -> list[int]:
    """After how many tokens of a row a model does something else; empty if it never does."""
    found = []
    for each in configs_of(config):
        places = [vars(each)]
        while places:
            place = places.pop()
            for name, value in place.items():
                if name in _SPREADS and _is_count(value):
                    found.append(value)
                elif name.startswith("rope_") and isinstance(value, dict):
                    places += [value, *(x for x in value.values() if isinstance(x, dict))]
    return found


def small_model(
    core: Any, reach: int = REACH, spread: int = SPREAD, deep: bool = False
) -> nn.Module:
    """
    A small model of the same class and configuration.

    Args:
        core (`PreTrainedModel`): The model, without wrappers; its weights are not read.
        reach (`int`, *optional*): Tokens that windows and chunks have at most.
        spread (`int`, *optional*): Positions after which attention changes, at most.
        deep (`bool`, *optional*): Keep the number of layers.

    Raises:
        [`NotSmall`]: If the class cannot be built in this way, with the reason.
    """
    try:
        config = _small_config(core, reach, spread, deep)
        with _apart(), torch.device("meta"):
            size = sum(p.numel() for p in _build(core, config).parameters())
        if size > _MOST:
            raise NotSmall(f"its smallest form has {size:,} parameters")
        with _apart(), torch.device("cpu"):
            torch.manual_seed(0)
            model = _build(core, config).float()
            _draw(model)
    except NotSmall:
        raise
    except Exception as error:  # whatever the code of a model may raise
        raise NotSmall(f"{type(error).__name__}: {error}".splitlines()[0]) from error
    return model.eval()


def class_of(module: nn.Module) -> type:
    """The class of a module before FSDP2 or tensor parallelism has made another one of it."""
    kinds = type(module).__mro__
    return next(kind for kind in kinds if not kind.__module__.startswith("torch.distributed."))


def _build(core: Any, config: Any) -> nn.Module:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        # Other attention than this may need a package, or a GPU.
        name_attention([config], plain_attention(core))
        model = class_of(core)(copy.deepcopy(config))
    finally:
        torch.set_default_dtype(before)
    name_attention(module_configs(model), attention_name(core))
    return model


@contextmanager
def _apart() -> Iterator[None]:
    """A context that nobody sees: without messages, random numbers of its own, whole weights."""
    before = logging.get_verbosity()
    logging.set_verbosity(50)  # CRITICAL
    try:
        with torch.random.fork_rng(devices=[]), outside_zero3():
            yield
    finally:
        logging.set_verbosity(before)


@torch.no_grad()
def _draw(model: nn.Module) -> None:
    """
    Weights with which each layer changes the residual stream as much as the embedding does, so that
    a wrong attention is seen in the logits.
    """
    tables = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.ndim < 2:
            continue
        # Which dimension is the input differs; the widths are similar.
        fan = max(parameter.shape[-2:])
        parameter.normal_(0.0, 0.5 if id(parameter) in tables else 1.5 / fan**0.5)


# ---- Configuration ----


def _small_config(core: Any, reach: int, spread: int, deep: bool) -> Any:
    config = copy.deepcopy(core.config)
    for name in ("quantization_config", "_pre_quantization_dtype", "_is_quantized"):
        vars(config).pop(name, None)
    text = text_config(config)
    kept = None if deep else _kept(core)
    for each in configs_of(config):
        _fewer_layers(each, kept if each is text else [0, 1])
        _narrower(each)
        _scale(each, reach, spread)
    return config


def _number(config: Any, name: str) -> int | None:
    try:
        value = getattr(config, name, None)
    except Exception:  # one for each layer
        return None
    return value if _is_count(value) else None


def longest_position(config: Any) -> int | None:
    """How many positions a model has at most, if its configuration says so."""
    return _number(text_config(config), "max_position_embeddings")


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def layers_of(core: Any) -> list[nn.ModuleList]:
    """The lists of layers of a model's text part."""
    text = text_config(core.config)
    count = _number(text, "num_hidden_layers")
    decoder = core.get_decoder() if hasattr(core, "get_decoder") else None
    for part in (decoder or core, core):  # towers for images and sound may have as many
        lists = [m for m in part.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
        if lists:
            return lists
    return []


def _kept(core: Any) -> list[int] | None:
    """
    Which layers a small model has: from the first one on, as many as are of every kind that there is.
    Layers that attend to keys of earlier ones come last, and are counted apart.
    """
    first: dict[Any, int] = {}
    for each in layers_of(core):
        for index, layer in enumerate(each):
            first.setdefault((id(each), _kind(layer)), index)
    if not first:  # nothing is known about the layers
        return None
    text = text_config(core.config)
    count, shared = (_number(text, name) or 0 for name in ("num_hidden_layers", _SHARED))
    own = count - shared
    depth = max(2, 1 + max((index for index in first.values() if index < own), default=0))
    behind = max((1 + index - own for index in first.values() if index >= own), default=0)
    return [*range(min(depth, own)), *range(own, own + behind)]


_KINDS = ("window", "chunk", "rope", "slid", "type", "local", "causal", "global", "moe", "sparse")


def _kind(layer: nn.Module) -> tuple[Any, ...]:
    return tuple(
        (name, type(module).__qualname__)
        + tuple(
            (key, value)
            for key, value in sorted(vars(module).items())
            if isinstance(value, (bool, int, str, type(None)))
            and key != "training"
            and any(part in key for part in _KINDS)
        )
        # Experts in a list are one kind of layer, however many there are.
        for name, module in layer.named_modules()
        if not name.rpartition(".")[2].isdigit()
    )


def _fewer_layers(config: Any, kept: list[int] | None) -> None:
    count = _number(config, "num_hidden_layers")
    if kept is None or count is None or len(kept) >= count:
        return
    shared = _number(config, _SHARED)
    if shared:
        setattr(config, _SHARED, sum(index >= count - shared for index in kept))
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and len(value) == count and not name.startswith("_"):
            setattr(config, name, type(value)(value[index] for index in kept))
    depth = len(kept)
    config.num_hidden_layers = depth
    # Numbers of layers that have some property are counted from the first.
    for name, value in list(vars(config).items()):
        if isinstance(value, (list, tuple)) and name.endswith("layers") and value:
            if all(isinstance(x, int) and not isinstance(x, bool) for x in value):
                if max(value) >= depth and len(value) != depth:
                    setattr(config, name, [kept.index(x) for x in value if x in kept])


def _narrower(config: Any) -> None:
    hidden, heads = (_number(config, name) for name in ("hidden_size", "num_attention_heads"))
    if hidden is not None and heads is not None:
        groups = _number(config, "num_key_value_heads")
        explicit = _number(config, "head_dim")
        # Rotations are described for this width, so it stays.
        width = explicit or hidden // heads
        few = min(groups or heads, 2)
        each = 1 if groups is None else min(max(heads // groups, 1), 2)
        many = few * each
        new = many * width
        if many <= heads and new < hidden:
            for name, value in list(vars(config).items()):
                if value == hidden and isinstance(value, int) and "position" not in name:
                    setattr(config, name, new)
            for name, size in _STATE_HEADS:
                inner = (_number(config, name) or 0) * (_number(config, size) or 0)
                if (
                    inner
                    and inner % hidden == 0
                    and inner // hidden * new % vars(config)[size] == 0
                ):
                    setattr(config, name, inner // hidden * new // vars(config)[size])
            config.hidden_size = new
            config.num_attention_heads = many
            if groups is not None:
                config.num_key_value_heads = few
    for name, most in _NARROW.items():
        value = vars(config).get(name)
        if isinstance(value, (list, tuple)):  # one for each layer
            setattr(config, name, type(value)(min(x, most) for x in value))
        elif (_number(config, name) or 0) > most:
            setattr(config, name, most)
    _fewer_experts(config)
    vocabulary = _number(config, "vocab_size")
    if vocabulary is not None and vocabulary > _VOCABULARY:
        for name, value in list(vars(config).items()):
            if isinstance(value, int) and value >= _VOCABULARY:
                if name.startswith("vocab_size"):
                    setattr(config, name, _VOCABULARY)
                elif name in ("pad_token_id", "bos_token_id", "eos_token_id"):
                    setattr(config, name, _VOCABULARY - 1)
        config.vocab_size = _VOCABULARY
        pad = getattr(config, "pad_token_id", None)
        if isinstance(pad, int) and not 0 <= pad < _VOCABULARY:
            config.pad_token_id = _VOCABULARY - 1


def _fewer_experts(config: Any) -> None:
    chosen = 1
    for name in (
        "num_experts_per_tok",
        "moe_topk",
        "moe_k",
        "top_k_experts",
        "moe_num_active_primary_experts",
    ):
        chosen = max(chosen, _number(config, name) or 0)
    for name in ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"):
        count = _number(config, name)
        if (
            count is None
            or (_number(config, "n_group") or 1) > 1
            or (_number(config, "num_expert_group") or 1) > 1
        ):
            continue
        fewer = max(_EXPERTS, chosen + 1)
        if count > fewer:
            setattr(config, name, fewer)


def _is_reach(name: str) -> bool:
    known = any(part in name for part in _REACHES)
    return known and not any(part in name for part in _COMPUTING)


def _scale(config: Any, reach: int, spread: int) -> None:
    for name, value in list(vars(config).items()):
        number = _is_count(value)
        if number and _is_reach(name):
            setattr(config, name, min(value, reach))
        elif number and name in _SPREADS:
            setattr(config, name, min(value, spread))
        elif name.startswith("rope_") and isinstance(value, dict):
            setattr(config, name, _scaled(value, spread))


def _scaled(rope: dict[str, Any], spread: int) -> dict[str, Any]:
    def scaled(name: str, value: Any) -> Any:
        if isinstance(value, dict):  # one for each kind of layer
            return _scaled(value, spread)
        return min(value, spread) if name in _SPREADS and isinstance(value, int) else value

    return {name: scaled(name, value) for name, value in rope.items()}
