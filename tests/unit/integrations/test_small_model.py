"""Small models of the same class and configuration."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from oddsmith.integrations.small_model import (
    NotSmall,
    layers_of,
    reaches,
    small_model,
    spreads,
)


def on_meta(kind, config):
    with torch.device("meta"):
        return kind(config)


def test_of_a_large_model_without_weights():
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        pad_token_id=128_001,
        rope_parameters=rope,
    )
    core = on_meta(LlamaForCausalLM, config)
    before, state = config.to_dict(), torch.get_rng_state()
    small = small_model(core)
    assert config.to_dict() == before and torch.equal(torch.get_rng_state(), state)
    assert type(small) is LlamaForCausalLM and not small.training
    assert sum(p.numel() for p in small.parameters()) < 3_000_000
    assert {p.dtype for p in small.parameters()} == {torch.float32}
    # Two layers, heads of the same width, groups of more than one head.
    new = small.config
    assert (new.num_hidden_layers, new.head_dim) == (2, 128)
    assert (new.num_attention_heads, new.num_key_value_heads) == (4, 2)
    assert new.pad_token_id < new.vocab_size < 128
    logits = small(torch.arange(3, 12)[None]).logits
    assert torch.isfinite(logits).all() and logits.std() > 0.1


def test_every_kind_of_layer_is_there():
    def kinds(core):
        return {
            (type(m).__name__, m.is_sliding) for m in core.modules() if hasattr(m, "is_sliding")
        }

    core = on_meta(Gemma3ForCausalLM, Gemma3TextConfig(num_hidden_layers=26))
    small = small_model(core)
    assert kinds(small) == kinds(core) and len(kinds(core)) == 2
    assert small.config.num_hidden_layers == 6  # five with a window, and one without
    assert len(layers_of(core)[0]) == 26
    core = on_meta(DeepseekV3ForCausalLM, DeepseekV3Config())
    assert small_model(core).config.num_hidden_layers == 4  # three dense ones first


def test_layers_that_attend_to_keys_of_earlier_ones():
    core = on_meta(Gemma3nForCausalLM, Gemma3nTextConfig())
    assert (core.config.num_hidden_layers, core.config.num_kv_shared_layers) == (35, 15)
    config = small_model(core).config
    assert (config.num_hidden_layers, config.num_kv_shared_layers) == (10, 5)
    kinds = ["sliding_attention"] * 4 + ["full_attention"]
    assert config.layer_types == 2 * kinds
    # Each layer keeps what its place has given it.
    assert list(config.activation_sparsity_pattern) == [0.95] * 5 + [0.0] * 5


def test_windows_chunks_and_distances():
    config = Llama4TextConfig(attention_chunk_size=8192, floor_scale=4096)
    assert reaches(config) == [8192] and spreads(config) == [4096]
    core = on_meta(Llama4ForCausalLM, config)
    small = small_model(core)
    assert (small.config.attention_chunk_size, small.config.floor_scale) == (4, 3)
    far = small_model(core, reach=8192, spread=100).config
    assert (far.attention_chunk_size, far.floor_scale) == (8192, 100)
    rope = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}
    config = AutoConfig.for_model("ministral3", rope_parameters={**rope, "rope_theta": 1e4})
    assert spreads(config) == [512]
    assert reaches(LlamaConfig()) == [] and spreads(LlamaConfig()) == []


def test_a_tiny_model_keeps_its_shape():
    options = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 61}
    core = LlamaForCausalLM(
        LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **options)
    ).bfloat16()
    small = small_model(core)
    shapes = {name: p.shape for name, p in core.named_parameters()}
    assert {name: p.shape for name, p in small.named_parameters()} == shapes
    assert not any(
        torch.equal(p, q) for p, q in zip(core.parameters(), small.parameters()) if p.ndim > 1
    )


class Needy(LlamaForCausalLM):
    def __init__(self, config, more):
        super().__init__(config)


class Huge(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.table = nn.Embedding(200_000, 1000)


@pytest.mark.parametrize(
    ("kind", "arguments", "reason"),
    [(Needy, (1,), "TypeError"), (Huge, (), "its smallest form has 20.,...,... parameters")],
)
def test_what_cannot_be_small(kind, arguments, reason):
    options = {"hidden_size": 48, "intermediate_size": 40, "num_hidden_layers": 2, "vocab_size": 61}
    with torch.device("meta"):
        core = kind(LlamaConfig(num_attention_heads=4, **options), *arguments)
    with pytest.raises(NotSmall, match=reason):
        small_model(core)
