"""Checkpoints on disk are quantised like tensors in memory, or refused by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BitsAndBytesConfig

from oddsmith.checkpoint.quantize import quantize_checkpoint
from oddsmith.errors import UserError
from oddsmith.functional import QuantState, quantize_nf4
from support.checkpoint_models import (
    assert_quantized,
    gpt2,
    linear_names,
    mistral,
    parts_of,
    qwen,
    weights,
)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantised_as_in_memory(blocksize, double_quant, dtype, tmp_path):
    # 48 x 80 values: not a multiple of 256 or 4096, so blocks are partial.
    model = mistral().to(dtype)
    model.save_pretrained(tmp_path / "base")
    options = {"double_quant": double_quant, "blocksize": blocksize}
    summary = quantize_checkpoint(tmp_path / "base", tmp_path / "out", **options)
    names = linear_names(model)
    assert summary.changed == len(names) == 14
    before, after = weights(tmp_path / "base"), weights(tmp_path / "out")
    assert_quantized(before, after, names, blocksize, double_quant)
    found = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    wanted = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=double_quant,
    )
    assert found == json.loads(json.dumps(wanted.to_dict()))


def test_means_are_those_of_libtorch(tmp_path):
    # More scales than libtorch adds in one thread.
    model = mistral(hidden_size=1024, intermediate_size=4224, num_hidden_layers=1).bfloat16()
    model.save_pretrained(tmp_path / "base")
    quantize_checkpoint(tmp_path / "base", tmp_path / "out", double_quant=True)
    before, after = weights(tmp_path / "base"), weights(tmp_path / "out")
    assert after["model.layers.0.mlp.up_proj.weight.absmax"].numel() == 67_584
    assert_quantized(before, after, linear_names(model), 64, True)


def test_skipped_modules(base, tmp_path):
    skip = ["o_proj", "model.layers.1.mlp"]
    quantize_checkpoint(base, tmp_path / "out", skip=skip)
    names = {
        name for name in linear_names(mistral()) if "o_proj" not in name and "1.mlp" not in name
    }
    assert len(names) == 9
    assert_quantized(weights(base), weights(tmp_path / "out"), names, 64, False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["llm_int8_skip_modules"] == sorted([*skip, "lm_head"])
    with pytest.raises(UserError, match="--skip o_prog: matches no linear layer"):
        quantize_checkpoint(base, tmp_path / "more", skip=["o_prog"])


def test_tied_embeddings_are_not_quantised(tmp_path):
    model = qwen(tie_word_embeddings=True)
    model.save_pretrained(tmp_path / "base")
    quantize_checkpoint(tmp_path / "base", tmp_path / "out")
    after = weights(tmp_path / "out")
    assert "lm_head.weight" not in after
    assert_quantized(weights(tmp_path / "base"), after, linear_names(model), 64, False)


def test_names_without_the_model_s_prefix(base, tmp_path):
    file = base / "model.safetensors"
    renamed = {name.removeprefix("model."): value for name, value in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    quantize_checkpoint(base, tmp_path / "out")
    names = {name.removeprefix("model.") for name in linear_names(mistral())}
    assert_quantized(renamed, weights(tmp_path / "out"), names, 64, False)


def test_weights_that_are_stored_transposed(tmp_path):
    model = gpt2()
    model.save_pretrained(tmp_path / "base")
    quantize_checkpoint(tmp_path / "base", tmp_path / "out")
    before, after = weights(tmp_path / "base"), weights(tmp_path / "out")
    name = "transformer.h.1.mlp.c_fc.weight"
    assert before[name].shape == (48, 192)
    packed, state = quantize_nf4(before[name].T.contiguous())
    assert torch.equal(after[name], packed)
    assert torch.equal(after[f"{name}.absmax"], state.absmax)
    assert QuantState.from_dict(parts_of(after, name)).shape == (192, 48)
    assert torch.equal(after["transformer.wte.weight"], before["transformer.wte.weight"])


def test_cast_before_it_is_quantised(base, tmp_path):
    quantize_checkpoint(base, tmp_path / "out", dtype="float16", compute_dtype="float32")
    before = {name: tensor.half() for name, tensor in weights(base).items()}
    assert_quantized(before, weights(tmp_path / "out"), linear_names(mistral()), 64, False)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert config["quantization_config"]["bnb_4bit_compute_dtype"] == "float32"


def change(file: Path, edit) -> None:
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def put(value):
    """Puts a value into the weight of one projection."""

    def edit(tensors):
        tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = value

    return edit


@pytest.mark.parametrize(("value", "name"), [(float("nan"), "NaN"), (float("-inf"), "-inf")])
def test_weights_that_are_not_finite_are_named(value, name, base, tmp_path):
    change(base / "model.safetensors", put(value))
    words = f"{name} in row 3, column 5 of model.layers.1.mlp.up_proj.weight"
    with pytest.raises(UserError, match=words):
        quantize_checkpoint(base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_quantised_models_are_refused_by_name(base, tmp_path):
    quantize_checkpoint(base, tmp_path / "out")
    with pytest.raises(UserError, match="is already quantised with nf4 of bitsandbytes"):
        quantize_checkpoint(tmp_path / "out", tmp_path / "more")
    config = json.loads((base / "config.json").read_text())
    cases = [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, r"int8 \(LLM.int8\(\)"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "fp4 of bitsandbytes"),
    ]
    for found, words in cases:
        (base / "config.json").write_text(json.dumps({**config, "quantization_config": found}))
        with pytest.raises(UserError, match=words):
            quantize_checkpoint(base, tmp_path / "more")
    (base / "config.json").write_text(json.dumps(config))
    change(base / "model.safetensors", lambda t: t.update({"x.SCB": torch.ones(1)}))
    with pytest.raises(UserError, match="x.SCB belongs to int8 weights"):
        quantize_checkpoint(base, tmp_path / "more")


def test_dtypes_that_are_refused(base, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    change(base / "model.safetensors", lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(UserError, match=f"{name} has dtype F8_E4M3; must be F32, BF16, F16"):
        quantize_checkpoint(base, tmp_path / "out")


def test_arguments_are_checked(base, tmp_path):
    with pytest.raises(UserError, match="--blocksize 48: must be one of 32, 64"):
        quantize_checkpoint(base, tmp_path / "out", blocksize=48)
    with pytest.raises(UserError, match="--compute_dtype int8: must be one of"):
        quantize_checkpoint(base, tmp_path / "out", compute_dtype="int8")
    with pytest.raises(UserError, match="is the input folder"):
        quantize_checkpoint(base, base, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: is not a folder"):
        quantize_checkpoint(base, tmp_path / "file", overwrite=True)
