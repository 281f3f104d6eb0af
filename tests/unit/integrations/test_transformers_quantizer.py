"""4-bit models through transformers, loaded, saved and counted."""

import logging
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

import oddsmith
from oddsmith.functional import dequantize_nf4
from oddsmith.integrations.nf4_config import NF4Config, use_for_bitsandbytes
from oddsmith.integrations.transformers_quantizer import NF4Quantizer
from oddsmith.nn import Linear4bit
from support.trainer_runs import make_model, make_tokenizer

SKIPPED = [f"{name}_proj" for name in "qkvo"] + ["gate_proj", "up_proj", "down_proj", "lm_head"]


@pytest.fixture(autouse=True)
def served():
    use_for_bitsandbytes()
    yield
    use_for_bitsandbytes(False)
    oddsmith.integrations.import_hook.install()


@pytest.fixture
def folder(tmp_path):
    make_model("mistral", make_tokenizer()).save_pretrained(tmp_path / "full")
    return tmp_path / "full"


def load(folder, **settings):
    config = BitsAndBytesConfig(load_in_4bit=True, **{"bnb_4bit_quant_type": "nf4", **settings})
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)


@pytest.mark.parametrize("nested", [False, True])
def test_loads_from_full_precision(folder, nested):
    full = AutoModelForCausalLM.from_pretrained(folder)
    model = load(folder, bnb_4bit_use_double_quant=nested, bnb_4bit_compute_dtype=torch.float32)
    assert isinstance(model.hf_quantizer, NF4Quantizer)
    assert model.is_loaded_in_4bit and model.is_quantized
    assert type(model.lm_head) is nn.Linear
    layers = {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}
    assert len(layers) == 7 * model.config.num_hidden_layers
    for name, layer in layers.items():
        expected = Linear4bit.from_linear(full.get_submodule(name), compress_statistics=nested)
        assert torch.equal(layer.weight.data, expected.weight.data)
        assert torch.equal(layer.weight.quant_state.absmax, expected.weight.quant_state.absmax)
        assert not layer.weight.requires_grad
        full.set_submodule(name, expected)
    tokens = torch.arange(24).view(2, 12)
    assert torch.equal(model(tokens).logits, full(tokens).logits)


@pytest.mark.parametrize("nested", [False, True])
def test_saves_and_loads_its_own_checkpoints(folder, tmp_path, nested):
    model = load(folder, bnb_4bit_use_double_quant=nested)
    model.save_pretrained(tmp_path / "first")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    assert again.config.quantization_config.bnb_4bit_use_double_quant is nested
    tokens = torch.arange(24).view(2, 12)
    assert torch.equal(model(tokens).logits, again(tokens).logits)
    again.save_pretrained(tmp_path / "second")
    entries, others = (
        load_file(tmp_path / each / "model.safetensors") for each in ("first", "second")
    )
    # transformers 5.17 writes the same entries in another order.
    assert set(entries) == set(others)
    for name, entry in entries.items():
        assert entry.dtype == others[name].dtype and torch.equal(entry, others[name]), name
    name = "model.layers.0.mlp.up_proj.weight"
    assert entries[name].dtype == torch.uint8
    assert f"{name}.quant_state.bitsandbytes__nf4" in entries
    assert (f"{name}.nested_absmax" in entries) is nested


def test_transposed_layers_of_gpt2(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=2)
    full = GPT2LMHeadModel(config).eval()
    full.save_pretrained(tmp_path / "full")
    model = load(tmp_path / "full").eval()
    layer = model.transformer.h[0].attn.c_attn
    assert (layer.in_features, layer.out_features) == (32, 96)
    plain = full.transformer.h[0].attn.c_attn
    stored = dequantize_nf4(layer.weight, layer.weight.quant_state)
    assert (stored - plain.weight.T).abs().max() < 0.2 * plain.weight.abs().max()
    model.save_pretrained(tmp_path / "first")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "first").eval()
    tokens = torch.arange(12)[None]
    assert torch.equal(model(tokens).logits, again(tokens).logits)


def test_counts_and_sizes(folder):
    full = AutoModelForCausalLM.from_pretrained(folder)
    model = load(folder)
    assert model.num_parameters() == full.num_parameters()
    without = full.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(exclude_embeddings=True) == without
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert 0 < model.num_parameters(only_trainable=True) == trained
    assert model.get_memory_footprint() < full.get_memory_footprint()


def test_generates(folder):
    model = load(folder).eval()
    tokens = torch.arange(5)[None]
    settings = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
    made = model.generate(tokens, max_new_tokens=6, min_new_tokens=6, **settings)
    assert made.shape == (1, 11)
    for end in range(5, 11):  # the path of one token is that of many
        assert model(made[:, :end]).logits[0, -1].argmax() == made[0, end]


def test_dequantizes(folder):
    model = load(folder)
    tokens = torch.arange(24).view(2, 12)
    before = model(tokens).logits
    plain = model.dequantize()
    assert not any(isinstance(m, Linear4bit) for m in plain.modules())
    torch.testing.assert_close(plain(tokens).logits, before, rtol=1e-4, atol=1e-5)


def test_nf4_config(folder):
    config = NF4Config(torch.float32, double_quant=True, skip_modules=["lm_head", "up_proj"])
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    layer = model.model.layers[0]
    assert type(layer.mlp.up_proj) is nn.Linear and type(layer.mlp.down_proj) is Linear4bit
    assert layer.self_attn.q_proj.weight.quant_state.nested
    assert layer.self_attn.q_proj.compute_dtype is torch.float32


@pytest.mark.filterwarnings("ignore:You passed `quantization_config`:UserWarning")
def test_nf4_config_of_a_quantised_checkpoint(folder, tmp_path):
    model = load(folder)
    model.save_pretrained(tmp_path / "first")
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path / "first", quantization_config=NF4Config()
    )
    tokens = torch.arange(24).view(2, 12)
    assert torch.equal(model(tokens).logits, again(tokens).logits)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"load_in_4bit": True}, "bnb_4bit_quant_type is 'fp4'.* serves \"nf4\""),
        ({"load_in_8bit": True}, r"load_in_8bit \(LLM.int8\) is not supported"),
        ({"llm_int8_skip_modules": SKIPPED}, "no linear layers to quantise"),
    ],
)
def test_what_is_no_nf4_is_refused(folder, settings, words):
    with pytest.raises(ValueError, match=words):
        if "llm_int8_skip_modules" in settings:
            load(folder, **settings)
        else:  # the table hands these on
            NF4Quantizer(BitsAndBytesConfig(**settings))


def test_offloading_is_refused(folder):
    config = NF4Config()
    with pytest.raises(ValueError, match="must be on a device that computes"):
        NF4Quantizer(config).validate_environment(device_map={"model": 0, "lm_head": "disk"})


def test_a_damaged_checkpoint_names_the_weight(folder, tmp_path, caplog):
    load(folder).save_pretrained(tmp_path / "first")
    file = tmp_path / "first" / "model.safetensors"
    entries = load_file(file)
    name = "model.layers.0.mlp.up_proj.weight"
    entries[f"{name}.absmax"] = entries[f"{name}.absmax"][:-1].clone()
    save_file(entries, file, metadata={"format": "pt"})
    logging.getLogger("transformers").addHandler(caplog.handler)
    with pytest.raises(RuntimeError, match="conversion of the weights"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "first")
    logging.getLogger("transformers").removeHandler(caplog.handler)
    # transformers reports what conversions raise, then raises an error of its own.
    assert "layers.0.mlp.up_proj.weight: quant_state: absmax has" in caplog.text


SCRIPT = """
import sys
sys.modules["bitsandbytes"] = None  # as if it were not installed
{first}
import oddsmith
assert {loaded} == ("transformers.quantizers.auto" in sys.modules)
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
model = AutoModelForCausalLM.from_pretrained({folder!r}, quantization_config=config)
print(type(model.model.layers[0].mlp.up_proj).__module__, model.num_parameters())
"""


@pytest.mark.parametrize("first", ["", "import transformers.quantizers.auto"])
def test_importing_oddsmith_is_enough_without_bitsandbytes(folder, first):
    script = SCRIPT.format(first=first, loaded=bool(first), folder=str(folder))
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    count = AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    assert run.stdout.split() == ["oddsmith.quant.modules", str(count)]
