"""Small models on disk, and the contents of their files."""

from pathlib import Path

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from oddsmith.functional import quantize_nf4

SIZES = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def mistral(**options) -> MistralForCausalLM:
    torch.manual_seed(3)
    return MistralForCausalLM(MistralConfig(**{**SIZES, "tie_word_embeddings": False, **options}))


def qwen(**options) -> Qwen2ForCausalLM:
    torch.manual_seed(4)
    model = Qwen2ForCausalLM(Qwen2Config(**{**SIZES, "tie_word_embeddings": False, **options}))
    for name, parameter in model.named_parameters():  # zeros by default
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return model


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(5)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=96, n_positions=32, n_embd=48, n_layer=2, n_head=4)
    )


def save_base(folder: Path) -> Path:
    """Saves a small Mistral in bfloat16 and a dummy tokenizer file."""
    mistral().bfloat16().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        name: tensor
        for file in sorted(folder.glob("model*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def linear_names(model: nn.Module) -> set[str]:
    return {
        f"{name}.weight"
        for name, module in model.named_modules()
        if type(module) is nn.Linear and name != "lm_head"
    }


def assert_quantized(before, after, names, blocksize, double_quant):
    """`after` has the NF4 form of `names`, copies of all other tensors, and nothing else."""
    expected = {}
    for name, tensor in before.items():
        if name not in names:
            expected[name] = tensor
            continue
        expected[name], state = quantize_nf4(tensor, blocksize, double_quant)
        parts = state.as_dict(packed=True)
        expected |= {f"{name}.{part}": value for part, value in parts.items()}
    assert after.keys() == expected.keys()
    for name, tensor in expected.items():
        assert after[name].dtype == tensor.dtype, name
        assert after[name].shape == tensor.shape, name
        assert torch.equal(after[name], tensor), name


def parts_of(tensors, name):
    return {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}


STEM = "base_model.model.model.layers.0.self_attn.q_proj"


def make_adapter(tmp_path, tensors=None, **options) -> Path:
    """An adapter of one projection, or with the given tensors."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    LoraConfig(**{"r": 2, "target_modules": ["q_proj"], **options}).save_pretrained(folder)
    if tensors is None:
        tensors = {
            f"{STEM}.lora_A.weight": torch.ones(2, 48),
            f"{STEM}.lora_B.weight": torch.ones(48, 2),
        }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    return folder
