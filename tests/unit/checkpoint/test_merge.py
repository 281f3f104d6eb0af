"""Adapters merged on disk give the same results as peft, or are refused by name."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2LMHeadModel

from oddsmith.checkpoint.merge import merge_adapter
from oddsmith.checkpoint.quantize import quantize_checkpoint
from oddsmith.errors import UserError
from oddsmith.functional import QuantState, dequantize_nf4, quantize_nf4
from support.checkpoint_models import (
    STEM,
    assert_quantized,
    gpt2,
    linear_names,
    make_adapter,
    mistral,
    parts_of,
    qwen,
    weights,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


def train(model: PeftModel) -> None:
    """Gives every trained parameter nonzero values."""
    torch.manual_seed(11)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)


def merged_by_peft(model, config, tmp_path, base_dtype=None):
    """Saves base and adapter, and returns the result of peft's merge."""
    if base_dtype is not None:
        model = model.to(base_dtype)
    model.save_pretrained(tmp_path / "base")
    peft_model = get_peft_model(model, config)
    train(peft_model)
    peft_model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    again.merge_and_unload().save_pretrained(tmp_path / "theirs")
    return weights(tmp_path / "theirs")


CASES = {
    "plain": (mistral, {"target_modules": ["q_proj", "down_proj"]}),
    "every linear layer": (qwen, {"target_modules": "all-linear", "r": 5, "lora_alpha": 3}),
    "patterns": (
        mistral,
        {
            "target_modules": ["q_proj", "v_proj", "up_proj"],
            "rank_pattern": {"q_proj": 2, "layers.1.self_attn.v_proj": 6},
            "alpha_pattern": {"up_proj": 40, "^model.layers.0.self_attn.q_proj": 1},
        },
    ),
    "rslora": (mistral, {"target_modules": ["k_proj"], "use_rslora": True, "r": 7}),
    "trained biases": (qwen, {"target_modules": ["q_proj", "o_proj"], "bias": "all"}),
    "biases of adapted layers": (qwen, {"target_modules": ["q_proj"], "bias": "lora_only"}),
    "bias of the adapter": (qwen, {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "whole modules": (
        mistral, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}
    ),
    "embeddings": (mistral, {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "dora": (mistral, {"target_modules": ["q_proj", "down_proj"], "use_dora": True}),
    "rows of tokens": (
        mistral, {"target_modules": ["q_proj"], "trainable_token_indices": [7, 3, 9]}
    ),
    "rows of tokens by module": (
        mistral,
        {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [2, 5]}},
    ),
    "conv1d": (gpt2, {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", CASES)
def test_merged_as_peft_does(case, tmp_path):
    make, options = CASES[case]
    options = {"r": 4, "lora_alpha": 12, "task_type": "CAUSAL_LM", **options}
    theirs = merged_by_peft(make(), LoraConfig(**options), tmp_path)
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")
    ours, before = weights(tmp_path / "ours"), weights(tmp_path / "base")
    assert ours.keys() == theirs.keys() == before.keys()
    changed = 0
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=2e-6, atol=2e-6, msg=name)
        changed += not torch.equal(before[name], tensor)
    assert changed >= 2
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert config == json.loads((tmp_path / "base" / "config.json").read_text())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merged_in_half_precision(dtype, tmp_path):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])
    theirs = merged_by_peft(mistral(), config, tmp_path, dtype)
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")
    ours, before = weights(tmp_path / "ours"), weights(tmp_path / "base")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype == dtype
        if "q_proj" not in name and "up_proj" not in name:
            assert torch.equal(ours[name], tensor)
            continue
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        a, b = (adapter[f"{stem}.lora_{part}.weight"].double() for part in "AB")
        true = before[name].double() + 2.0 * b @ a
        # One rounding; peft also rounds the product if the adapter is in half precision.
        assert (
            torch.equal(ours[name], true.to(dtype))
            or (
                (ours[name].double() - true).abs() <= torch.finfo(dtype).eps / 2 * true.abs() + 1e-7
            ).all()
        )
        assert (ours[name].double() - true).abs().sum() <= (tensor.double() - true).abs().sum()


def four_bit(tmp_path, model, **options) -> dict[str, torch.Tensor]:
    """Saves a base in 4 bits, and returns its values in full precision."""
    model.save_pretrained(tmp_path / "full")
    quantize_checkpoint(tmp_path / "full", tmp_path / "base", **options)
    packed = weights(tmp_path / "base")
    values = {}
    for name, tensor in packed.items():
        if ".weight." in name:
            continue
        parts = parts_of(packed, name)
        values[name] = dequantize_nf4(tensor, QuantState.from_dict(parts)) if parts else tensor
    return values


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merged_into_four_bits(double_quant, dtype, tmp_path):
    values = four_bit(tmp_path, mistral().to(dtype), double_quant=double_quant)
    # The same adapter on the same values in full precision.
    plain = tmp_path / "plain"
    shutil.copytree(tmp_path / "full", plain)
    save_file(values, plain / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(plain)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "up_proj"])
    peft_model = get_peft_model(model, config)
    train(peft_model)
    peft_model.save_pretrained(tmp_path / "adapter")
    merge_adapter(plain, tmp_path / "adapter", tmp_path / "expected")
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    expected, found = weights(tmp_path / "expected"), weights(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype == dtype
        assert torch.equal(found[name], tensor), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "quantization_config" not in config

    # And in 4 bits again: weights that the adapter does not change are copied.
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "again", quantize=True)
    again, before = weights(tmp_path / "again"), weights(tmp_path / "base")
    assert again.keys() == before.keys()
    for name in linear_names(mistral()):
        changed = "q_proj" in name or "up_proj" in name
        if changed:
            packed, state = quantize_nf4(expected[name], 64, double_quant)
            parts = state.as_dict(packed=True)
        else:
            packed, parts = (
                before[name],
                {
                    part.removeprefix(f"{name}."): value
                    for part, value in parts_of(before, name).items()
                },
            )
        assert torch.equal(again[name], packed), name
        for part, value in parts.items():
            assert torch.equal(again[f"{name}.{part}"], value), (name, part)
    found = json.loads((tmp_path / "again" / "config.json").read_text())
    assert found == json.loads((tmp_path / "base" / "config.json").read_text())


def test_parts_of_a_weight_may_be_in_other_files(tmp_path):
    values = four_bit(tmp_path, mistral().bfloat16())
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    places = {name: "codes" if ".absmax" not in name else "scales" for name in tensors}
    for place in ("codes", "scales"):
        part = {name: tensor for name, tensor in tensors.items() if places[name] == place}
        save_file(part, file.with_name(f"{place}.safetensors"), metadata={"format": "pt"})
    index = {"weight_map": {name: f"{place}.safetensors" for name, place in places.items()}}
    file.with_name("model.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()
    merge_adapter(tmp_path / "base", make_adapter(tmp_path), tmp_path / "out")
    changed = "model.layers.0.self_attn.q_proj.weight"
    assert not (tmp_path / "out" / "scales.safetensors").exists()
    found = load_file(tmp_path / "out" / "codes.safetensors")
    assert found.keys() == values.keys()
    for name, tensor in values.items():
        assert torch.equal(found[name], tensor) == (name != changed), name
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {"codes.safetensors"}


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_conv1d_turns_back_from_four_bits(tmp_path):
    values = four_bit(tmp_path, gpt2())
    name = "transformer.h.0.mlp.c_fc.weight"
    assert values[name].shape == (192, 48)
    # On a 4-bit base peft sees a linear layer, even if the weight was stored transposed.
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    config = LoraConfig(r=2, lora_alpha=4, target_modules=["c_fc"])
    config.save_pretrained(adapter)
    a, b = torch.randn(2, 48), torch.randn(192, 2)
    stem = f"base_model.model.{name.removesuffix('.weight')}"
    save_file(
        {f"{stem}.lora_A.weight": a, f"{stem}.lora_B.weight": b},
        adapter / "adapter_model.safetensors",
    )
    merge_adapter(tmp_path / "base", adapter, tmp_path / "out", dtype="float32")
    after = weights(tmp_path / "out")
    torch.testing.assert_close(after[name], (values[name] + 2.0 * b @ a).T)
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "out").dtype == torch.float32
    merge_adapter(tmp_path / "base", adapter, tmp_path / "again", quantize=True)
    assert QuantState.from_dict(parts_of(weights(tmp_path / "again"), name)).shape == (192, 48)


def test_a_full_base_may_become_four_bit(tmp_path):
    config = LoraConfig(r=4, target_modules=["q_proj"])
    merged_by_peft(mistral(), config, tmp_path)
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "full")
    options = {"quantize": True, "double_quant": True, "blocksize": 128}
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", **options)
    names = linear_names(mistral())
    assert_quantized(weights(tmp_path / "full"), weights(tmp_path / "out"), names, 128, True)


def test_the_adapters_tokenizer_is_used(base, tmp_path):
    adapter = make_adapter(tmp_path)
    (adapter / "tokenizer.json").write_text('{"trained": true}')
    (adapter / "README.md").write_text("model card of the adapter")
    (base / "merges.txt").write_text("of the base")
    merge_adapter(base, adapter, tmp_path / "out", dtype="float32")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"trained": true}'
    assert (tmp_path / "out" / "merges.txt").read_text() == "of the base"
    assert not (tmp_path / "out" / "README.md").exists()
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.float32}


A, B = torch.ones(2, 48), torch.ones(48, 2)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({}, "has no tensors"),
        ({f"{STEM}.lora_A.weight": A}, "q_proj has no lora_B"),
        ({f"{STEM}.lora_A.weight": A[:1], f"{STEM}.lora_B.weight": B}, r"the rank must be 2"),
        ({f"{STEM}.lora_A.weight": A, f"{STEM}.lora_B.weight": B[:9]}, r"make \(9, 2\) by \(2, 48\); the"),
        ({f"{STEM}.lora_A.weight": A * torch.nan, f"{STEM}.lora_B.weight": B}, "lora_A.weight is NaN at 0"),
        ({f"{STEM}.lora_A.weight": A * 1e38, f"{STEM}.lora_B.weight": B}, "inf in row 0, column 0 of"),
        ({"x.lora_A.weight": A}, "x.lora_A.weight must begin with base_model.model."),
        ({f"{STEM}.lora_C.weight": A}, "lora_C.weight is of a kind that cannot be merged"),
        ({"base_model.model.x.lora_A.weight": A}, "is for a module x, which the model"),
        ({"base_model.model.y.weight": A}, "replaces y.weight, which .* does not have"),
        ({"base_model.model.lm_head.weight": A}, r"shape of a replacement is \[2, 48\]"),
        (
            {"base_model.model.model.norm.lora_A.weight": A, "base_model.model.model.norm.lora_B.weight": B},
            "model.norm is a MistralRMSNorm",
        ),
        (
            {f"{STEM}.lora_A.weight": A, f"{STEM}.lora_B.weight": B, f"{STEM}.lora_B.bias": B[:, 0]},
            "changes model.layers.0.self_attn.q_proj.bias, which .* does not have",
        ),
        (
            {f"{STEM}.lora_A.weight": A, f"{STEM}.lora_B.weight": B, f"{STEM}.lora_magnitude_vector": A[0]},
            "has lora_magnitude_vector; use_dora is False",
        ),
        ({f"{STEM}.lora_embedding_A": A, f"{STEM}.lora_embedding_B": B}, "has no lora_A and no lora_B"),
    ],
)  # fmt: skip
def test_adapters_that_do_not_fit(tensors, words, base, tmp_path):
    tensors = {name: tensor.clone().contiguous() for name, tensor in tensors.items()}
    with pytest.raises(UserError, match=words):
        merge_adapter(base, make_adapter(tmp_path, tensors), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tied_embeddings_are_not_separated(tmp_path):
    qwen(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    stem = "base_model.model.lm_head"
    tensors = {
        f"{stem}.lora_A.weight": torch.ones(2, 48),
        f"{stem}.lora_B.weight": torch.ones(96, 2),
    }
    adapter = make_adapter(tmp_path, tensors, target_modules=["lm_head"])
    with pytest.raises(
        UserError, match=r"changes lm_head.weight, which the model ties to model.embed"
    ):
        merge_adapter(tmp_path / "base", adapter, tmp_path / "out")


TIED = {
    "both ends": {"modules_to_save": ["lm_head", "embed_tokens"], "ensure_weight_tying": True},
    "one end": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "rows of tokens": {"trainable_token_indices": [4, 1]},
}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("case", TIED)
def test_tied_embeddings_that_change_together(case, tmp_path):
    options = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", **TIED[case]}
    theirs = merged_by_peft(qwen(tie_word_embeddings=True), LoraConfig(**options), tmp_path)
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "ours")
    ours, before = weights(tmp_path / "ours"), weights(tmp_path / "base")
    assert ours.keys() == before.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-6)
    assert not torch.equal(ours["model.embed_tokens.weight"], before["model.embed_tokens.weight"])


def test_tied_ends_that_differ_are_refused(tmp_path):
    qwen(tie_word_embeddings=True).save_pretrained(tmp_path / "base")
    tensors = {
        "base_model.model.lm_head.weight": torch.ones(96, 48),
        "base_model.model.model.embed_tokens.weight": torch.zeros(96, 48),
    }
    adapter = make_adapter(tmp_path, tensors, modules_to_save=["lm_head", "embed_tokens"])
    with pytest.raises(UserError, match="replaces .*, which the model ties to"):
        merge_adapter(tmp_path / "base", adapter, tmp_path / "out")


def test_bases_that_are_refused_by_name(base, tmp_path):
    adapter = make_adapter(tmp_path)
    quantize_checkpoint(base, tmp_path / "nf4")
    file = tmp_path / "nf4" / "model.safetensors"
    whole, name = load_file(file), "model.layers.0.self_attn.q_proj.weight"
    json_key = f"{name}.quant_state.bitsandbytes__nf4"

    def renamed(tensors):
        tensors[json_key.replace("nf4", "fp4")] = tensors.pop(json_key)

    def shorter(tensors):
        tensors[name] = tensors[name][:-1].clone()

    def int8(tensors):
        tensors[name] = tensors[name].view(torch.int8)
        tensors["model.layers.0.self_attn.q_proj.SCB"] = torch.ones(48)

    for edit, words in (
        (renamed, f"{name}: is quantised to fp4; only nf4 can be read"),
        (shorter, f"{name}: quant_state has shape .48, 48., which does not fit the 1151 bytes"),
        (int8, f"{name} is int8"),
        (lambda tensors: tensors.pop(f"{name}.absmax"), f"{name}: absmax is missing"),
    ):
        tensors = dict(whole)
        edit(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        with pytest.raises(UserError, match=words):
            merge_adapter(tmp_path / "nf4", adapter, tmp_path / "out")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(
        json.dumps({**config, "quantization_config": {"quant_method": "awq"}})
    )
    with pytest.raises(UserError, match="is quantised with awq; only nf4"):
        merge_adapter(base, adapter, tmp_path / "out")
    with pytest.raises(UserError, match="--blocksize: only with --quantize"):
        merge_adapter(base, adapter, tmp_path / "out", blocksize=64)
