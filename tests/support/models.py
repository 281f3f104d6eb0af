"""Small models of many families, with random weights: nothing is downloaded."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

# Widths that are not powers of two, heads that share keys, and weights large enough that the
# softmax is far from uniform.
_DECODER = {
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.12,
}


def _config(kind: type, vocab_size: int, tokens: dict[str, int | None], **extra: Any) -> Any:
    return kind(vocab_size=vocab_size, **{**_DECODER, **tokens, **extra})


def _decoder(model: type, config: type, **extra: Any) -> Callable[..., Any]:
    return lambda vocab_size, tokens: model(_config(config, vocab_size, tokens, **extra))


def _gpt_neox(vocab_size: int, tokens: dict[str, int | None]) -> GPTNeoXForCausalLM:
    extra = {"hidden_dropout": 0.0, "attention_dropout": 0.0}
    config = _config(GPTNeoXConfig, vocab_size, tokens, **extra)
    return GPTNeoXForCausalLM(config)


def _t5(vocab_size: int, tokens: dict[str, int | None]) -> T5ForConditionalGeneration:
    config = T5Config(
        vocab_size=vocab_size,
        d_model=48,
        d_kv=12,
        d_ff=88,
        num_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        decoder_start_token_id=0,
        pad_token_id=tokens["pad_token_id"],
        eos_token_id=tokens["eos_token_id"],
    )
    return T5ForConditionalGeneration(config)


_MIXTURE = {
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "output_router_logits": True,
    "router_aux_loss_coef": 0.05,
}
_CAPS = {
    "final_logit_softcapping": 2.5,  # low enough to have an effect
    "attn_logit_softcapping": 20.0,
    "head_dim": 12,
    "query_pre_attn_scalar": 12,
    "sliding_window": 32,
    "attn_implementation": "eager",
}

# Name -> a function of the vocabulary's size and the special tokens' ids.
MODELS: dict[str, Callable[[int, dict[str, int | None]], Any]] = {
    "mistral": _decoder(MistralForCausalLM, MistralConfig),
    "llama": _decoder(LlamaForCausalLM, LlamaConfig),
    "qwen2": _decoder(Qwen2ForCausalLM, Qwen2Config),
    "qwen3_tied": _decoder(Qwen3ForCausalLM, Qwen3Config, tie_word_embeddings=True, head_dim=16),
    "gemma2_softcap": _decoder(Gemma2ForCausalLM, Gemma2Config, **_CAPS),
    "gpt_neox": _gpt_neox,
    "phi3": _decoder(Phi3ForCausalLM, Phi3Config),
    "mixtral": _decoder(MixtralForCausalLM, MixtralConfig, **_MIXTURE),
    "cohere_scale": _decoder(CohereForCausalLM, CohereConfig, logit_scale=0.4),
    "granite_scale": _decoder(GraniteForCausalLM, GraniteConfig, logits_scaling=3.0),
    "t5": _t5,
}


def make_model(name: str, tokenizer: Any, seed: int = 11) -> Any:
    """
    A small model for a tokenizer.

    Args:
        name (`str`): One of [`MODELS`].
        tokenizer (`PreTrainedTokenizerBase`): Gives the vocabulary and the special tokens.
        seed (`int`, *optional*): Seed of the weights.
    """
    pad = tokenizer.pad_token_id
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.eos_token_id if pad is None else pad,
    }
    torch.manual_seed(seed)
    return MODELS[name](len(tokenizer), tokens).float()


def checkpointed(model: Any, reentrant: bool = False) -> Any:
    """`model` in training mode with gradient checkpointing, by the name of any transformers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model.train()
