"""`oddsmith quantize` and `oddsmith merge` from the command line, and their results in other
libraries."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from oddsmith import cli
from oddsmith.functional import quantize_nf4
from oddsmith.nn import Linear4bit
from support.bitsandbytes_rounding import stepped_codes

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
bitsandbytes = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="no bitsandbytes")

TOKENS = torch.arange(4, 40).reshape(2, 18)


def with_linear4bit(folder: Path) -> nn.Module:
    """A model from files with our layers instead of bitsandbytes'."""
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("quantization_config")["load_in_4bit"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            layer = Linear4bit(
                module.in_features, module.out_features, bias=module.bias is not None
            )
            model.set_submodule(name, layer)
    tensors = load_file(folder / "model.safetensors")
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}
    model.tie_weights()
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("flags", [[], ["--double_quant", "--blocksize", "128"]])
def test_quantize(flags, tiny_mistral, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["quantize", str(tiny_mistral), str(out), *flags]) == 0
    assert "14 of 21 tensors" in capsys.readouterr().out
    AutoTokenizer.from_pretrained(out)
    loaded = with_linear4bit(out)
    expected = AutoModelForCausalLM.from_pretrained(tiny_mistral)
    full = logits(expected)
    options = {"compress_statistics": bool(flags), "blocksize": 128 if flags else 64}
    for name, module in list(expected.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            expected.set_submodule(name, Linear4bit.from_linear(module, **options))
    assert torch.equal(logits(loaded), logits(expected))
    # Roughly the same model.
    similarity = torch.cosine_similarity(logits(loaded).flatten(), full.flatten(), dim=0)
    assert 0.9 < similarity < 0.99999


@pytest.fixture
def adapter(tiny_mistral, tmp_path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(tiny_mistral)
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    torch.manual_seed(6)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_merge(adapter, tiny_mistral, tmp_path, capsys):
    out = tmp_path / "merged"
    assert cli.main(["merge", str(tiny_mistral), str(adapter), str(out)]) == 0
    assert "4 of 21 tensors" in capsys.readouterr().out
    base = AutoModelForCausalLM.from_pretrained(tiny_mistral)
    plain = logits(base)
    wanted = logits(PeftModel.from_pretrained(base, adapter))
    found = logits(AutoModelForCausalLM.from_pretrained(out))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert (plain - wanted).abs().max() > 0.05
    AutoTokenizer.from_pretrained(out)


def test_merge_into_four_bits(adapter, tiny_mistral, tmp_path):
    base, out = tmp_path / "base", tmp_path / "merged"
    assert cli.main(["quantize", str(tiny_mistral), str(base)]) == 0
    assert cli.main(["merge", str(base), str(adapter), str(out), "--quantize"]) == 0
    assert cli.main(["merge", str(base), str(adapter), str(tmp_path / "full")]) == 0
    four, full = with_linear4bit(out), AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    similarity = torch.cosine_similarity(logits(four).flatten(), logits(full).flatten(), dim=0)
    assert 0.9 < similarity < 0.99999


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["quantize", "{model}"], 2, "the following arguments are required: OUT"),
        (["quantize", "{model}", "{out}", "--blocksize", "48"], 2, "invalid choice: 48"),
        (["quantize", "{out}", "{out}2"], 1, "out: no such folder"),
        (["quantize", "{model}", "{model}"], 1, "is the input folder"),
        (["merge", "{model}", "{model}", "{out}"], 1, "has no adapter_config.json"),
        (["merge", "{model}", "{model}"], 2, "required: OUT"),
    ],
)
def test_errors_are_one_line(arguments, code, words, tiny_mistral, tmp_path, capsys):
    places = {"model": tiny_mistral, "out": tmp_path / "out"}
    assert cli.main([argument.format(**places) for argument in arguments]) == code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f"oddsmith {arguments[0]}: error: ")
    assert words in error


def test_help_is_fast():
    check = (
        "import sys; from oddsmith import cli; cli.main([sys.argv[1], '--help']); "
        "assert 'transformers' not in sys.modules and 'peft' not in sys.modules"
    )
    for command in ("quantize", "merge"):
        run = subprocess.run([sys.executable, "-c", check, command], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        assert "--double_quant" in run.stdout


# In a separate process: transformers caches whether bitsandbytes is installed.
THEIRS = """
import sys
import bitsandbytes as bnb
import torch
from bitsandbytes.functional import dequantize_4bit
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

model, ours, out, double = sys.argv[1:]
config = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=double == "True",
    bnb_4bit_compute_dtype=torch.float32,
)
theirs = AutoModelForCausalLM.from_pretrained(model, quantization_config=config, device_map="cpu")
theirs.save_pretrained(out)
loaded = AutoModelForCausalLM.from_pretrained(ours, device_map="cpu")
modules = dict(loaded.named_modules())
count = 0
for name, module in theirs.named_modules():
    if isinstance(module, bnb.nn.Linear4bit):
        pair = (module.weight, modules[name].weight)
        a, b = (dequantize_4bit(weight.data, weight.quant_state) for weight in pair)
        assert torch.equal(a, b), name
        count += 1
assert count == 14
"""


def use_their_table(source, folder):
    """Gives a checkpoint the codes of scales that bitsandbytes picks on a CPU."""
    path = folder / "model.safetensors"
    weights, entries = load_file(source / "model.safetensors"), load_file(path)
    for name in [name for name in entries if name.endswith(".nested_absmax")]:
        weight = name.removesuffix(".nested_absmax")
        _, plain = quantize_nf4(weights[weight])
        offset, code = plain.absmax.mean(), entries[f"{weight}.nested_quant_map"]
        codes, largest = stepped_codes(plain.absmax - offset, code)
        assert torch.equal(largest, entries[name])
        assert codes.shape == entries[f"{weight}.absmax"].shape
        entries[f"{weight}.absmax"] = codes
    save_file(entries, path, {"format": "pt"})


@bitsandbytes
@pytest.mark.parametrize("double_quant", [False, True])
def test_the_same_bytes_as_bitsandbytes(double_quant, tiny_mistral, tmp_path):
    from oddsmith.checkpoint.quantize import quantize_checkpoint

    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    quantize_checkpoint(tiny_mistral, ours, double_quant=double_quant)
    if double_quant:
        use_their_table(tiny_mistral, ours)
    run = subprocess.run(
        [sys.executable, "-c", THEIRS, tiny_mistral, ours, theirs, str(double_quant)],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert run.returncode == 0, run.stderr
    a, b = (load_file(folder / "model.safetensors") for folder in (ours, theirs))
    assert a.keys() == b.keys()
    for name, tensor in b.items():
        assert a[name].dtype == tensor.dtype, name
        assert a[name].shape == tensor.shape, name
        assert torch.equal(a[name], tensor), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (ours, theirs)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
