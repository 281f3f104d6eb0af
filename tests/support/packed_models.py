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


def tiny(family, dtype=torch.float32, attention=None, **options):
    """A model with random weights; `attention` is set as if the package for it were installed."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **options})
    kind = "Llama4ForCausalLM" if family == "Llama4Text" else f"{family}ForCausalLM"
    model = getattr(transformers, kind)(config).to(dtype)
    for name, parameter in model.named_parameters():
        # Far from zero, so that none is without effect.
        if parameter.dim() == 1 or "sinks" in name:
            torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.3)
    if attention is not None:
        model.config._attn_implementation = attention
    return model


def pairs_of(lengths=LENGTHS, seed=1):
    """Rows of `(prompt, chosen, rejected)` lengths."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(count):
        return torch.randint(3, 61, (count,), generator=draw).tolist()

    pairs = []
    for prompt, *answers in lengths:
        shared, pair = tokens(prompt), {}
        for side, count in zip(("chosen", "rejected"), answers, strict=True):
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
