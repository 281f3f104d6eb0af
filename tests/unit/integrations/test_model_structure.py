"""What a model's layers are, and what somebody has changed in it."""

import importlib.util
import re

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from oddsmith.integrations.model_structure import in_memory, is_exact, is_sharded, mixer, strange
from oddsmith.nn import Linear4bit

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "vocab_size": 61,
    "num_attention_heads": 4,
}


def llama():
    return LlamaForCausalLM(LlamaConfig(**SIZES))


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("mamba2", "Mamba2Mixer"),
        ("qwen3_next", "Qwen3NextGatedDeltaNet"),
        ("recurrent_gemma", "RecurrentGemmaRecurrentBlock"),
        ("lfm2_moe", "Lfm2MoeShortConv"),
        ("falcon_h1", "FalconH1Mixer"),
        ("lfm2", "Lfm2ShortConv"),
        ("qwen3_5_text", "Qwen3_5GatedDeltaNet"),
        ("nemotron_h", "NemotronHMamba2Mixer"),
        ("granitemoehybrid", "GraniteMoeHybridMambaLayer"),
    ],
)
def test_recurrences_and_convolutions(name, part):
    options = {
        "lfm2": {"layer_types": ["conv", "full_attention"]},
        "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
        "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
        "nemotron_h": {"layers_block_type": ["mamba", "attention"]},
    }.get(name, {})
    config = AutoConfig.for_model(name, num_hidden_layers=2, **options)
    with torch.device("meta"):
        core = AutoModelForCausalLM.from_config(config)
    assert mixer(core) == f"layer 0 has a recurrence or convolution ({part})"


@pytest.mark.skipif(
    importlib.util.find_spec("causal_conv1d") is not None, reason="the kernel is installed"
)
def test_transformers_has_no_packed_convolution_for_the_cpu():
    """Why hybrids stay padded: only kernels for GPUs take the limits of the sequences of a row."""
    pytest.importorskip("transformers", minversion="5.24")
    config = Lfm2Config(**SIZES, layer_types=["conv", "full_attention"], num_key_value_heads=2)
    ids = torch.arange(3, 11)[None]
    limits = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]], dtype=torch.int32)
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        Lfm2ForCausalLM(config)(input_ids=ids, seq_idx=limits, use_cache=False)


def test_attention_mixes_nothing_by_itself():
    assert mixer(llama()) is None
    model = llama()
    # Of one position: a linear layer by another name.
    model.model.layers[0].mlp.up_proj = nn.Conv1d(64, 64, 1)
    assert mixer(model) is None
    model.model.layers[1].mlp.up_proj = nn.Conv1d(64, 64, 3)
    assert mixer(model) == "layer 1 has a recurrence or convolution (LlamaMLP)"


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_of_torch(kind):
    model = llama()
    model.model.layers[1].mlp.up_proj = kind(64, 64, batch_first=True)
    assert mixer(model) == "layer 1 has a recurrence or convolution (LlamaMLP)"


class Own(nn.Module):
    def forward(self, x):
        return x


def with_own_layer(model):
    model.model.layers[1].mlp = Own()


def with_own_forward(model):
    forward = model.model.forward
    model.model.forward = lambda *args, **kwargs: forward(*args, **kwargs)


def with_hook(model):
    model.model.layers[0].register_forward_hook(lambda *args: None)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (with_own_layer, "model.layers.1.mlp is a .*Own"),
        (with_own_forward, "model has a forward of its own"),
        (with_hook, "model.layers.0 has a hook"),
    ],
)
def test_what_a_class_has_not(change, reason):
    model = llama()
    change(model)
    assert re.fullmatch(reason, strange(model, llama()))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_what_wrappers_add_is_known():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module
    from peft import LoraConfig, get_peft_model

    small, model = llama(), llama()
    assert strange(model, small) is None
    model.enable_input_require_grads()
    add_hook_to_module(model.model.layers[0], AlignDevicesHook("cpu"))
    model.model.layers[1].mlp.up_proj = Linear4bit.from_linear(model.model.layers[1].mlp.up_proj)
    get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert strange(model, small) is None


def test_where_and_how_exact():
    model = llama()
    assert in_memory(model) and is_exact(model) and not is_sharded(model)
    assert not is_exact(llama().bfloat16())
    layer = model.model.layers[0].mlp
    layer.up_proj = Linear4bit.from_linear(layer.up_proj, compute_dtype=torch.bfloat16)
    assert not is_exact(model)
    with torch.device("meta"):
        assert not in_memory(llama())
