"""Random combinations of model, dtype, adapter, data and options, from a seed."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch import nn

from oddsmith.functional import dequantize_nf4
from oddsmith.nn import Linear4bit

from .packed_models import FAMILIES, SIZES
from .word_tokenizer import word_tokenizer

__all__ = ["Combination", "combination", "make_model", "make_rows", "make_tokenizer"]

_WORDS = 58  # of a vocabulary of 61
_WINDOWS = (3, 5, 8, 200)

_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "num_experts": 4}
_LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
# Families with their options; those of `packed_models` have theirs.
_DECODERS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 5},
    "Qwen2": {"use_sliding_window": True, "max_window_layers": 1, "sliding_window": 5},
    "Qwen3": {"head_dim": 12},
    "Qwen3Moe": {"head_dim": 8, "decoder_sparse_step": 2, **_EXPERTS},
    "Mixtral": {"num_local_experts": 4, "sliding_window": 5},
    "Gemma": {"head_dim": 8},
    "Gemma3Text": {"head_dim": 8, "query_pre_attn_scalar": 12, "sliding_window": 5, **_LAYERS},
    "Phi3": {"sliding_window": 5},
    "Granite": {"logits_scaling": 3.0, "attention_multiplier": 0.3, "residual_multiplier": 0.7},
    "Cohere": {"logit_scale": 0.4},
    "Cohere2": {"logit_scale": 0.4, "sliding_window": 5, **_LAYERS},
    "Olmo2": {},
    "Olmo3": {"sliding_window": 5, **_LAYERS},
    "SmolLM3": {"no_rope_layers": [1, 0]},
    "Starcoder2": {"sliding_window": 5},
    "Glm4": {"head_dim": 8, "partial_rotary_factor": 0.5},
    "Exaone4": {"sliding_window": 5, **_LAYERS},
    "GPTNeoX": {},
    "OPT": {
        "dropout": 0.0,
        "ffn_dim": 40,
        "word_embed_proj_dim": 32,
        "max_position_embeddings": 128,
    },
    "Bloom": {},
    "Falcon": {"new_decoder_architecture": False, "multi_query": True, "alibi": True},
    "StableLm": {},
    "Lfm2": {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3},
    **{name: {} for name in FAMILIES},
}
_EXPERT_FAMILIES = {
    "Qwen3Moe", "Mixtral", "GptOss", "DeepseekV2", "DeepseekV3", "Glm4MoeLite", "Llama4Text", "Qwen2Moe", "Phimoe",
}  # fmt: skip
_EAGER = {"Bloom", "GptOss", "Gemma2"}  # what libtorch's function has not: softcaps, sinks, ALiBi
# Those whose configuration asks for the auxiliary loss, and whose model computes it.
_ROUTERS = {"Qwen3Moe", "Mixtral", "GptOss", "Qwen2Moe", "Phimoe"}
_TIED = {"Llama", "Qwen2", "Qwen3", "Mistral", "SmolLM3", "Granite", "Phi3", "Olmo2"}
# Linear layers of the usual names, whose width is a multiple of a block.
_FOUR_BIT = {"Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Granite", "Olmo2", "GPTNeoX"}

_LORA = {"r": 3, "lora_alpha": 5, "target_modules": "all-linear"}
_ADAPTERS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA": ("LoraConfig", _LORA),
    "DoRA": ("LoraConfig", {**_LORA, "use_dora": True}),
    "rsLoRA": ("LoraConfig", {**_LORA, "use_rslora": True, "bias": "all"}),
    "LoRA, whole head": ("LoraConfig", {**_LORA, "modules_to_save": ["head"]}),
    "LoRA, embeddings": ("LoraConfig", {**_LORA, "target_modules": ["embeddings"]}),
    "LoRA, some tokens": ("LoraConfig", {**_LORA, "trainable_token_indices": [3, 4, 9]}),
    "IA3": ("IA3Config", {"target_modules": "all-linear", "feedforward_modules": []}),
    "AdaLoRA": (
        "AdaLoraConfig",
        {"init_r": 4, "target_r": 2, "total_step": 50, "target_modules": "all-linear"},
    ),
    "VeRA": ("VeraConfig", {"r": 4, "target_modules": "all-linear"}),
    "LoHa": ("LoHaConfig", {"r": 2, "target_modules": "all-linear"}),
    "prompt tuning": ("PromptTuningConfig", {"num_virtual_tokens": 3}),
}

_DRAWN = ("lora_A", "lora_B", "lora_embedding_", "hada_", "prompt_encoder")


@dataclass(frozen=True)
class Combination:
    """
    What is trained, and how.

    Args:
        seed (`int`): Seed of the weights and the data.
        family (`str`): Of the model.
        config (`dict`): Options of its configuration.
        attention (`str`): Name of its attention function.
        dtype (`str`): Of its weights; `"autocast"` for `float32` with `bf16=True`.
        adapter (`str`, *optional*): Name of its adapter.
        four_bit (`str`, *optional*): Compute dtype of its 4-bit layers.
        rows (`int`): Number of pairs.
        implicit (`bool`): Whether the prompt is in both answers instead of a column.
        arguments (`dict`): Arguments of the run.
    """

    seed: int
    family: str
    config: dict[str, Any]
    attention: str
    dtype: str
    adapter: str | None
    four_bit: str | None
    rows: int
    implicit: bool
    arguments: dict[str, Any]

    @property
    def is_exact(self) -> bool:
        """Whether all of it is computed in `float32` or better."""
        return self.dtype in ("float32", "float64") and self.four_bit in (None, "float32")


def combination(seed: int) -> Combination:
    """
    A combination.

    Args:
        seed (`int`): The seed; the same one gives the same combination.
    """
    draw = random.Random(seed)
    pick, chance = draw.choice, draw.random
    family = pick(sorted(_DECODERS))
    config = dict(_DECODERS[family])
    if "sliding_window" in config or "sliding_window" in FAMILIES.get(family, {}):
        config["sliding_window"] = pick(_WINDOWS)
    if family in _TIED and chance() < 0.4:
        config["tie_word_embeddings"] = True
    if family in _ROUTERS and chance() < 0.5:
        config |= {"output_router_logits": True, "router_aux_loss_coef": 0.05}
    dtype = pick(["float32", "float32", "float64", "bfloat16", "bfloat16", "autocast"])
    if dtype == "float64" and family in _EXPERT_FAMILIES:
        dtype = "float32"  # the experts' grouped product knows no float64
    four_bit = adapter = None
    if family in _FOUR_BIT and dtype in ("float32", "bfloat16") and chance() < 0.4:
        four_bit = pick(["float32", "bfloat16"]) if dtype == "float32" else "bfloat16"
        adapter = pick(["LoRA", "LoRA", "DoRA", "rsLoRA", "LoRA, whole head"])
    elif chance() < 0.5:
        adapter = pick(sorted(_ADAPTERS))
    if family in _EXPERT_FAMILIES and adapter in ("VeRA", "DoRA"):
        adapter = "LoRA"  # peft refuses the others on experts
    # The eager function takes its softmax in float32.
    attention = "sdpa" if dtype == "float64" else pick(["sdpa", "sdpa", "eager"])
    if family in _EAGER:
        attention, dtype = "eager", "float32" if dtype == "float64" else dtype
    batch, accumulation = pick([1, 2, 3, 4, 5]), pick([1, 1, 2])
    arguments = _arguments(draw, batch, accumulation, adapter)
    rows = 2 * batch * accumulation + pick([0, 0, 1])
    return Combination(
        seed, family, config, attention, dtype, adapter, four_bit, rows, chance() < 0.2, arguments
    )


def _arguments(
    draw: random.Random, batch: int, accumulation: int, adapter: str | None
) -> dict[str, Any]:
    pick, chance = draw.choice, draw.random
    longest = pick([12, 21, 33, 64])
    found: dict[str, Any] = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "max_length": longest,
        "beta": pick([0.0, 0.1, 0.7, 2.0]),
        "nll_scope": pick(["full", "full", "completion"]),
        "odds_ratio_link": pick(["logsigmoid", "logsigmoid", "identity"]),
        "share_prompt": pick(["auto", True, False]),
        "max_grad_norm": pick([0.0, 1.0]),
    }
    if found["max_grad_norm"] == 0.0:
        found["learning_rate"] = 1e-4
    kind = pick(["none", "reentrant", "not reentrant"])
    found["gradient_checkpointing"] = kind != "none"
    if kind != "none":
        found["gradient_checkpointing_kwargs"] = {"use_reentrant": kind == "reentrant"}
    rare: list[dict[str, Any]] = [
        {"max_prompt_length": pick([3, 7, longest])},
        {"max_prompt_length": 5, "truncation_mode": "keep_start"},
        {"overlength": "drop"},
        {"max_tokens_per_batch": pick([70, 130])},
        {"logits_budget": pick([500, 20_000])},
        {"label_pad_token_id": -1},
        {"padding_value": 5},
        {"disable_dropout": False},
        {"beta_schedule": pick(["linear", "cosine"]), "beta_end": 0.4},
        {"train_sampling_strategy": "group_by_length"},
        {"weight_decay": 0.1},
        {"optim": "adamw_torch", "learning_rate": 1e-3, "adam_epsilon": 1e-6},
        {"optim": "adamw_8bit", "learning_rate": 1e-3, "adam_epsilon": 1e-6},
    ]
    if adapter is None:
        low_rank = {"optim_target_modules": "all-linear", "learning_rate": 1e-3}
        for name in ("galore_adamw", "galore_adamw_8bit", "apollo_adamw"):
            rare.append({"optim": name, "optim_args": "rank=4, update_proj_gap=1", **low_rank})
    for options in rare:
        if chance() < 0.09:
            found |= options
    # Other paths than the packed one, and a refusal.
    for options in (
        {"neftune_noise_alpha": 4.0},
        {"padding_free": False},
        {"label_smoothing_factor": 0.1},
    ):
        if chance() < 0.02:
            found |= options
    return found


# ---- What it is made of ----


def make_tokenizer() -> Any:
    """A tokenizer of words, with fewer tokens than the models."""
    return word_tokenizer(["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(_WORDS - 3))])


def make_rows(case: Combination) -> Dataset:
    """Pairs of all lengths; some answers begin alike, some prompts are long, some answers short."""
    draw = random.Random(case.seed + 1)

    def text(count: int) -> str:
        return "".join(f" w{draw.randrange(_WORDS - 3)}" for _ in range(count))

    rows = []
    for _ in range(case.rows):
        prompt = text(draw.choice([1, 2, 5, 9, 16]))
        start = text(draw.choice([0, 0, 2]))
        chosen, rejected = (start + text(draw.choice([1, 3, 4, 8, 15])) for _ in range(2))
        if chosen == rejected:
            rejected += " w1"
        if case.implicit:
            rows.append({"chosen": prompt + chosen, "rejected": prompt + rejected})
        else:
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    return Dataset.from_list(rows)


def make_model(case: Combination, true: bool = False) -> Any:
    """
    The model with its adapter.

    Args:
        case ([`Combination`]): What to make.
        true (`bool`, *optional*): The same weights in `float64`, or `float32` where the family knows
            no other, and no 4-bit layers.
    """
    torch.manual_seed(case.seed)
    narrow = case.family in _EXPERT_FAMILIES | _EAGER
    # The eager function takes its softmax in float32, in which float64's mask is infinite.
    model = _base(case, "sdpa" if true and not narrow else case.attention)
    if case.dtype == "bfloat16":
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16()
    if case.four_bit is not None:
        _quantize(model, getattr(torch, case.four_bit), dense=true)
    if true:
        model.float()  # so that the adapter has the same random weights
    if case.adapter is not None:
        model = _adapted(model, case)
    wide = true or case.dtype == "float64"
    return model.double() if wide and not narrow else model


def _base(case: Combination, attention: str) -> Any:
    options = {**SIZES, **FAMILIES.get(case.family, {}), **case.config}
    kind = case.family.removesuffix("Text")
    config = getattr(transformers, f"{case.family}Config")(**options, attn_implementation=attention)
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    tables = {id(each.weight) for each in model.modules() if isinstance(each, nn.Embedding)}
    for name, parameter in model.named_parameters():
        # Far from neutral, so that each layer changes the results.
        if parameter.dim() == 1 or "sinks" in name:
            nn.init.normal_(parameter, mean=float("norm" in name), std=0.2)
        else:
            std = 0.5 if id(parameter) in tables else max(parameter.shape[-2:]) ** -0.5
            nn.init.normal_(parameter, std=std)
    return model


def _quantize(model: nn.Module, compute_dtype: torch.dtype, dense: bool) -> None:
    for parent in list(model.modules()):
        for key, layer in list(parent.named_children()):
            if type(layer) is not nn.Linear or key in ("lm_head", "embed_out"):
                continue
            made: nn.Linear = Linear4bit.from_linear(
                layer, compute_dtype=compute_dtype, blocksize=32
            )
            if dense:
                values = dequantize_nf4(made.weight, made.weight.quant_state)
                made = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
                made.weight, made.bias = nn.Parameter(values), layer.bias
            setattr(parent, key, made)


def _adapted(model: Any, case: Combination) -> Any:
    import peft

    name, options = _ADAPTERS[str(case.adapter)]
    found: Callable[[], Any] = model.get_input_embeddings, model.get_output_embeddings
    ends = {
        key: next(n for n, module in model.named_modules() if module is get()).rpartition(".")[2]
        for key, get in zip(("embeddings", "head"), found)
    }
    options = dict(options)
    for key in ("target_modules", "modules_to_save"):
        if isinstance(options.get(key), list):
            options[key] = [ends[each] for each in options[key]]
    if "trainable_token_indices" in options:
        options["trainable_token_indices"] = {
            ends["embeddings"]: options["trainable_token_indices"]
        }
    model = peft.get_peft_model(model, getattr(peft, name)(task_type="CAUSAL_LM", **options))
    draw = torch.Generator().manual_seed(case.seed)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:  # not the neutral start
            noise = 0.2 * torch.randn(parameter.shape, generator=draw)
            # What is random in the dtype that it is made in is another value in another dtype.
            drawn = any(part in name for part in _DRAWN)
            parameter.data = (noise if drawn else parameter.data + noise).to(parameter.dtype)
    return model
