"""Tiny models, pairs of tokens, and both as packed rows and padded batches."""

import torch
import transformers

from oddsmith.integrations import model_attention
from oddsmith.packing.batch import PackedBatch

SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Prompts of one token and of nine tenths of the row; an empty answer.
LENGTHS = ((1, 8, 5), (9, 1, 1), (6, 0, 3), (4, 9, 4))


_EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
}
_TWO_TYPES = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
# What attention each of them needs beyond the usual. Windows and chunks are shorter than the prompts.
FAMILIES = {
    # A softcap, a scale that is not the width's, and windows in every other layer.
    "Gemma2": {"head_dim": 8, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 20}
    | _TWO_TYPES,
    # Sinks.
    "GptOss": {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2} | _TWO_TYPES,
    # Values that are narrower than keys.
    "DeepseekV2": {"n_routed_experts": 4, "n_group": 2, "topk_group": 2, "head_dim": 4}
    | {"first_k_dense_replace": 1, **_EXPERTS, **_LATENT},
    "DeepseekV3": {"n_routed_experts": 4, "n_group": 2, "topk_group": 2, "head_dim": 4}
    | {"first_k_dense_replace": 1, **_EXPERTS, **_LATENT},
    "Glm4MoeLite": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "head_dim": 4}
    | {**_EXPERTS, **_LATENT},
    "MiniCPM3": _LATENT,
    # Chunks.
    "Llama4Text": {"head_dim": 8, "num_local_experts": 2, "intermediate_size_mlp": 40}
    | {"attention_chunk_size": 4, "no_rope_layers": [1, 0], "attn_temperature_tuning": False}
    | {"layer_types": ["chunked_attention", "full_attention"]},
    # Windows that are told by the mask alone.
    "Qwen2Moe": {"num_experts": 4, "shared_expert_intermediate_size": 16, **_EXPERTS}
    | {"use_sliding_window": True, **_TWO_TYPES},
    "Phimoe": {"num_local_experts": 4, "sliding_window": 4},
    # Attention that is given no keywords.
    "StableLm": {},
}


def tiny(family, dtype=torch.float32, attention=None, **options):
    """A model with random weights; `attention` is set as if the package for it were installed."""
    torch.manual_seed(0)
    options = {**SIZES, **FAMILIES.get(family, {}), **options}
    config = getattr(transformers, f"{family}Config")(**options)
    kind = "Llama4ForCausalLM" if family == "Llama4Text" else f"{family}ForCausalLM"
    model = getattr(transformers, kind)(config).to(dtype)
    for name, parameter in model.named_parameters():
        # Far from zero, so that none is without effect.
        if parameter.dim() == 1 or "sinks" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    if attention is not None:
        model.config._attn_implementation = attention
    return model


def pairs_of(lengths=LENGTHS, prompts="same", seed=1):
    """Rows of `(prompt, chosen, rejected)` lengths; the prompts differ in nothing, or at the end."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(count):
        return torch.randint(3, 61, (count,), generator=draw).tolist()

    pairs = []
    for prompt, *answers in lengths:
        shared, pair = tokens(prompt), {}
        for side, count in zip(("chosen", "rejected"), answers, strict=True):
            if side == "rejected" and prompts == "differ":
                shared = [*shared[:-1], 2]
            answer = tokens(count)
            pair[f"{side}_input_ids"] = shared + answer
            pair[f"{side}_labels"] = [-100] * prompt + answer
        pairs.append(pair)
    return pairs


def padded(pairs):
    """Ids and mask of the padded batch, `(2B, T)`, and where the rows of a packed one are in it."""
    sides = [pair[f"{side}_input_ids"] for side in ("chosen", "rejected") for pair in pairs]
    ids = torch.zeros(len(sides), max(map(len, sides)), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, side in enumerate(sides):
        ids[row, : len(side)], mask[row, : len(side)] = torch.tensor(side), 1
    order = [s * len(pairs) + p for p in range(len(pairs)) for s in range(2)]
    rows = torch.cat([row * ids.shape[1] + torch.arange(len(sides[row]) - 1) for row in order])
    return ids, mask, rows


def both(model, pairs, share=True, **options):
    """
    Logits and gradients of the padded batch, and of the packed row: two times `(logits, dict)`.

    Args:
        options: More arguments of the model, and `reference`, the name of the attention that
            computes the padded batch; by default the model's own.
    """
    reference = options.pop("reference", None)
    ids, mask, where = padded(pairs)
    batch = PackedBatch.build(pairs, share)
    weights = torch.randn(len(where), 61, generator=torch.Generator().manual_seed(3))
    own = model.config._attn_implementation

    def run(inputs, where):
        model.zero_grad()
        logits = model(**inputs, use_cache=False, **options).logits.flatten(0, 1)[where]
        (logits * weights.to(logits)).sum().backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return logits.detach(), found

    packed = run(model_attention.packed_inputs(batch), batch.rows)
    model.config._attn_implementation = reference or own
    try:
        return run({"input_ids": ids, "attention_mask": mask}, where), packed
    finally:
        model.config._attn_implementation = own
