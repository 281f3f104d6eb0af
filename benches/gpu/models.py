"""Models of real shapes with random weights, and pairs of real lengths, for `python -m benches.gpu`."""

from __future__ import annotations

import copy
import random
import statistics
from dataclasses import dataclass

import torch

# Tokens at 0, 5, .. 100 % of the pairs. The ranks of a pair's two answers correlate by 0.77.
# fmt: off
QUANTILES = {
    "prompt": [11, 16, 17, 19, 20, 22, 24, 25, 27, 29, 31, 35, 37, 40, 45, 52, 60, 69, 85, 139, 565],
    "chosen": [2, 49, 83, 122, 171, 232, 268, 309, 340, 370, 397, 418, 446, 477, 505, 533, 568, 613,
               666, 771, 2019],
    "rejected": [2, 36, 72, 99, 131, 171, 210, 245, 281, 317, 346, 374, 396, 426, 455, 487, 514, 551,
                 609, 701, 1840],
}
# fmt: on
CORRELATION = 0.78


@dataclass(frozen=True)
class Shape:
    """A model by its sizes."""

    kind: str
    vocab: int
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool = False
    nf4: bool = True


SHAPES = {
    "mistral-7b": Shape("mistral", 32_000, 4096, 14_336, 32, 32, 8),
    "qwen2.5-0.5b": Shape("qwen2", 151_936, 896, 4864, 24, 14, 2, tied=True, nf4=False),
    "llama-3-8b": Shape("llama", 128_256, 4096, 14_336, 32, 32, 8),
}
TINY = {
    "mistral-tiny": Shape("mistral", 512, 64, 128, 2, 4, 2),
    "qwen2.5-tiny": Shape("qwen2", 512, 64, 128, 2, 4, 2, tied=True, nf4=False),
}


def quantile(of: str, share: float) -> int:
    values = QUANTILES[of]
    place = share * (len(values) - 1)
    low = min(int(place), len(values) - 2)
    return max(1, round(values[low] + (place - low) * (values[low + 1] - values[low])))


def draw_lengths(count: int, scale: float, seed: int = 5) -> list[tuple[int, int, int]]:
    """Tokens of prompt, chosen and rejected answer."""
    draw, normal = random.Random(seed), statistics.NormalDist()
    found = []
    for _ in range(count):
        chosen = draw.gauss(0, 1)
        rejected = CORRELATION * chosen + (1 - CORRELATION**2) ** 0.5 * draw.gauss(0, 1)
        shares = draw.random(), normal.cdf(chosen), normal.cdf(rejected)
        sizes = (quantile(of, share) for of, share in zip(QUANTILES, shares))
        found.append(tuple(max(1, round(size * scale)) for size in sizes))
    return found


def word_tokenizer(vocab: int):
    """Word i is the text `wi`: texts have the lengths that were drawn."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<s>", "</s>"]
    words = {word: i for i, word in enumerate([*special, *(f"w{i}" for i in range(3, vocab))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def rows_of(lengths: list[tuple[int, int, int]], vocab: int) -> list[dict]:
    draw = random.Random(7)

    def text(count: int) -> str:
        return " ".join(f"w{draw.randrange(3, vocab)}" for _ in range(count))

    return [
        {"prompt": text(p), "chosen": f" {text(c)}", "rejected": f" {text(r)}"}
        for p, c, r in lengths
    ]


def build(shape: Shape, device: torch.device):
    """A model with random weights, on the device; projections in NF4 with double quantisation."""
    from transformers import AutoConfig, AutoModelForCausalLM

    from oddsmith import use_for_bitsandbytes
    from oddsmith.nn import Linear4bit

    config = AutoConfig.for_model(
        shape.kind,
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.hidden // shape.heads,
        tie_word_embeddings=shape.tied,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        use_cache=False,
    )
    compute = torch.bfloat16 if device.type == "cuda" else torch.float32
    with torch.device(device):
        dtype = compute if shape.nf4 else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    if shape.nf4:
        use_for_bitsandbytes()
        for name, layer in list(model.model.named_modules()):
            if isinstance(layer, torch.nn.Linear):
                model.model.set_submodule(
                    name, Linear4bit.from_linear(layer, compute_dtype=compute)
                )
        model.is_loaded_in_4bit = True
    return model


def twin(model):
    """Modules of its own around the same parameters."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared)


def with_their_layers(model):
    """bitsandbytes' layers around the same codes."""
    import bitsandbytes as bnb

    from oddsmith.nn import Linear4bit

    for name, layer in list(model.named_modules()):
        if isinstance(layer, Linear4bit):
            size, compute = (layer.in_features, layer.out_features), layer.compute_dtype
            bias, device = layer.bias is not None, layer.weight.device
            theirs = bnb.nn.Linear4bit(
                *size, bias=bias, compute_dtype=compute, quant_type="nf4", device="meta"
            )
            theirs.weight = bnb.nn.Params4bit.from_prequantized(
                layer.weight.data,
                layer.quant_state.as_dict(packed=True),
                device=device,
                module=theirs,
            )
            theirs.bias = layer.bias
            model.set_submodule(name, theirs)
    return model
