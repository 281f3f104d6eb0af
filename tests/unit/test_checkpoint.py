"""Checkpoints on disk: quantised as tensors in memory are, merged as peft does, refused by name."""

import json
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from oddsmith import checkpoint as checkpoint_module
from oddsmith.checkpoint import quantize_checkpoint
from oddsmith.checkpoint_files import Checkpoint
from oddsmith.checkpoint_merge import merge_adapter
from oddsmith.errors import UserError
from oddsmith.functional import QuantState, dequantize_nf4, quantize_nf4

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")

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


@pytest.fixture
def base(tmp_path) -> Path:
    mistral().bfloat16().save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    return tmp_path / "base"


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
    """`after` has the NF4 form of `names` and copies of everything else, and nothing more."""
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


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("blocksize", [32, 64, 256, 4096])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_quantised_as_in_memory(blocksize, double_quant, dtype, tmp_path):
    # 48 x 80 values: no multiple of 256 or 4096, so blocks are partial.
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
    # More scales than libtorch adds up in one thread.
    model = mistral(hidden_size=1024, intermediate_size=4224, num_hidden_layers=1).bfloat16()
    model.save_pretrained(tmp_path / "base")
    quantize_checkpoint(tmp_path / "base", tmp_path / "out", double_quant=True)
    before, after = weights(tmp_path / "base"), weights(tmp_path / "out")
    assert after["model.layers.0.mlp.up_proj.weight.absmax"].numel() == 67_584
    assert_quantized(before, after, linear_names(model), 64, True)


def test_many_files(tmp_path):
    model = mistral()
    model.save_pretrained(tmp_path / "base", max_shard_size="60KB")
    files = sorted(file.name for file in (tmp_path / "base").glob("*.safetensors"))
    assert len(files) > 2
    quantize_checkpoint(tmp_path / "base", tmp_path / "out")
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == files
    after = weights(tmp_path / "out")
    assert_quantized(weights(tmp_path / "base"), after, linear_names(model), 64, False)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in after.values())
    for file in files:
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118
                assert index["weight_map"].pop(name) == file
    assert not index["weight_map"]


def test_other_files_go_along(base, tmp_path):
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tools.jinja").write_text("tools")
    (base / "pytorch_model.bin").write_bytes(b"old")
    (base / ".hidden").write_text("no")
    quantize_checkpoint(base, tmp_path / "out")
    found = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.*")}
    assert found == {
        "model.safetensors", "config.json", "generation_config.json", "tokenizer.json",
        "chat_template.jinja", "additional_chat_templates/tools.jinja",
    }  # fmt: skip


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


def test_tied_embeddings_are_left(tmp_path):
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


def parts_of(tensors, name):
    return {key: value for key, value in tensors.items() if key.startswith(f"{name}.")}


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
    with pytest.raises(UserError, match="is quantised already, with nf4 of bitsandbytes"):
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
    with pytest.raises(UserError, match="x.SCB is there, of int8"):
        quantize_checkpoint(base, tmp_path / "more")


def test_dtypes_that_are_refused(base, tmp_path):
    name = "model.layers.0.self_attn.q_proj.weight"
    change(base / "model.safetensors", lambda t: t.update({name: t[name].to(torch.float8_e4m3fn)}))
    with pytest.raises(UserError, match=f"{name} has dtype F8_E4M3; must be F32, BF16, F16"):
        quantize_checkpoint(base, tmp_path / "out")


def truncate(base: Path) -> None:
    file = base / "model.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def no_weights(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def bad_index(content):
    def edit(base: Path) -> None:
        (base / "model.safetensors").rename(base / "part.safetensors")
        (base / "model.safetensors.index.json").write_text(json.dumps(content))

    return edit


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncate, "is truncated or too long"),
        (no_weights, "must have model.safetensors or .*; found pytorch_model.bin"),
        (lambda base: (base / "model.safetensors").write_bytes(b""), "has 0 bytes"),
        (lambda base: (base / "model.safetensors").write_bytes(b"x" * 99), "no safetensors file"),
        (lambda base: (base / "config.json").unlink(), "config.json: No such file"),
        (lambda base: (base / "config.json").write_text("{"), "config.json: is no JSON"),
        (lambda base: (base / "config.json").write_text("[]"), "is list; must be a JSON object"),
        (lambda base: (base / "config.json").write_text("{}"), "cannot build the model"),
        (shutil.rmtree, "no such folder"),
        (bad_index({}), "weight_map is None"),
        (bad_index({"weight_map": {"x": "../y"}}), "'../y' is no name of a file"),
        (bad_index({"weight_map": {"x": "y.safetensors"}}), "y.safetensors: No such file"),
        (bad_index({"weight_map": {"x": "part.safetensors"}}), "has no tensor 'x', which"),
    ],
)
def test_damaged_folders(damage, words, base, tmp_path):
    damage(base)
    with pytest.raises(UserError, match=words):
        quantize_checkpoint(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_arguments_are_checked(base, tmp_path):
    with pytest.raises(UserError, match="--blocksize 48: must be one of 32, 64"):
        quantize_checkpoint(base, tmp_path / "out", blocksize=48)
    with pytest.raises(UserError, match="--compute_dtype int8: must be one of"):
        quantize_checkpoint(base, tmp_path / "out", compute_dtype="int8")
    with pytest.raises(UserError, match="is the folder that is read"):
        quantize_checkpoint(base, base, overwrite=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file: is no folder"):
        quantize_checkpoint(base, tmp_path / "file", overwrite=True)


def test_overwriting_is_asked_for(base, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "config.json"):
        (out / name).write_text("old")
    with pytest.raises(UserError, match="out: has config.json already; --overwrite"):
        quantize_checkpoint(base, out)
    quantize_checkpoint(base, out, overwrite=True)
    found = sorted(path.name for path in out.iterdir())
    assert found == [
        "config.json", "generation_config.json", "model.safetensors", "notes.txt", "tokenizer.json",
    ]  # fmt: skip
    assert_quantized(weights(base), weights(out), linear_names(mistral()), 64, False)


def test_a_full_disk_is_found_first(base, tmp_path, monkeypatch):
    usage = SimpleNamespace(free=1000)
    monkeypatch.setattr("oddsmith.checkpoint_files.shutil.disk_usage", lambda _: usage)
    with pytest.raises(UserError, match="GB needed, 0.00 GB free"):
        quantize_checkpoint(base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


LIMITED = """
import resource, signal, sys
from oddsmith import cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
sys.exit(cli.main(["quantize", *sys.argv[1:]]))
"""


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="no limit on files")
def test_a_write_that_fails_leaves_what_was_there(base, tmp_path):
    out = tmp_path / "out"
    quantize_checkpoint(base, out, blocksize=32)
    before = {file.name: file.read_bytes() for file in out.iterdir()}
    run = subprocess.run(
        [sys.executable, "-c", LIMITED, base, out, "--overwrite"], capture_output=True, text=True
    )
    assert run.returncode == 1
    assert "oddsmith quantize: error: " in run.stderr
    assert "File too large" in run.stderr
    assert {file.name: file.read_bytes() for file in out.iterdir()} == before


def test_an_interrupt_leaves_nothing(base, tmp_path, monkeypatch):
    class Interrupted(checkpoint_module.tqdm):
        def update(self, n=1):
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint_module, "tqdm", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        quantize_checkpoint(base, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


# Merging.


def train(model: PeftModel) -> None:
    """Gives every trained parameter values that matter."""
    torch.manual_seed(11)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if "magnitude" in name:
            parameter.data *= 1 + 0.3 * torch.rand_like(parameter)
        else:
            parameter.data += 0.1 * torch.randn_like(parameter)


def merged_by_peft(model, config, tmp_path, base_dtype=None):
    """Saves base and adapter, and returns what peft's merge makes of them."""
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
        # One rounding; peft rounds the product too, where the adapter is in half precision.
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

    # And in 4 bits again: what the adapter leaves alone is copied.
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
    # On a 4-bit base peft sees a linear layer, whichever way the weight was stored.
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


def test_the_adapter_s_tokenizer_wins(base, tmp_path):
    adapter = make_adapter(tmp_path)
    (adapter / "tokenizer.json").write_text('{"trained": true}')
    (adapter / "README.md").write_text("card of the adapter")
    (base / "merges.txt").write_text("of the base")
    merge_adapter(base, adapter, tmp_path / "out", dtype="float32")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == '{"trained": true}'
    assert (tmp_path / "out" / "merges.txt").read_text() == "of the base"
    assert not (tmp_path / "out" / "README.md").exists()
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.float32}


STEM = "base_model.model.model.layers.0.self_attn.q_proj"


def make_adapter(tmp_path, tensors=None, **options) -> Path:
    """An adapter of one projection, or of whatever tensors."""
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


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"use_dora": True}, "has no lora_magnitude_vector; use_dora is True"),
        ({"layer_replication": [[0, 1]]}, "uses layer_replication, which cannot be merged here"),
        (
            {"alora_invocation_tokens": [5], "task_type": "CAUSAL_LM"},
            "uses alora_invocation_tokens",
        ),
        ({"trainable_token_indices": [3]}, "uses trainable_token_indices"),
        ({"init_lora_weights": "pissa_niter_4"}, "which changed the base weights"),
        ({"init_lora_weights": "olora"}, "which changed the base weights"),
    ],
)
def test_kinds_of_adapters_that_are_refused(options, words, base, tmp_path):
    with pytest.raises(UserError, match=words):
        merge_adapter(base, make_adapter(tmp_path, **options), tmp_path / "out")


def test_other_methods_are_refused_by_name(base, tmp_path):
    adapter = make_adapter(tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(UserError, match="is a IA3 adapter; only LORA"):
        merge_adapter(base, adapter, tmp_path / "out")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="adapter_model.bin is no safetensors file"):
        merge_adapter(base, adapter, tmp_path / "out")
    (adapter / "adapter_config.json").unlink()
    with pytest.raises(UserError, match="has no adapter_config.json"):
        merge_adapter(base, adapter, tmp_path / "out")


def test_tied_embeddings_are_not_torn_apart(tmp_path):
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
        (renamed, f"{name}: is fp4; of quantised weights only nf4"),
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


def test_what_a_folder_holds(base):
    found = Checkpoint(base)
    assert found.tensors["lm_head.weight"].kind == "BF16"
    assert found.tensors["lm_head.weight"].shape == (96, 48)
    assert [file.name for file in found.others()] == ["generation_config.json", "tokenizer.json"]
