"""QLoRA without bitsandbytes: load, train, save, reload, merge, generate."""

import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from oddsmith import ORPOConfig, ORPOTrainer, cli, use_for_bitsandbytes
from oddsmith.integrations.peft_lora import LoraLinear4bit
from oddsmith.nn import Linear4bit
from support.paths import EXAMPLES
from support.trainer_runs import arguments, make_model, make_tokenizer, pairs

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning"),
]


@pytest.fixture
def folder(tmp_path):
    tokenizer = make_tokenizer()
    make_model("mistral", tokenizer).save_pretrained(tmp_path / "full")
    tokenizer.save_pretrained(tmp_path / "full")
    return tmp_path / "full"


def load(folder, **settings):
    use_for_bitsandbytes()
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=True,
    )
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, **settings)


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": False, "padding_free": False}])
@pytest.mark.parametrize("places", [{}, {"device_map": "auto"}])
def test_an_epoch_and_what_comes_after(folder, tmp_path, settings, places):
    out = tmp_path / "out"
    given = arguments(out, num_train_epochs=1, max_steps=-1, learning_rate=5e-3, **settings)
    model = load(folder, **places)
    trainer = ORPOTrainer(
        model=model,
        args=ORPOConfig(**given),
        train_dataset=pairs(12),
        processing_class=make_tokenizer(),
        peft_config=LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    layers = [m for m in trainer.model.modules() if isinstance(m, LoraLinear4bit)]
    codes = [layer.base_layer.weight.data.clone() for layer in layers]
    assert len(layers) == 7 * model.config.num_hidden_layers
    trainer.train()
    logs = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logs) == 3 and logs[-1] < logs[0]
    assert all(
        torch.equal(layer.base_layer.weight.data, before)
        for layer, before in zip(layers, codes, strict=True)
    )
    trainer.save_model()

    tokens = torch.arange(3, 15)[None]
    trained = trainer.model.eval()
    with torch.no_grad():
        expected = trained(tokens).logits
    again = PeftModel.from_pretrained(load(folder), out).eval()
    torch.testing.assert_close(again(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    merged = again.merge_and_unload()
    assert not any(isinstance(m, LoraLinear4bit) for m in merged.modules())
    assert sum(isinstance(m, Linear4bit) for m in merged.modules()) == len(layers)
    merged.save_pretrained(tmp_path / "merged")
    reread = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    mask = torch.ones_like(tokens)
    made = reread.generate(
        tokens, attention_mask=mask, max_new_tokens=4, min_new_tokens=4, pad_token_id=0
    )
    assert made.shape == (1, 16)


def test_offline_tools_give_the_same_result(folder, tmp_path):
    assert cli.main(["quantize", str(folder), str(tmp_path / "nf4"), "--double_quant"]) == 0
    loaded = load(folder)
    offline = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    ours, theirs = (
        {n: m.weight for n, m in model.named_modules() if isinstance(m, Linear4bit)}
        for model in (offline, loaded)
    )
    assert ours.keys() == theirs.keys() and ours
    for name, weight in ours.items():
        assert torch.equal(weight.data, theirs[name].data)
        assert torch.equal(weight.quant_state.absmax, theirs[name].quant_state.absmax)

    adapter = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(loaded, adapter).eval()
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    model.save_pretrained(tmp_path / "adapter")
    folders = [str(tmp_path / each) for each in ("nf4", "adapter", "merged")]
    assert cli.main(["merge", *folders, "--dtype", "float32"]) == 0
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    tokens = torch.arange(3, 15)[None]
    torch.testing.assert_close(merged(tokens).logits, model(tokens).logits, rtol=1e-3, atol=1e-4)


def test_the_command_line(folder, ultrafeedback, tmp_path):
    out = tmp_path / "out"
    argv = ["train", "--model", str(folder), "--dataset", str(ultrafeedback), "--load_in_4bit"]
    argv += ["--use_bnb_nested_quant", "--output_dir", str(out), "--max_steps", "2"]
    argv += ["--max_length", "96", "--use_cpu", "--report_to", "none", "--bf16", "false"]
    assert cli.main(argv) == 1  # no adapter to train
    assert not out.exists()
    argv += ["--use_peft", "--lora_target_modules", "all-linear"]
    assert cli.main(argv) == 0
    assert (out / "adapter_model.safetensors").is_file()


def python_path() -> list[str]:
    return [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]


def test_orpo_qlora(tiny_mistral, ultrafeedback, tmp_path):
    out = tmp_path / "out"
    # As if bitsandbytes were not installed. A script that runpy runs does not find its neighbours.
    hidden = "import runpy, sys; sys.modules['bitsandbytes'] = None; sys.argv.pop(0); "
    hidden += "runpy.run_path(sys.argv[0], run_name='__main__')"
    run = subprocess.run(
        [sys.executable, "-c", hidden, EXAMPLES / "orpo_qlora.py", "--model", tiny_mistral,
         "--dataset", ultrafeedback, "--output-dir", out, "--max-steps", "2",
         "--eval-steps", "2", "--save-steps", "2", "--logging-steps", "1",
         "--learning-rate", "1e-3", "--max-length", "96", "--max-prompt-length", "64"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (EXAMPLES, *python_path())))},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    # The reason that batches are not packed would be a warning.
    assert "keep their padding" not in run.stderr and "from logits" not in run.stderr
    assert f"Saved the adapter to {out}" in run.stdout
    model = PeftModel.from_pretrained(load(tiny_mistral), out)
    lora = {n: w for n, w in model.named_parameters() if "lora_B" in n}
    assert lora and any(weight.abs().max() > 0 for weight in lora.values())
    assert (out / "checkpoint-2").is_dir()
